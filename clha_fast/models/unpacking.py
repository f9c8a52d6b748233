"""Rows of several candidates as padded ones, for a model that does not compute the former."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clha_fast.batching.segments import Segments, Span

# What a batch of padded rows does without.
_OF_ROWS = ("segments", "position_ids", "segment_ids", "group_ids")


class PaddedRows(NamedTuple):
    """A row a candidate, behind its prompt, and one of a prompt without candidates.

    Attributes:
        inputs: input_ids, attention_mask int64 [R, W]; padding is token 0, which any vocabulary has.
        reads: int64 [B, T] on the CPU, the place among R W from which each token is read; -1 for none.
    """

    inputs: dict[str, Tensor]
    reads: Tensor


def padded_rows_of(input_ids: Tensor, segments: Segments) -> PaddedRows:
    """The same texts, candidate after candidate; a prompt's own tokens are read in its first candidate's row."""
    texts: list[tuple[int, Span, Span | None]] = []
    for row, prompt, candidates in segments.groups:
        texts += [(row, prompt, span) for span in candidates] or [(row, prompt, None)]
    width = max((prompt[1] + (own[1] if own else 0) for _, prompt, own in texts), default=0)
    source = torch.full((len(texts), width), -1)
    reads = torch.full((segments.rows, segments.width), -1)
    for number, (row, (start, length), own) in enumerate(texts):
        places = torch.arange(start, start + length)
        if own is not None:
            places = torch.cat([places, torch.arange(own[0], own[0] + own[1])])
        source[number, : len(places)] = row * segments.width + places
        read = number * width + torch.arange(len(places)) - 1
        read[0] = -1
        new = reads[row, places] < 0
        reads[row, places[new]] = read[new]
    there = (source >= 0).to(input_ids.device)
    ids = input_ids.flatten()[source.clamp(min=0).to(input_ids.device)]
    return PaddedRows({"input_ids": ids * there, "attention_mask": there.long()}, reads)


def padded_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `CandidateBatch` in rows of several candidates, as padded ones; targets and lengths stay as they are.

    The lengths are read on the host.
    """
    segments, row_index = batch["segments"], batch["row_index"]
    inputs, reads = padded_rows_of(batch["input_ids"], segments)
    own = _own_places(segments, row_index.tolist(), [n for n in batch["candidate_lengths"].tolist() if n])
    index = reads.flatten()[torch.tensor(own, dtype=torch.int64)].to(row_index.device)
    return {**batch, **inputs, "row_index": index, **dict.fromkeys(_OF_ROWS)}


def _own_places(segments: Segments, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Where the scored tokens themselves stand; a candidate's first one is read from its prompt's end, as others' are.

    Args:
        rows: places from which they are read, candidate after candidate. lengths: scored tokens of the candidates.
    """
    spans = [(row, prompt, own) for row, prompt, candidates in segments.groups for own in candidates]
    found, at = [], 0
    for length, (row, prompt, own) in zip(lengths, spans, strict=False):
        end = row * segments.width + sum(prompt) - 1
        begin = row * segments.width + own[0]
        found += [begin if place == end else place + 1 for place in rows[at : at + length]]
        at += length
    return found
