"""The one loop of backends that store logits: whole prompts go from logits to slopes to gradients while they stand.

A prompt's slopes dL/dlogp need that prompt's log-probabilities only, so three products do: logits, dhidden, dweight.
Only of a prompt that exceeds the store is a part formed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from clha_fast.layout import Chunk
from clha_fast.objectives.ranked import Ranked


class LogitStore(Protocol):
    """Bounded memory for logits, and the gradients that they become. `logps` [N] are those of tokens seen so far."""

    @property
    def logps(self) -> Tensor: ...

    def score(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fills `logps` of the tokens [start, stop) of each span, and keeps nothing of their logits."""

    def hold(self, start: int, stop: int) -> None:
        """Fills `logps` of tokens [start, stop) and keeps their logits; what was held before is gone."""

    def add_gradients(self, chunk: Chunk, slopes: Tensor) -> None:
        """Adds the gradients of sum_t slope_t * logp_t over the chunk's tokens, of which [kept, stop) are held."""


def sweep_prompts(store: LogitStore, chunks: Sequence[Chunk], ranked: Ranked, gradients: bool) -> Tensor:
    """dL/dlogp [N] of all tokens, and, where `gradients` are wanted, what they add to the store's."""
    store.score([(chunk.start, chunk.kept) for chunk in chunks])
    slopes = []
    for chunk in chunks:
        store.hold(chunk.kept, chunk.stop)
        slopes.append(ranked.rank(chunk.first, chunk.last, store.logps[chunk.start : chunk.stop]))
        if gradients:
            store.add_gradients(chunk, slopes[-1])
    return torch.cat(slopes)
