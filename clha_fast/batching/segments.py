"""Where prompts and candidates stand in rows that hold several of them, and which tokens see which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]

# A row a candidate, padded to the longest; nothing padded, each candidate behind a prompt of its own; each prompt once.
LAYOUTS = ("padded", "packed", "shared")


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


@dataclass(frozen=True)
class Segments:
    """The groups of a batch's rows, known on the host; what is in none of them is padding at a row's end.

    A token sees the tokens of its own group that are in the prompt or in its own candidate, and of these what the
    model lets a token see by their positions.

    Attributes:
        rows, width: B and T. groups: in the order of their rows, and in a row of their places.
    """

    rows: int
    width: int
    groups: tuple[SegmentGroup, ...]

    def tokens(self) -> TokenSegments:
        """The same by token, on the CPU."""
        positions, segments, groups = ([[] for _ in range(self.rows)] for _ in range(3))  # type: ignore[var-annotated]
        seen = [0] * self.rows
        for row, prompt, candidates in self.groups:
            for number, (_, length) in enumerate((prompt, *candidates)):
                begin = prompt[1] if number else 0
                positions[row].append(torch.arange(begin, begin + length))
                segments[row].append(torch.full((length,), number))
                groups[row].append(torch.full((length,), seen[row]))
            seen[row] += 1
        filled = []
        for parts, fill in ((positions, None), (segments, -1), (groups, -1)):
            for row in parts:
                rest = self.width - sum(map(len, row))
                row.append(torch.arange(rest) if fill is None else torch.full((rest,), fill))
            filled.append(torch.stack([torch.cat(row) for row in parts]))
        return TokenSegments(*filled)


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
