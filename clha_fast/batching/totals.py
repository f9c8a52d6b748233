"""Counts that the loss divides by, over all of an optimiser step rather than one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clha_fast.batching.batch import CandidateBatch
from clha_fast.layout import Layout
from clha_fast.objectives import Objective
from clha_fast.types import COUNTS, RankingInputs

# All but the kept pairs are one number each.
SCALARS = len(COUNTS) - 1


def local_counts(batches: Sequence[CandidateBatch], objective: Objective, most: int) -> Tensor:
    """float64 [most - 1 + SCALARS]: kept pairs at rank distance 1..most - 1, then the other counts of `COUNTS`.

    Sums over processes add up.

    Args:
        most: candidates of the largest prompt of any process.
    """
    total = torch.zeros(most - 1 + SCALARS, dtype=torch.float64)
    for batch in batches:
        lengths, sizes = batch.candidate_lengths.cpu(), batch.candidates_per_prompt.cpu()
        # Every scored token of a CandidateBatch counts.
        layout = Layout.of(lengths, sizes, torch.ones(int(lengths.sum()), dtype=torch.bool))
        rewards = None if batch.rewards is None else batch.rewards.cpu()
        counts = objective.counts(layout, RankingInputs(lengths, sizes, rewards, batch.sft_index.cpu()), most - 1)
        total += torch.cat([value.reshape(-1) for value in counts.values()])
    return total


def step_counts(counts: Tensor, objective: Objective) -> dict[str, Tensor]:
    """What `objective` divides by, float32 and named as in `RankingInputs`, of `local_counts` summed over processes."""
    counts = counts.to(torch.float32)
    pairs, scalars = counts[: len(counts) - SCALARS], counts[len(counts) - SCALARS :]
    found = dict(zip(COUNTS, (pairs, *scalars.unbind()), strict=True))
    return {name: found[name] for name in objective.divides_by}
