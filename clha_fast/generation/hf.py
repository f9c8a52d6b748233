"""The transformers backend: `model.generate` on prompts padded on the left."""

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
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from clha_fast.generation.backend import EncodedPrompt, Generated, GenerationSettings, cut_answer
from clha_fast.generation.prompts import own_ends
from clha_fast.models.adapters import base_model
from clha_fast.models.forward import first_position
from clha_fast.models.loading import (
    DTYPES,
    check_vocabulary,
    find_device,
    fingerprint,
    load_model,
    load_tokenizer,
)
from clha_fast.models.positions import positions_of

# How far the logits of a prompt may move when a longer one is batched with it, relative to the largest.
_DRIFT = {torch.float32: 1e-3, torch.float64: 1e-3}
_DRIFT_HALF = 5e-2
_ROUTERS = "output_router_logits"


class TransformersBackend:
    """A causal language model and its tokenizer, on the model's device.

    Args:
        model: put into evaluation mode. Its own generation settings (a repetition penalty, a temperature) play no part.

    Raises:
        ValueError: a tokenizer with more tokens than the model.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self._padding_checked = False

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for, None when its configuration names no limit."""
        return positions_of(self.model)

    def describe(self) -> dict[str, str]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"backend": "hf", "dtype": dtype, "device": self.model.device.type}

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        said: Callable[[int, str], None] | None = None,
    ) -> list[Generated]:
        """As `GenerationBackend.answer`; `said(row, text)` is called with what a row's answer is so far, uncut."""
        self._check_padding(prompts)
        ends = sorted({*own_ends(self.model), *(token for prompt in prompts for token in prompt.ends)})

        def stopped(row: int, new: list[int]) -> bool:
            text = self._text(new)
            if said is not None:
                said(row, text)
            return cut_answer(text, prompts[row].stops)[1]

        rows = generate_tokens(
            self.model,
            [prompt.ids for prompt in prompts],
            ends=ends,
            pad=self._pad,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seeds=[prompt.seed for prompt in prompts],
            stopped=stopped if said is not None or any(prompt.stops for prompt in prompts) else None,
        )
        found = []
        for prompt, row in zip(prompts, rows, strict=True):
            ended = bool(row) and row[-1] in ends
            text, stop = cut_answer(self._text(row[:-1] if ended else row), prompt.stops)
            found.append(Generated(text, "stop" if ended or stop else "length"))
        return found

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _check_padding(self, prompts: Sequence[EncodedPrompt]) -> None:
        if not self._padding_checked:
            self._padding_checked = check_padding(self.model, [prompt.ids for prompt in prompts], self._pad)


def check_padding(model: Any, prompts: Sequence[Sequence[int]], pad: int, setting: str = "batch_size") -> bool:
    """Some models read padding as text whatever the mask says: their answers would depend on their company.

    Args:
        setting: what the number of prompts in a batch is called.

    Returns:
        whether it was tried: prompts of one length have no padding.

    Raises:
        ValueError: the model reads it.
    """
    rows = sorted(prompts, key=len)
    if len(rows[0]) == len(rows[-1]):
        return False
    together = _first_logits(model, [rows[-1], rows[0]], pad)[1]
    alone = _first_logits(model, [rows[0]], pad)[0]
    drift = float((together - alone).abs().max() / alone.abs().max().clamp_min(1e-30))
    mixed = torch.is_autocast_enabled(model.device.type)
    if drift > (_DRIFT_HALF if mixed else _DRIFT.get(model.dtype, _DRIFT_HALF)):
        raise ValueError(
            f"{setting}: expected 1 for {type(base_model(model)).__name__}, which reads padding as text (a prompt's "
            f"logits move by {drift:.2g} of their size beside a longer one), got {len(rows)}"
        )
    return True


def _first_logits(model: Any, rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """float64 [rows, V]: what the first new token is drawn from."""
    return torch.as_tensor(_generate(model, rows, pad, max_new_tokens=1, output_logits=True).logits[0]).double()


def load_backend(
    path: str, *, device: str = "auto", dtype: str = "auto", attn_implementation: str | None = None
) -> TransformersBackend:
    """The causal language model, or the adapter, and the tokenizer of a local folder or of a name on the Hub.

    Args:
        device: "auto" takes the accelerator that torch sees, else the CPU; or a torch device such as "cuda:1".
        dtype: "auto" is that of the checkpoint, or one of float32, bfloat16, float16.
        attn_implementation: as transformers' `from_pretrained`.

    Raises:
        ValueError: nothing there to load, as `load_model`; an unknown device or dtype; too little memory.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place = find_device(device)
    tokenizer = load_tokenizer(path, "model")
    model: Any = load_model(path, "auto" if dtype == "auto" else getattr(torch, dtype), attn_implementation)
    try:
        model.to(place)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"device: {path} does not fit in the memory of {place} as {model.dtype}") from error
    return TransformersBackend(model, tokenizer)


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
) -> list[list[int]]:
    """The new tokens of each prompt, the one in `ends` that closes them included.

    Tokens are drawn by adding Gumbel noise to the log-probabilities and taking the largest: each prompt has a generator
    of its own, so what is drawn for it depends on its seed and on nothing else. The process's random state is left
    alone. Where the weights are spread over processes, all must call with the same prompts.

    Args:
        temperature: 0 is greedy, and needs no `seeds`; top_p as `GenerationSettings`.
        stopped: whether the new tokens of a row, given with its number, are all there will be.
        device: of the inputs, where it is not the model's.
    """
    processors = LogitsProcessorList()
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
        eos_token_id=list(ends),
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
    config = GenerationConfig(
        do_sample=False, use_cache=True, pad_token_id=pad, return_dict_in_generate=True, **settings
    )
    place = model.device if device is None else device
    inputs = {"input_ids": ids, "attention_mask": mask}
    inner = base_model(model)
    first = first_position(inner) if "position_ids" in inspect.signature(inner.forward).parameters else None
    if first:  # transformers counts from 0, where the model does not
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + first
    with torch.no_grad(), _without_own_settings(model):
        return model.generate(
            **{name: tensor.to(place) for name, tensor in inputs.items()},
            generation_config=config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
        )


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
