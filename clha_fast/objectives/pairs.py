"""Pairs of one prompt's candidates, the better one first, and the noise rule: which of them an objective keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from clha_fast.layout import Layout, accumulate, from_host

# In it rewards, their differences and thresholds are compared, everywhere.
COMPARED = torch.float32
# What is counted over a whole data set is counted for so many prompts, and so many pairs, at a time.
MOST_PROMPTS, MOST_PAIRS = 1024, 1 << 18
QUARTILES = (0.25, 0.5, 0.75)
_CELLS = 1 << 16

_Item = TypeVar("_Item")


def keeps(lead: Tensor, noise_rule: str, reward_margin: float) -> Tensor:
    """The rescoring strategy (Eq. 5's 1 - k_ij) on lead = r_i - r_j, i ranked better; "none" keeps all."""
    if noise_rule == "abs":
        return lead.abs() > reward_margin
    if noise_rule == "signed":
        return lead > reward_margin
    return torch.ones_like(lead, dtype=torch.bool)


def wins(lead: Tensor) -> Tensor:
    """1 where the better candidate is ahead (lead > 0), half where they are equal, else 0; in the dtype of `lead`."""
    return (lead > 0).to(lead.dtype) + 0.5 * (lead == 0)


def pair_blocks(prompts: Iterable[_Item], size: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """The prompts in order, some at a time: at most `MOST_PROMPTS`, with at most `MOST_PAIRS` pairs or one prompt's.

    Args:
        size: how many candidates a prompt has.
    """
    block: list[_Item] = []
    pairs = 0
    for prompt in prompts:
        count = size(prompt)
        own = count * (count - 1) // 2
        if block and (len(block) == MOST_PROMPTS or pairs + own > MOST_PAIRS):
            yield block
            block, pairs = [], 0
        block.append(prompt)
        pairs += own
    if block:
        yield block


def leads(sizes: Iterable[int], rewards: Tensor) -> Iterator[Tensor]:
    """r_i - r_j of all pairs of prompts with `sizes` candidates, in the dtype of `rewards` [C]; a block at a time."""
    start = 0
    for block in pair_blocks(sizes, int):
        layout = Layout.whole(torch.tensor(block))
        lead = Pairs.of(layout, rewards[start : start + layout.num_candidates]).lead
        start += layout.num_candidates
        assert lead is not None
        yield lead


def quantiles(blocks: Callable[[], Iterable[Tensor]], shares: Sequence[float]) -> tuple[float, ...]:
    """Of |values| at these shares, each one of the values; () of none. Exact, however many values there are.

    Args:
        blocks: makes the values, float32, a block at a time; called twice. No more than a block is held.
    """

    def cells_of(block: Tensor) -> Tensor:
        return block.abs().contiguous().view(torch.int32)  # ordered as the numbers are, which have no sign

    upper = torch.zeros(_CELLS, dtype=torch.long)
    for block in blocks():
        upper += torch.bincount(cells_of(block) >> 16, minlength=_CELLS)
    ends = upper.cumsum(0)
    total = int(ends[-1])
    if not total:
        return ()
    places = torch.tensor([max(math.ceil(share * total) - 1, 0) for share in shares])
    cells = torch.searchsorted(ends, places, right=True)
    lower = {cell: torch.zeros(_CELLS, dtype=torch.long) for cell in cells.tolist()}
    for block in blocks():
        bits = cells_of(block)
        for cell, counts in lower.items():
            counts += torch.bincount(bits[bits >> 16 == cell] & (_CELLS - 1), minlength=_CELLS)
    inside = places - (ends - upper)[cells]
    found = [
        cell << 16 | int(torch.searchsorted(lower[cell].cumsum(0), place, right=True))
        for cell, place in zip(cells.tolist(), inside, strict=True)
    ]
    return tuple(torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist())


def gap_quartiles(gaps: Tensor) -> tuple[float, ...]:
    """The three quartiles of |gaps|: reward margins that drop about 25, 50 and 75 % of the pairs; () of none.

    Each is the gap of a pair, so a rule that keeps what is above it drops that pair and all below.
    """
    return quantiles(lambda: [gaps], QUARTILES)


@dataclass(frozen=True)
class Pairs:
    """All pairs (i, j), i ranked better than j in the same prompt, in the order of i, then of j.

    Attributes:
        offsets: host integers [C + 1], the pairs of candidate i are [offsets[i], offsets[i + 1]).
        i, j, distance: int64 [pairs]; distance = j - i. present: bool, both have a scored token.
        lead: r_i - r_j in the dtype of the rewards given, `COMPARED`; None without rewards.
    """

    offsets: list[int]
    i: Tensor
    j: Tensor
    distance: Tensor
    present: Tensor
    lead: Tensor | None

    @classmethod
    def of(cls, layout: Layout, rewards: Tensor | None) -> Pairs:
        """The pairs of a layout; rewards [C] on its device."""
        device, ends = layout.device, layout.candidate_offsets
        later = [end - 1 - c for start, end in itertools.pairwise(ends) for c in range(start, end)]
        offsets = [0]
        for count in later:
            offsets.append(offsets[-1] + count)
        counts = from_host(later, torch.long, device)
        i = torch.repeat_interleave(torch.arange(layout.num_candidates, device=device), counts, output_size=offsets[-1])
        first = from_host(offsets[:-1], torch.long, device)
        distance = torch.arange(offsets[-1], device=device) - first[i] + 1
        j = i + distance
        present = (layout.lengths[i] > 0) & (layout.lengths[j] > 0)
        return cls(offsets, i, j, distance, present, None if rewards is None else rewards[i] - rewards[j])

    def kept(self, noise_rule: str, reward_margin: float) -> Tensor:
        """bool [pairs]: present, and no noise; without rewards nothing is noise."""
        if self.lead is None:
            return self.present
        return self.present & keeps(self.lead, noise_rule, reward_margin)

    @property
    def order(self) -> Tensor:
        """What the rewards say of the order, 1, 0 or -1; without rewards the given one is right."""
        return torch.ones_like(self.distance) if self.lead is None else torch.sign(self.lead).to(torch.long)

    def at_distances(self, kept: Tensor, distances: int) -> Tensor:
        """float64 [distances]: how many of the `kept` pairs have rank distance 1..distances."""
        counts = torch.zeros(distances, dtype=torch.float64, device=kept.device)
        accumulate(counts, self.distance - 1, kept.to(counts.dtype))
        return counts
