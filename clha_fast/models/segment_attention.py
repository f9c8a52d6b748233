"""Two attention calls in transformers' places: behind `sdpa`, and under a name of their own.

While a batch with segments runs in two calls, the function that would make a mask returns a `SegmentPlan`, which layers
hand on as they would the mask, gradient checkpointing included. The attention functions know it when they see it; to
any other mask they do nothing.

`attn_implementation="clha_fast"` has it with softcaps and sinks too, which `sdpa` has not; its other calls are a plain
softmax over masked scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clha_fast.batching.segments import Segments
from clha_fast.models.segment_plan import SegmentPlan, is_causal
from clha_fast.models.two_calls import attend

OWN = "clha_fast"
# Where masks and attention are both functions of transformers' tables.
TAKEN = ("sdpa", OWN)


class UnsupportedAttentionError(ValueError):
    """A layer asks of attention what two calls do not compute."""


def plan_for(
    segments: Segments, function: Callable[..., Any] | None, device: torch.device, sequence: Any = None
) -> SegmentPlan:
    """What stands in the place of the mask that `function` (None is causal) would make; `sequence` as `SegmentPlan`."""
    causal = masking_utils.causal_mask_function
    own = causal if function is None else function
    return SegmentPlan(segments, own, is_causal(own, causal, segments.longest, device), sequence, window_of(own))


def window_of(function: Callable[..., Any]) -> int | None:
    """w, where a mask function is transformers' own of a sliding window of w tokens; None for any other."""
    known = masking_utils.sliding_window_causal_mask_function(1)
    overlay = masking_utils.sliding_window_overlay(1)
    if getattr(function, "__code__", None) is not known.__code__:
        return None
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not masking_utils.causal_mask_function:
        return None
    if getattr(parts[0], "__code__", None) is not overlay.__code__:
        return None
    window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
    return window if isinstance(window, int) and window > 0 else None


def planned(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A layer's attention in rows of several candidates; arguments as transformers passes them.

    Raises:
        UnsupportedAttentionError: dropout, a position bias, or keys that are not the row's own; heads that do not
            divide among the processes of `sequence_parallel`.
    """
    name = type(module).__name__
    if dropout:
        raise UnsupportedAttentionError(
            f"attention_dropout: expected 0 where attention runs in two calls, got {dropout} in {name}; set "
            "config.attention_dropout to 0, or layout='padded'"
        )
    if position_bias is not None or key.shape[2] != query.shape[2]:
        raise UnsupportedAttentionError(
            f"layout: expected attention of a row on itself without a position bias, got {name} with "
            f"{'a bias' if position_bias is not None else f'{key.shape[2]} keys'}; layout='padded' runs it"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if plan.sequence is not None:
        query, key, value, s_aux = plan.sequence.to_heads(name, query, key, value, s_aux)
    out = attend(query, key, value, plan, scale, softcap, s_aux)
    if plan.sequence is not None:
        out = plan.sequence.to_tokens(out)
    return out.transpose(1, 2).contiguous(), None


def _sdpa(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(attention_mask, SegmentPlan):
            return planned(module, query, key, value, attention_mask, *args, **kwargs)
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    attention._clha_segments = True  # type: ignore[attr-defined]
    return attention


def _own(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if isinstance(attention_mask, SegmentPlan):
        return planned(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, **kwargs)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], -1)
    shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : key.shape[2]]
    shares = nn.functional.dropout(shares.to(value.dtype), dropout, module.training)
    return (shares @ value).transpose(1, 2).contiguous(), shares


def install() -> None:
    """Puts the functions in their places; a second call does nothing."""
    if not hasattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "_clha_segments"):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _sdpa(ALL_ATTENTION_FUNCTIONS["sdpa"])


ALL_ATTENTION_FUNCTIONS.register(OWN, _own)
masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(OWN, masking_utils.eager_mask)
