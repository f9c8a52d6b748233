"""New tokens of prompts by transformers' `model.generate`: greedy or drawn, with none of the model's own settings."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from clha_fast.models.adapters import base_model
from clha_fast.models.forward import first_position

_ROUTERS = "output_router_logits"


def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
    stopped: Callable[[int, list[int]], bool] | None = None,
    device: torch.device | None = None,
    use_cache: bool = True,
    drawn_from: LogitsProcessor | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, the one in `ends` that closes them included.

    Tokens are drawn by adding Gumbel noise to the log-probabilities and taking the largest: each prompt has a generator
    of its own, so what is drawn for it depends on its seed and on nothing else. The process's random state is left
    alone. Where the weights are spread over processes, all must call with the same prompts.

    Args:
        temperature: 0 is greedy, and needs no `seeds`; top_p as `GenerationSettings`.
        stopped: whether the new tokens of a row, given with its number, are all there will be.
        device: of the inputs, where it is not the model's. drawn_from: is shown the logits of each step as they are.
    """
    processors = LogitsProcessorList([] if drawn_from is None else [drawn_from])
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
        processors.append(_Gumbel(seeds))
    width = max(map(len, prompts))
    stop = _Stop(width, stopped)
    output = _generate(
        model,
        prompts,
        pad,
        device=device,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([stop]),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        use_cache=use_cache,
    )
    found = []
    for number, row in enumerate(output.sequences[:, width:].tolist()):
        row = row[: stop.lengths.get(number)]
        end = next((k for k, token in enumerate(row) if token in ends), None)
        found.append(row if end is None else row[: end + 1])
    return found


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    device: torch.device | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    **settings: Any,
) -> Any:
    """`model.generate`, greedy, on prompts padded on the left, with these settings and none of the model's own."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[number, width - len(prompt) :] = 1
    config = GenerationConfig(do_sample=False, pad_token_id=pad, return_dict_in_generate=True, **settings)
    place = model.device if device is None else device
    inputs = {"input_ids": ids, "attention_mask": mask}
    inner = base_model(decoder_of(model))
    first = first_position(inner) if "position_ids" in inspect.signature(inner.forward).parameters else None
    if first:  # transformers counts from 0, where the model does not
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + first
    with torch.no_grad(), _without_own_settings(decoder_of(model)):
        return model.generate(
            **{name: tensor.to(place) for name, tensor in inputs.items()},
            generation_config=config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
        )


def decoder_of(model: Any) -> Any:
    """What `model.generate` calls: the model itself, or the one that torch.compile has put its wrapper around."""
    return getattr(model.generate, "__self__", model)


@contextlib.contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """transformers fills what a configuration leaves open (a repetition penalty) from the model's own.

    A mixture of experts that is trained with its routers' loss would compute that of a token and a mask of all.
    """
    owners = {id(owner): owner for owner in (model, base_model(model))}.values()
    before = [(owner, owner.generation_config) for owner in owners]
    config: Any = base_model(model).config
    routers = [place for place in (config, config.get_text_config()) if getattr(place, _ROUTERS, False)]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        for place in routers:
            place.output_router_logits = False
        yield
    finally:
        for owner, own in before:
            owner.generation_config = own
        for place in routers:
            place.output_router_logits = True


class _Stop(StoppingCriteria):
    """Ends rows whose new tokens are `stopped`; `lengths` has their numbers of new tokens."""

    def __init__(self, width: int, stopped: Callable[[int, list[int]], bool] | None) -> None:
        self.width, self.stopped = width, stopped
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.stopped is None:
            return done
        for number, new in enumerate(input_ids[:, self.width :].tolist()):
            if number not in self.lengths and self.stopped(number, new):
                self.lengths[number] = len(new)
        done[list(self.lengths)] = True
        return done


class _Gumbel(LogitsProcessor):
    """The largest of log p + Gumbel noise is a draw from p; noise a row from a generator of its own, on the CPU."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack(
            [
                # In float64: an exponential that underflows would be an infinite lead.
                -torch.empty(scores.shape[-1], dtype=torch.float64).exponential_(generator=generator).log()
                for generator in self.generators
            ]
        )
        return scores + noise.to(scores)
