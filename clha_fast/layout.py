"""Which token is whose: packed tokens, their candidates, and chunks of whole prompts. Sizes are host integers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Tokens packed candidate after candidate, candidates prompt after prompt, best rank first.

    Attributes:
        token_offsets: [C + 1], tokens of candidate c are [token_offsets[c], token_offsets[c + 1]).
        candidate_offsets: [P + 1], candidates of prompt p likewise.
        scored: bool [N], tokens that count. lengths: float64 [C], how many of them each candidate has.
    """

    token_offsets: list[int]
    candidate_offsets: list[int]
    scored: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, candidate_lengths: Tensor, candidates_per_prompt: Tensor, scored: Tensor) -> Layout:
        """The layout of [C] and [P] integers, which are read on the host, on the device of `scored` [N]."""
        token_offsets = [0, *itertools.accumulate(candidate_lengths.tolist())]
        candidate_offsets = [0, *itertools.accumulate(candidates_per_prompt.tolist())]
        before = torch.zeros(len(scored) + 1, dtype=torch.long, device=scored.device)
        torch.cumsum(scored, 0, out=before[1:])
        edges = before[from_host(token_offsets, torch.long, scored.device)]
        lengths = (edges[1:] - edges[:-1]).to(torch.float64)
        return cls(token_offsets, candidate_offsets, scored, lengths)

    @classmethod
    def whole(cls, candidates_per_prompt: Tensor, device: torch.device | str = "cpu") -> Layout:
        """One scored token a candidate: for what depends on ranks and rewards alone."""
        count = int(candidates_per_prompt.sum())
        ones = torch.ones(count, dtype=torch.long)
        return cls.of(ones, candidates_per_prompt, torch.ones(count, dtype=torch.bool, device=device))

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def num_candidates(self) -> int:
        return len(self.token_offsets) - 1

    @property
    def num_prompts(self) -> int:
        return len(self.candidate_offsets) - 1

    @cached_property
    def largest(self) -> int:
        """The most candidates of a prompt."""
        return max((b - a for a, b in itertools.pairwise(self.candidate_offsets)), default=0)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The tokens of prompts [first, last)."""
        return self.token_offsets[self.candidate_offsets[first]], self.token_offsets[self.candidate_offsets[last]]

    @cached_property
    def prompt_edges(self) -> list[int]:
        """As the function `prompt_edges`."""
        return [self.token_offsets[c] for c in self.candidate_offsets]

    @cached_property
    def owner(self) -> Tensor:
        """int64 [N], the candidate of each token."""
        return _owners(self.token_offsets, self.device)

    @cached_property
    def prompt(self) -> Tensor:
        """int64 [C], the prompt of each candidate."""
        return _owners(self.candidate_offsets, self.device)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [P], the first candidate of each prompt."""
        return from_host(self.candidate_offsets[:-1], torch.long, self.device)

    @cached_property
    def sizes(self) -> Tensor:
        """float64 [P], candidates of each prompt."""
        return from_host(self.candidate_offsets, torch.float64, self.device).diff()

    @cached_property
    def rank(self) -> Tensor:
        """int64 [C], each candidate's place in its prompt, 0 the best."""
        return torch.arange(self.num_candidates, device=self.device) - self.starts[self.prompt]


def from_host(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers that the host has; unlike `torch.tensor(..., device="cuda")` it waits for no GPU."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _owners(offsets: Sequence[int], device: torch.device) -> Tensor:
    """Which of the segments between `offsets` each element lies in."""
    sizes = from_host(offsets, torch.long, device).diff()
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=device), sizes, output_size=offsets[-1])


class Chunk(NamedTuple):
    """Prompts [first, last), whose tokens are [start, stop); what fits the store of logits is [kept, stop)."""

    first: int
    last: int
    start: int
    kept: int
    stop: int


def prompt_edges(candidate_lengths: Tensor, candidates_per_prompt: Tensor) -> list[int]:
    """[P + 1] tokens at which prompts begin and end, of sizes [C] and [P] on the CPU."""
    offsets = [0, *itertools.accumulate(candidate_lengths.tolist())]
    return [offsets[c] for c in (0, *itertools.accumulate(candidates_per_prompt.tolist()))]


def prompt_chunks(edges: Sequence[int], capacity: int, first: int | None = None) -> list[Chunk]:
    """Chunks of whole prompts of at most `capacity` tokens (the first one of `first`); a larger prompt stands alone.

    Args:
        edges: [P + 1] tokens at which prompts begin and end, P >= 1.
    """
    chunks: list[Chunk] = []
    begin, limit = 0, capacity if first is None else first
    for last in range(1, len(edges)):
        if last == len(edges) - 1 or edges[last + 1] - edges[begin] > limit:
            start, stop = edges[begin], edges[last]
            chunks.append(Chunk(begin, last, start, max(start, stop - limit), stop))
            begin, limit = last, capacity
    return chunks


def even_capacity(edges: Sequence[int], capacity: int) -> int:
    """The size of chunks of whole prompts that are as few and as even as `capacity` allows.

    Chunks that end within a prompt of an even share are no more than there must be: each costs a pass over the weight's
    gradient, a short one too.
    """
    largest = max((b - a for a, b in itertools.pairwise(edges)), default=0)
    return min(capacity, largest + even_share(edges[-1], capacity))


def even_share(total: int, capacity: int) -> int:
    """The size of equal parts of `total`, none larger than `capacity` and as few as possible."""
    parts = -(-total // capacity)
    return -(-total // parts) if parts else 0


def accumulate(target: Tensor, index: Tensor, source: Tensor) -> None:
    """target[index] += source, repeats summed, the same bits every time."""
    if target.is_cuda:
        target.index_put_((index,), source, accumulate=True)  # sorts; index_add_ there uses float atomics
    else:
        target.index_add_(0, index, source)
