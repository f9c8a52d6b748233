"""The torch backend's small half: which pairs count, scores, hinges and coefficients of candidates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from clha_fast.layout import accumulate
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.options import CLHAOptions, HeadOptions
from clha_fast.types import RankingInputs


@dataclass
class Plan:
    """All of the loss that rewards, lengths and counts decide: which pairs count, and how much."""

    token_offsets: list[int]
    candidate_offsets: list[int]
    pair_offsets: list[int]
    i: Tensor
    j: Tensor
    distance: Tensor
    order: Tensor
    present: Tensor
    kept: Tensor
    pair_weight: Tensor
    lengths: Tensor
    sft_target: Tensor
    sft_coefficient: Tensor
    gate: Tensor


def make_plan(
    targets: Tensor, ranking: RankingInputs, head: HeadOptions, options: CLHAOptions, dtype: torch.dtype
) -> Plan:
    """The plan of targets [N] and their ranking; rewards are compared in `dtype`, as the reference does."""
    candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts, prompt_count = ranking
    score_dtype = dtype
    # A few thousand numbers: float64 on the targets' device costs nothing and rounds nowhere.
    device, dtype = targets.device, torch.float64
    spans: list[int] = candidate_lengths.tolist()
    sizes: list[int] = candidates_per_prompt.tolist()
    num_candidates = len(spans)
    token_offsets = [0, *itertools.accumulate(spans)]
    candidate_offsets = [0, *itertools.accumulate(sizes)]

    scored = torch.zeros(len(targets) + 1, dtype=torch.long, device=device)
    torch.cumsum(targets != head.ignore_index, 0, out=scored[1:])
    edges = scored[torch.tensor(token_offsets, device=device)]
    lengths = (edges[1:] - edges[:-1]).to(dtype)

    # Pair (i, j) for every j after i in i's prompt, in the order of i.
    later = [size - 1 - q for size in sizes for q in range(size)]
    pair_offsets = [0, *itertools.accumulate(later)]
    later_tensor = torch.tensor(later, dtype=torch.long, device=device)
    i = torch.repeat_interleave(torch.arange(num_candidates, device=device), later_tensor)
    first = torch.tensor(pair_offsets[:-1], dtype=torch.long, device=device)
    distance = torch.arange(pair_offsets[-1], device=device) - first[i] + 1
    j = i + distance

    present = (lengths[i] > 0) & (lengths[j] > 0)
    if rewards is None:
        order = torch.ones_like(distance)
        kept = present
    else:
        rewards = rewards.to(device=device, dtype=score_dtype)
        lead = rewards[i] - rewards[j]
        order = torch.sign(lead).to(torch.long)
        if options.noise_rule == "abs":
            kept = present & (lead.abs() > options.reward_margin)
        elif options.noise_rule == "signed":
            kept = present & (lead > options.reward_margin)
        else:
            kept = present

    num_prompts = len(sizes)
    prompts = torch.tensor(num_prompts, device=device) if prompt_count is None else prompt_count.to(device)
    prompts = prompts.to(dtype)
    if options.reduction == "sum":
        weight = torch.ones_like(distance, dtype=dtype) / prompts
    else:
        if pair_counts is None:
            counts = torch.zeros(max(sizes), dtype=dtype, device=device)
            accumulate(counts, distance - 1, kept.to(dtype))
        else:
            counts = pair_counts.to(device=device, dtype=dtype)
        if options.reduction == "pair_mean":
            weight = (1 / counts.sum()).expand(distance.shape)
        else:
            weight = 1 / counts[distance - 1]
    pair_weight = torch.where(kept, options.rank_weight * weight, 0.0)

    starts = torch.tensor(candidate_offsets[:-1], dtype=torch.long, device=device)
    sft_target = starts if sft_index is None else starts + sft_index.to(device)
    gate = lengths[sft_target] > 0
    if rewards is not None:
        gate = gate & (rewards[sft_target] > options.reward_floor)
    size = torch.tensor(sizes, dtype=dtype, device=device)
    factor = (size - 1) ** 2 if options.sft_factor == "squared" else torch.ones_like(size)
    coefficient = -options.sft_weight * factor / prompts
    if options.sft == "mean":
        coefficient = coefficient / lengths[sft_target].clamp(min=1)
    return Plan(
        token_offsets=token_offsets,
        candidate_offsets=candidate_offsets,
        pair_offsets=pair_offsets,
        i=i,
        j=j,
        distance=distance,
        order=order,
        present=present,
        kept=kept,
        pair_weight=pair_weight,
        lengths=lengths,
        sft_target=sft_target,
        sft_coefficient=torch.where(gate, coefficient, 0.0),
        gate=gate,
    )


class Ranking:
    """Scores, hinges and coefficients, prompt range by prompt range."""

    def __init__(self, plan: Plan, options: CLHAOptions) -> None:
        self.plan = plan
        # Converted first: an integer tensor times a Python float is float32.
        self.margins = options.margin * plan.distance.to(plan.lengths.dtype)
        self.sums = torch.zeros_like(plan.lengths)
        self.scores = torch.zeros_like(plan.lengths)
        self.coefficients = torch.zeros_like(plan.lengths)

    def rank(self, first: int, last: int, logps: Tensor) -> None:
        """Takes the log-probabilities of prompts [first, last) and fills their scores and dL/dS."""
        plan = self.plan
        c0, c1 = plan.candidate_offsets[first], plan.candidate_offsets[last]
        spans = torch.tensor(plan.token_offsets[c0 : c1 + 1], device=logps.device).diff()
        owner = torch.repeat_interleave(torch.arange(c0, c1, device=logps.device), spans)
        accumulate(self.sums, owner, logps.to(self.sums.dtype))
        lengths = plan.lengths[c0:c1].clamp(min=1)
        self.scores[c0:c1] = self.sums[c0:c1] / lengths

        pairs = slice(plan.pair_offsets[c0], plan.pair_offsets[c1])
        i, j = plan.i[pairs], plan.j[pairs]
        # Compared this way round, a NaN counts as active and reaches the gradient as it reaches the loss.
        inactive = self.scores[j] - self.scores[i] + self.margins[pairs] <= 0
        push = torch.where(inactive, 0.0, plan.pair_weight[pairs])
        slope = torch.zeros_like(self.coefficients)
        accumulate(slope, j, push)
        accumulate(slope, i, -push)
        self.coefficients[c0:c1] = slope[c0:c1] / lengths
        accumulate(self.coefficients, plan.sft_target[first:last], plan.sft_coefficient[first:last])

    def token_coefficients(self, first: int, last: int) -> Tensor:
        """dL/dlogp of every token of prompts [first, last)."""
        plan = self.plan
        c0, c1 = plan.candidate_offsets[first], plan.candidate_offsets[last]
        spans = torch.tensor(plan.token_offsets[c0 : c1 + 1], device=self.sums.device).diff()
        return torch.repeat_interleave(self.coefficients[c0:c1], spans)

    def finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, metrics, scores) once every prompt has been ranked."""
        plan = self.plan
        gap = self.scores[plan.j] - self.scores[plan.i]
        slack = gap + self.margins
        # where, not a product: a dropped pair stays dropped even when its scores are NaN.
        hinge = torch.where(plan.pair_weight > 0, plan.pair_weight * torch.relu(slack), 0.0)
        sft = torch.where(plan.sft_coefficient != 0, plan.sft_coefficient * self.sums[plan.sft_target], 0.0)
        rank_loss, sft_loss = hinge.sum(), sft.sum()
        kept_gap, slack = gap[plan.kept], slack[plan.kept]
        agreement = -(plan.order * gap)[plan.present & (plan.order != 0)]
        metrics = [
            rank_loss,
            sft_loss,
            plan.kept.sum(),
            plan.i.numel(),
            (kept_gap < 0).sum(),
            -kept_gap.sum(),
            self.scores[plan.i][plan.kept].sum(),
            self.scores[plan.j][plan.kept].sum(),
            (slack > 0).sum(),
            agreement.numel(),
            (agreement > 0).sum(),
            (agreement < 0).sum(),
            plan.gate.sum(),
            plan.gate.numel(),
            plan.lengths.sum(),
            (plan.lengths > 0).sum(),
        ]
        values = torch.zeros(len(METRIC_NAMES), device=gap.device)
        values[: len(metrics)] = torch.stack([torch.as_tensor(m, device=gap.device).to(torch.float32) for m in metrics])
        return (rank_loss + sft_loss).to(dtype), values, self.scores.to(dtype)
