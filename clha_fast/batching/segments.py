"""Where prompts and candidates stand in rows that hold several of them, and which tokens see which."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

logger = logging.getLogger("clha_fast")

Span = tuple[int, int]

# A row a candidate, padded to the longest; nothing padded, each candidate behind a prompt of its own; each prompt once.
LAYOUTS = ("padded", "packed", "shared")
# Shared rows pay where they leave so much of the tokens: above it, what rows of several texts cost may be more.
PAYS = 0.9
_SAID: set[str] = set()


class SegmentGroup(NamedTuple):
    """A prompt and the candidates that continue it, each a (start, length) in tokens of one row.

    They stand without a gap: prompt, first candidate, second candidate, ... A packed row has one candidate a group.
    """

    row: int
    prompt: Span
    candidates: tuple[Span, ...]


class TokenSegments(NamedTuple):
    """int64 [B, T] each, on one device.

    Attributes:
        position_ids: a token's place in the text it belongs to; every candidate's begin behind its prompt's.
        segment_ids: 0 in a prompt, k in the k-th candidate of its group, -1 on padding.
        group_ids: which group of its row, -1 on padding.
    """

    position_ids: Tensor
    segment_ids: Tensor
    group_ids: Tensor


TOKEN_SEGMENTS = TokenSegments._fields


@dataclass(frozen=True)
class Segments:
    """The groups of a batch's rows, known on the host; what is in none of them is padding at a row's end.

    A token sees the tokens of its own group that are in the prompt or in its own candidate, and of these what the
    model lets a token see by their positions.

    Attributes:
        rows, width: B and T. groups: in the order of their rows, and in a row of their places.
        layout: `shared` where a prompt has more than one candidate in its row, else `packed`; found once, for a graph
            that looks at groups is compiled anew for each number of candidates.
    """

    rows: int
    width: int
    groups: tuple[SegmentGroup, ...]
    layout: str = field(init=False)

    def __post_init__(self) -> None:
        shared = any(len(group.candidates) > 1 for group in self.groups)
        object.__setattr__(self, "layout", "shared" if shared else "packed")

    def tokens(self) -> TokenSegments:
        """The same by token, on the CPU."""
        positions = torch.arange(self.width).repeat(self.rows, 1)
        segments, groups = torch.full_like(positions, -1), torch.full_like(positions, -1)
        seen = [0] * self.rows
        for row, prompt, candidates in self.groups:
            for number, (start, length) in enumerate((prompt, *candidates)):
                span = slice(start, start + length)
                begin = prompt[1] if number else 0
                positions[row, span] = torch.arange(begin, begin + length)
                segments[row, span] = number
                groups[row, span] = seen[row]
            positions[row, sum(candidates[-1] if candidates else prompt) :] = 0
            seen[row] += 1
        return TokenSegments(positions, segments, groups)

    @property
    def longest(self) -> int:
        """Positions of the longest text: of a prompt with its longest candidate."""
        return max(prompt[1] + max((n for _, n in own), default=0) for _, prompt, own in self.groups)


def place(lengths: Iterable[tuple[int, list[int]]], multiple: int = 1) -> Segments:
    """One row of groups one after another, of (tokens of the prompt, tokens of each of its candidates).

    Args:
        multiple: the row is padded to a multiple of it.
    """
    groups, at = [], 0
    for prompt, candidates in lengths:
        start, at, own = at, at + prompt, []
        for length in candidates:
            own.append((at, length))
            at += length
        groups.append(SegmentGroup(0, (start, prompt), tuple(own)))
    return Segments(1, -(-at // multiple) * multiple, tuple(groups))


class RowTokens(NamedTuple):
    """Tokens that run, counted a prompt at a time.

    Attributes:
        padded: n (P + longest R) for each prompt of P tokens with n candidates of R. shared: P + all R.
    """

    padded: int
    shared: int

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, Sequence[int]]]) -> RowTokens:
        """Of (tokens of the prompt, tokens of each of its candidates)."""
        padded = shared = 0
        for prompt, candidates in lengths:
            padded += len(candidates) * (prompt + max(candidates, default=0))
            shared += prompt + sum(candidates) if candidates else 0
        return cls(padded, shared)

    @property
    def layout(self) -> str:
        """`shared` where that leaves at most `PAYS` of the tokens, else `padded`: always for one candidate a prompt."""
        return "shared" if self.shared < self.padded and self.shared <= PAYS * self.padded else "padded"

    def __str__(self) -> str:
        share = f", {100 * self.shared / self.padded:.0f}%" if self.padded else ""
        return f"shared rows run {self.shared:,} tokens where padded ones run {self.padded:,}{share}"


def counted_layout(lengths: Iterable[tuple[int, Sequence[int]]]) -> str:
    """`RowTokens.layout` of one batch, `shared` or `padded`; the first of each is said, with its counts."""
    found = RowTokens.of(lengths)
    if found.layout not in _SAID:
        _SAID.add(found.layout)
        # A loader's workers would each say it, every epoch anew.
        say = logger.warning if get_worker_info() is None else logger.info
        say("layout auto: %s for this batch (%s); every batch is counted", found.layout, found)
    return found.layout


def check_layout(layout: str, *more: str) -> None:
    """ValueError where `layout` is none of `LAYOUTS` nor of `more`."""
    if layout not in (*LAYOUTS, *more):
        raise ValueError(f"layout: expected one of {', '.join((*LAYOUTS, *more))}, got {layout!r}")


Rows = Sequence[tuple[Sequence[int], Sequence[int], Tensor]]  # prompt, candidate, places of its scored tokens


def padded_rows(rows: Rows, pad: int, multiple: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, row_index, targets) of a row a candidate."""
    width = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    width = -(-width // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    row_index = []
    for number, (prompt, completion, scored) in enumerate(rows):
        length = len(prompt) + len(completion)
        input_ids[number, :length] = torch.tensor([*prompt, *completion])
        attention_mask[number, :length] = 1
        # The token at position t is predicted by the row of position t - 1.
        row_index.append(number * width + len(prompt) - 1 + scored)
    index = torch.cat(row_index)
    return input_ids, attention_mask, index, input_ids.flatten()[index + 1]


def joined_rows(families: Sequence[Rows], pad: int, multiple: int) -> tuple[Segments, Tensor, Tensor, Tensor]:
    """(segments, input_ids, row_index, targets) of one row, in which those of a family share their prompt."""
    # A family without a candidate's tokens is the one row that a model must run.
    sizes = [(len(own[0][0]), [len(ids) for _, ids, _ in own if len(ids)]) for own in families]
    segments = place(sizes, multiple)
    input_ids = torch.full((segments.rows, segments.width), pad, dtype=torch.int64)
    index, targets = [torch.arange(0)], [torch.arange(0)]
    for own, (_, (start, length), candidates) in zip(families, segments.groups, strict=True):
        input_ids[0, start : start + length] = torch.tensor(own[0][0])
        for (_, completion, scored), (begin, size) in zip(own, candidates, strict=False):
            ids = torch.tensor(completion)
            input_ids[0, begin : begin + size] = ids
            # A candidate's first token is predicted by the prompt's last row, wherever the candidate stands.
            index.append(torch.where(scored == 0, start + length - 1, begin - 1 + scored))
            targets.append(ids[scored])
    return segments, input_ids, torch.cat(index), torch.cat(targets)
