"""The model's own attention masks in rows that hold several prompts and candidates, by logical positions.

transformers makes masks with the functions of `ALL_MASK_ATTENTION_FUNCTIONS`, each from a function of a query's and a
key's index. While a batch with segments runs in a thread, they are given another one: a token sees the keys of its own
group that are in the prompt or in its own candidate, and of these what the model's function says of their positions. So
windows, chunks and layer types stay the model's. The wrappers stand there from the first use on, and do nothing to any
other call.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import masking_utils

from clha_fast.batching.segments import Segments, TokenSegments
from clha_fast.models import segment_attention

MaskFunction = Callable[[Any, Any, Any, Any], Any]

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", segment_attention.OWN)
# Models, as long as they live, that were seen to compute such rows without masks: `segment_attention`.
IN_TWO_CALLS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# A bool mask [B, 1, T, T] of one row of 32,768 tokens. What attention makes of it may be four times as large.
MASK_BYTES = 1 << 30
_NEEDED = ("mask_function", "attention_mask", "allow_is_causal_skip", "q_length", "kv_length")
_lock = threading.Lock()


class UnsupportedLayoutError(ValueError):
    """The model does not compute rows of several candidates as it computes each alone, or was not seen to."""


class _Running(threading.local):
    """All are there from the start, in every thread: a compiled graph asks whether they are."""

    def __init__(self) -> None:
        self.segments: Segments | None = None
        self.tokens: TokenSegments | None = None
        self.asked = 0
        self.two_calls = False
        self.sequence: Any = None


_running = _Running()


def asked() -> int:
    """How many masks the model has asked for, in the batch with segments that this thread runs or has run last."""
    return _running.asked


@contextlib.contextmanager
def segmented(
    segments: Segments | None, tokens: TokenSegments | None, two_calls: bool = False, sequence: Any = None
) -> Iterator[None]:
    """Inside, and in this thread alone, masks are those of rows with `segments`; None changes nothing.

    Args:
        tokens: `segments.tokens()` on the model's device. two_calls: layers are given a plan in the mask's place, where
            their attention takes one. sequence: as `segment_plan.SegmentPlan`; `tokens` are then this process's own.

    Raises:
        UnsupportedLayoutError: as `install`.
    """
    if segments is None:
        yield
        return
    install()
    before = _running.segments, _running.tokens, _running.two_calls, _running.sequence
    _running.segments, _running.tokens, _running.two_calls, _running.sequence = segments, tokens, two_calls, sequence
    _running.asked = 0
    try:
        yield
    finally:
        _running.segments, _running.tokens, _running.two_calls, _running.sequence = before


def install() -> None:
    """Puts the wrappers in their places; a second call does nothing.

    Raises:
        UnsupportedLayoutError: a release of transformers whose mask functions take other arguments.
    """
    table = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if all(hasattr(table[name], "_clha_segments") for name in IMPLEMENTATIONS if name in table):
        return
    with _lock:
        segment_attention.install()
        takes = inspect.signature(masking_utils.sdpa_mask).parameters
        for name in _NEEDED:
            if name not in takes:
                raise UnsupportedLayoutError(
                    f"layout: expected a transformers whose masks take {name}, got {transformers.__version__}; "
                    "layout='padded' needs none"
                )
        for name in table:
            if not hasattr(table[name], "_clha_segments"):
                table[name] = _wrapped(name, table[name])


def _wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def make_mask(*args: Any, **kwargs: Any) -> Any:
        tokens = _running.tokens
        if tokens is None:
            return original(*args, **kwargs)
        own = _in_segments(name, tokens, kwargs)
        if own is None:
            assert _running.segments is not None
            given = kwargs.get("mask_function"), tokens.group_ids.device, _running.sequence
            return segment_attention.plan_for(_running.segments, *given)
        return original(*args, **own)

    make_mask._clha_segments = True  # type: ignore[attr-defined]
    return make_mask


def _in_segments(name: str, tokens: TokenSegments, given: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a function that makes masks, for rows with segments; None where none is to be made."""
    _running.asked += 1
    rows, width = tokens.group_ids.shape
    if name not in IMPLEMENTATIONS:
        raise UnsupportedLayoutError(
            f"attn_implementation: expected one of {', '.join(IMPLEMENTATIONS)} for rows of several candidates, got "
            f"{name!r}; model.set_attn_implementation('sdpa') changes it, layout='padded' runs with any"
        )
    sizes = tuple(given.get(key, 0) for key in ("q_length", "kv_length", "q_offset", "kv_offset"))
    if sizes != (width, width, 0, 0):
        raise UnsupportedLayoutError(
            f"layout: expected attention of {width} tokens on themselves in a row of several candidates, got a mask of "
            f"{sizes[0]} queries from {sizes[2]} and {sizes[1]} keys from {sizes[3]} (virtual tokens, a cache, or "
            "pooled keys); layout='padded' runs it"
        )
    if _running.two_calls and name in segment_attention.TAKEN:
        return None
    if _running.sequence is not None:
        raise UnsupportedLayoutError(
            f"attn_implementation: expected one of {', '.join(segment_attention.TAKEN)} with sequence_parallel, got "
            f"{name!r}; model.set_attn_implementation('sdpa') changes it"
        )
    if name != "flex_attention" and rows * width * width > MASK_BYTES:
        raise UnsupportedLayoutError(
            f"layout: expected a row of at most {int((MASK_BYTES / rows) ** 0.5):,} tokens, whose mask takes "
            f"{MASK_BYTES >> 30} GiB, got {width:,}; fewer prompts in a batch, or on a GPU "
            "attn_implementation='flex_attention', whose masks take no such room"
        )
    own = given.get("mask_function", masking_utils.causal_mask_function)
    return {
        **given,
        "mask_function": by_position(own, tokens),
        # No group reaches into the padding, and padding sees padding: no row of the mask is empty.
        "attention_mask": None,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }


def by_position(own: MaskFunction, tokens: TokenSegments) -> MaskFunction:
    """`own` in the positions of `tokens` [B, T], of keys in the query's group that are in its prompt or candidate."""
    positions, segments, groups = tokens

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segments[row, key]
        there = (groups[row, query] == groups[row, key]) & ((segment == 0) | (segment == segments[row, query]))
        visible: Tensor = there & own(row, head, positions[row, query], positions[row, key])
        return visible

    return sees
