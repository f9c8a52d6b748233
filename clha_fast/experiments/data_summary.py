"""Records for training and evaluation, counted under the options of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clha_fast.batching.batch import inert_mask
from clha_fast.data.records import RankedRecord
from clha_fast.layout import Layout
from clha_fast.objectives import Objective
from clha_fast.objectives.pairs import gap_quartiles
from clha_fast.types import RankingInputs


@dataclass(frozen=True)
class DataSummary:
    """Counts over a list of records, under the options of a loss.

    Attributes:
        pairs: all i < j. noise_pairs: those the noise rule drops. inert: candidates that training does not run.
        reversed_pairs: kept ones in which the worse-ranked response has the higher reward.
        closed_gates: prompts whose SFT target's reward is not above the floor.
        gaps: quartiles of |r_i - r_j| over all pairs, () without rewards or pairs.
    """

    prompts: int
    candidates: int
    fewest: int
    most: int
    rewarded: bool
    pairs: int
    noise_pairs: int
    inert: int
    closed_gates: int
    reversed_pairs: int = 0
    gaps: tuple[float, ...] = ()

    @property
    def kept_pairs(self) -> int:
        return self.pairs - self.noise_pairs


def summarise(records: Sequence[RankedRecord], objective: Objective) -> DataSummary:
    """Counts of what the loss will see; records with and without rewards must not be mixed."""
    sizes = torch.tensor([len(record.completions) for record in records])
    targets = torch.tensor([record.sft_index for record in records])
    rewarded = records[0].rewards is not None
    rewards = None
    if rewarded:
        rewards = torch.tensor([reward for record in records for reward in record.rewards or ()], dtype=torch.float32)
    layout = Layout.whole(sizes)
    given = RankingInputs(torch.ones(layout.num_candidates, dtype=torch.long), sizes, rewards, targets)
    plan = objective.plan(layout, given, torch.float32)
    return DataSummary(
        prompts=len(records),
        candidates=int(sizes.sum()),
        fewest=int(sizes.min()),
        most=layout.largest,
        rewarded=rewarded,
        pairs=plan.kept.numel(),
        noise_pairs=int((~plan.kept).sum()),
        inert=int(inert_mask(rewards, sizes, targets, objective).sum()),
        closed_gates=int((~plan.gate).sum()),
        reversed_pairs=int((plan.kept & (plan.pairs.order < 0)).sum()),
        gaps=() if plan.pairs.lead is None else gap_quartiles(plan.pairs.lead),
    )
