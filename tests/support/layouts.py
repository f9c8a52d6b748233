"""Packed and shared rows on a model, against each candidate alone in a row of its own: values and all gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import clha_fast
from clha_fast.batching.batch import CandidateBatch, CandidateFeature
from clha_fast.models.forward import LogpForward
from clha_fast.models.heads import HeadInfo
from clha_fast.models.layout_probe import candidates_of, pack
from clha_fast.models.measure import measure_head
from clha_fast.models.segment_masks import IN_TWO_CALLS, UnsupportedLayoutError
from clha_fast.objectives.sft import SFTOptions
from clha_fast.ops.dispatch import Backend
from tests.support.architecture_configs import FREE_TOKENS

RIGHT, REFUSED, WRONG = OUTCOMES = ("right", "refused", "wrong")
LAYOUTS = ("packed", "shared")
# Nats of any token, and of a parameter's gradient over its norm. Rows of other shapes round otherwise, and a mixture of
# experts adds its tokens up in another order.
NATS, RELATIVE = 5e-4, 2e-3


@dataclass
class Found:
    """outcome: one of `OUTCOMES`. reason: why it is not right. nats, relative: the largest differences.

    in_two_calls: whether it ran without masks.
    """

    outcome: str
    reason: str = ""
    nats: float = 0.0
    relative: float = 0.0
    in_two_calls: bool = False

    @property
    def exact(self) -> bool:
        return self.nats <= NATS and self.relative <= RELATIVE


def texts(prompts: tuple[int, ...] = (20, 17), sizes: tuple[int, ...] = (6, 11, 3), seed: int = 5) -> list[Any]:
    """Prompts longer than the windows of the tiny models: one with candidates of these sizes, others with the first."""
    draw = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(*FREE_TOKENS, (count,), generator=draw).tolist()

    first, *others = prompts
    return [
        candidates_of(some(first), [some(size) for size in sizes]),
        *(candidates_of(some(prompt), [some(sizes[0])]) for prompt in others),
    ]


def backend(info: HeadInfo) -> Backend:
    """Only "auto" calls a head that is more than one weight, a chunk of tokens at a time."""
    return "torch" if info.own_forward is None else "auto"


def forward_of(model: nn.Module, info: HeadInfo) -> LogpForward:
    return LogpForward(model, info, info.options(), backend(info))


def logps(model: nn.Module, forward: LogpForward, batch: CandidateBatch) -> Tensor:
    return forward.with_graph(model, batch.model_inputs(), batch.targets, batch.row_index, wrapped=False)


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    values.backward(torch.linspace(-1, 1.5, len(values), dtype=values.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: nn.Module, info: HeadInfo, features: list[CandidateFeature], layout: str) -> tuple[float, float]:
    """(the largest difference in nats, that of a parameter's gradient over its norm) of a layout and of rows alone."""
    from tests.support.architectures import gradient_error

    forward = forward_of(model, info)
    model.zero_grad(set_to_none=True)
    joined = logps(model, forward, pack(features, layout))
    got = gradients(model, joined)
    model.zero_grad(set_to_none=True)
    alone = torch.cat(
        [
            logps(model, forward, pack([candidates_of(feature["prompt_ids"], [ids])], "padded"))
            for feature in features
            for ids in feature["completion_ids"]
        ]
    )
    expected = gradients(model, alone)
    model.zero_grad(set_to_none=True)
    return float((joined - alone).detach().abs().max()), gradient_error(expected, got)[0]


def usual_attention(model: nn.Module) -> None:
    """What users have: sdpa where the model has it."""
    if getattr(model, "_supports_sdpa", False):
        with contextlib.suppress(ValueError):  # of a part that has none
            model.set_attn_implementation("sdpa")  # type: ignore[operator]


_SHORT = {
    r": (\w+) \([^)]*\) gives other": r"\1",
    "asks for no attention mask": "no masks",
    "a candidate sees others": "a leak",
    "does not run a row": "its length",
    "padding behind a row changes it": "padding",
    "log-probabilities differ": "values",
}


def short(found: Found) -> str:
    """The outcome for a table, and what a refusal names."""
    if found.outcome != REFUSED:
        return found.outcome
    for pattern, text in _SHORT.items():
        match = re.search(pattern, found.reason)
        if match:
            return f"{REFUSED}: {match.expand(text)}"
    return REFUSED


def judge(model: nn.Module, layout: str) -> Found:
    """What `attach` says of a layout, and whether it is so."""
    found = Found(RIGHT)
    try:
        with clha_fast.attach(model, SFTOptions(), layout=layout) as attached:
            attached.token_logps(pack(texts(), layout))  # a first batch
            found.in_two_calls = model in IN_TWO_CALLS
    except UnsupportedLayoutError as error:
        found = Found(REFUSED, str(error))
    try:
        found.nats, found.relative = compare(model, measure_head(model), texts(), layout)
    except (UnsupportedLayoutError, RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        if found.outcome == RIGHT:
            return Found(WRONG, f"accepted, but {type(error).__name__}: {error}")
        found.nats = found.relative = float("inf")
    if found.outcome == RIGHT and not found.exact:
        return dataclasses.replace(
            found,
            outcome=WRONG,
            reason=f"log-probabilities differ by {found.nats:.1e} nats, gradients by {found.relative:.1e}",
        )
    return found
