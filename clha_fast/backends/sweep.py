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
    """Bounded memory for logits, and the gradients that they become. `logps` [N] are those of tokens seen so far.

    `statistics` [N] are those of them that the objective names.
    """

    @property
    def logps(self) -> Tensor: ...

    @property
    def statistics(self) -> dict[str, Tensor]: ...

    def hold(self, chunk: Chunk) -> None:
        """Fills `logps` of the chunk's tokens and keeps the logits of [kept, stop); what was held before is gone."""

    def add_gradients(self, chunk: Chunk, slopes: Tensor) -> None:
        """Adds the gradients of sum_t slope_t * logp_t over the chunk's tokens, of which [kept, stop) are held.

        Slopes [2, n] are of log-probabilities and of entropies.
        """


def sweep_prompts(store: LogitStore, chunks: Sequence[Chunk], ranked: Ranked, gradients: bool) -> Tensor:
    """What `Ranked.rank` says of all tokens, [N] or [2, N], and, where `gradients` are wanted, the store's sums."""
    slopes = []
    for chunk in chunks:
        store.hold(chunk)
        here = slice(chunk.start, chunk.stop)
        seen = {name: value[here] for name, value in store.statistics.items()}
        slopes.append(ranked.rank(chunk.first, chunk.last, store.logps[here], seen))
        if gradients:
            store.add_gradients(chunk, slopes[-1])
    return torch.cat(slopes, -1)
