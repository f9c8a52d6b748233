"""Counts that the loss divides by, over all of an optimiser step rather than one micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clha_fast.batching.batch import CandidateBatch
from clha_fast.options import CLHAOptions


@dataclass(frozen=True)
class GlobalCounts:
    """`pairs`: float32 [D], kept pairs at rank distance 1..D. `prompts`: float32 []."""

    pairs: Tensor
    prompts: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> GlobalCounts:
        """From `local_counts`, summed over processes."""
        counts = counts.to(torch.float32)
        return cls(counts[:-1], counts[-1])


def kept_pairs(
    present: Tensor, candidates_per_prompt: Tensor, rewards: Tensor | None, options: CLHAOptions, distances: int
) -> Tensor:
    """float64 [distances]: kept pairs at rank distance 1..distances.

    Args:
        present: bool [C], candidates with a scored token. candidates_per_prompt: [P]. rewards: [C] or None.
    """
    counts = torch.zeros(distances, dtype=torch.float64)
    start = 0
    for size in candidates_per_prompt.tolist():
        span = slice(start, start + size)
        start += size
        kept = (present[span][:, None] & present[span][None, :]).triu(1)
        if rewards is not None and options.noise_rule != "none":
            lead = rewards[span][:, None] - rewards[span][None, :]
            kept &= (lead.abs() if options.noise_rule == "abs" else lead) > options.reward_margin
        i, j = kept.nonzero(as_tuple=True)
        counts += torch.bincount(j - i - 1, minlength=distances)
    return counts


def local_counts(batches: Sequence[CandidateBatch], options: CLHAOptions, most: int) -> Tensor:
    """float64 [most]: kept pairs at rank distance 1..most - 1, then the prompts. Sums over processes add up.

    Args:
        most: candidates of the largest prompt of any process.
    """
    counts = torch.zeros(most, dtype=torch.float64)
    for batch in batches:
        rewards = None if batch.rewards is None else batch.rewards.cpu()
        # Every scored token of a CandidateBatch counts: a candidate has some where its length is not 0.
        present = batch.candidate_lengths.cpu() > 0
        counts[:-1] += kept_pairs(present, batch.candidates_per_prompt.cpu(), rewards, options, most - 1)
        counts[-1] += batch.candidates_per_prompt.numel()
    return counts


def first_prompts(batch: CandidateBatch, count: int) -> CandidateBatch:
    """The batch without the prompts after the first `count`; the model's rows stay as they are."""
    candidates = int(batch.candidates_per_prompt[:count].sum())
    lengths = batch.candidate_lengths[:candidates]
    tokens = int(lengths.sum())
    return dataclasses.replace(
        batch,
        targets=batch.targets[:tokens],
        row_index=batch.row_index[:tokens],
        candidate_lengths=lengths,
        candidates_per_prompt=batch.candidates_per_prompt[:count],
        rewards=None if batch.rewards is None else batch.rewards[:candidates],
        sft_index=batch.sft_index[:count],
        num_inert=int((lengths == 0).sum()) if batch.num_inert else 0,
    )
