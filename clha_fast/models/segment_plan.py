"""What attention without masks is told of a row: whose texts stand where, and what the model's mask is by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from clha_fast.batching.segments import Segments, Span

MaskFunction = Callable[[Any, Any, Any, Any], Any]
_ENUMERATED = 4096  # texts up to so many tokens: a mask function is compared with the causal one, pair by pair


class Calls(NamedTuple):
    """The two calls for one row: texts on themselves, and blocks of candidates on prompts, as (start, length)."""

    own: list[Span]
    blocks: list[tuple[Span, Span]]


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """What stands in the attention mask's place: which tokens see which, and the model's mask in positions.

    Attributes:
        function: the model's own mask function, of (row, head, query position, key position).
        causal: it is causal and no more. sequence: a `sequence_parallel.SequenceParallel`, over whose processes the
            tokens of `segments` are spread, or None. window: w, where the function is that of a sliding window of w
            tokens, else None. places: what a device's operator has made of the segments.
        begins: the first key that a block of queries, (position, count), sees.
    """

    segments: Segments
    function: MaskFunction
    causal: bool
    sequence: Any = None
    window: int | None = None
    places: dict[torch.device, Any] = field(default_factory=dict, repr=False)
    begins: dict[Span, int] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> list[Calls]:
        """By row."""
        found = [Calls([], []) for _ in range(self.segments.rows)]
        for row, prompt, candidates in self.segments.groups:
            found[row].own.extend((prompt, *candidates))
            if candidates:
                first, (last, length) = candidates[0][0], candidates[-1]
                found[row].blocks.append(((first, last + length - first), prompt))
        return found


def is_causal(function: MaskFunction, causal: MaskFunction, longest: int, device: torch.device) -> bool:
    """Whether a mask function is the causal one in texts of `longest` tokens: by identity, or pair by pair."""
    if function is causal:
        return True
    if longest > _ENUMERATED:
        return False
    zero = torch.zeros((), dtype=torch.int64, device=device)
    places = torch.arange(longest, device=device)
    if not torch.as_tensor(function(zero, zero, places[-1:, None], places)).all():  # a window's or a chunk's end
        return False
    seen = function(zero, zero, places[:, None], places)
    return bool((torch.as_tensor(seen, device=device) == (places <= places[:, None])).all())
