"""Counts that the loss divides by, over all of an optimiser step or an evaluation rather than one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clha_fast.batching.batch import CandidateBatch, CandidateFeature, inert_mask, scored_lengths
from clha_fast.layout import Layout
from clha_fast.objectives import Objective
from clha_fast.objectives.pairs import pair_blocks
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


def add_counts(parts: Sequence[Tensor], most: int) -> Tensor:
    """The sum of `local_counts` whose largest prompts differ, as one with `most`."""
    total = torch.zeros(most - 1 + SCALARS, dtype=torch.float64)
    for part in parts:
        distances = len(part) - SCALARS
        total[:distances] += part[:distances]
        total[most - 1 :] += part[distances:]
    return total


def is_tokenised(dataset: Any) -> bool:
    """Whether its examples are tokenised prompts; the first one tells."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
        return False
    first = dataset[0]
    return isinstance(first, Mapping) and "completion_ids" in first


def feature_chunks(dataset: Any) -> Iterator[list[CandidateFeature]]:
    """The examples of a tokenised dataset, some at a time, as `pair_blocks` has it."""
    return pair_blocks((dataset[k] for k in range(len(dataset))), lambda feature: len(feature["completion_ids"]))


def ranking_inputs(features: Sequence[CandidateFeature]) -> RankingInputs:
    """What is known of tokenised prompts before a model has run; rewards only where all have them."""
    rewards = None
    if all(feature.get("rewards") is not None for feature in features):
        rewards = torch.tensor([r for feature in features for r in feature["rewards"] or ()], dtype=torch.float32)
    return RankingInputs(
        torch.tensor([length for feature in features for length in scored_lengths(feature)]),
        torch.tensor([len(feature["completion_ids"]) for feature in features]),
        rewards,
        torch.tensor([int(feature.get("sft_index") or 0) for feature in features]),
    )


def dataset_counts(dataset: Any, objective: Objective, drop_inert: bool) -> Tensor:
    """`local_counts` of all of a tokenised dataset, without a batch made of it.

    Args:
        drop_inert: as the collator has it; a dropped candidate has no scored token.
    """
    parts, largest = [], 1
    for features in feature_chunks(dataset):
        given = ranking_inputs(features)
        lengths, sizes = given.candidate_lengths, given.candidates_per_prompt
        if drop_inert:
            lengths = lengths.masked_fill(inert_mask(given.rewards, sizes, given.sft_index, objective), 0)
        most = int(sizes.max())
        layout = Layout.of(lengths, sizes, torch.ones(int(lengths.sum()), dtype=torch.bool))
        counts = objective.counts(layout, given._replace(candidate_lengths=lengths), most - 1)
        parts.append(torch.cat([value.reshape(-1) for value in counts.values()]))
        largest = max(largest, most)
    return add_counts(parts, largest)
