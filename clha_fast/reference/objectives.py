"""Objectives as equations, in plain differentiable torch: what every fast implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.options import CLHAOptions, HeadOptions


def clha_loss(
    logps: Tensor,
    targets: Tensor,
    candidate_lengths: Tensor,
    candidates_per_prompt: Tensor,
    rewards: Tensor | None,
    sft_index: Tensor | None,
    pair_counts: Tensor | None,
    prompt_count: Tensor | None,
    head: HeadOptions,
    options: CLHAOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CLHA loss on token log-probabilities (Eq. 3-6; reductions and SFT forms as in `CLHAOptions`).

    Args:
        logps: [N] token log-probabilities, packed candidate after candidate. targets: [N], to tell ignored tokens.
        candidate_lengths: [C]. candidates_per_prompt: [P]. rewards: [C] or None. sft_index: [P] or None (0).
        pair_counts: [D] kept pairs at distance 1..D to normalise by, None for this batch's own.
        prompt_count: [] number of prompts to normalise by, None for this batch's own.

    Returns:
        (loss [], metrics [19] in the order of `metrics.METRIC_NAMES`, scores [C]).
    """
    dtype, device = logps.dtype, logps.device
    sizes: list[int] = candidates_per_prompt.tolist()
    num_candidates, num_prompts = int(candidate_lengths.numel()), len(sizes)

    owner = torch.repeat_interleave(torch.arange(num_candidates, device=device), candidate_lengths.to(device))
    zero = logps.new_zeros(num_candidates)
    lengths = zero.index_add(0, owner, (targets != head.ignore_index).to(dtype))
    sums = zero.index_add(0, owner, logps)
    scores = torch.where(lengths > 0, sums / lengths.clamp(min=1), zero)

    # Every pair i < j of a prompt, i the better one.
    pairs: list[tuple[int, int]] = []
    starts: list[int] = []
    start = 0
    for size in sizes:
        starts.append(start)
        pairs += [(start + i, start + j) for i in range(size) for j in range(i + 1, size)]
        start += size
    i, j = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    distance = j - i
    # Converted first: an integer tensor times a Python float is float32, whatever the dtype of the scores.
    margins = options.margin * distance.to(dtype)

    present = (lengths[i] > 0) & (lengths[j] > 0)
    kept = present
    reward = None if rewards is None else rewards.to(device=device, dtype=dtype)
    if reward is not None:
        if options.noise_rule == "abs":
            kept = kept & ((reward[i] - reward[j]).abs() > options.reward_margin)
        elif options.noise_rule == "signed":
            kept = kept & (reward[i] - reward[j] > options.reward_margin)

    gap = scores[j] - scores[i] + margins
    # relu, not clamp: its gradient at the kink is 0. Selecting, not multiplying: a dropped NaN stays dropped.
    hinge = torch.relu(gap[kept])
    prompts = (
        torch.tensor(float(num_prompts), dtype=dtype, device=device)
        if prompt_count is None
        else prompt_count.to(device=device, dtype=dtype)
    )
    if options.reduction == "sum":
        rank_loss = hinge.sum() / prompts
    else:
        kept_distance = distance[kept]
        if pair_counts is None:
            counts = torch.bincount(kept_distance, minlength=1)[1:].to(dtype)
        else:
            counts = pair_counts.to(device=device, dtype=dtype)
        if options.reduction == "pair_mean":
            rank_loss = (hinge / counts.sum()).sum()
        else:
            rank_loss = (hinge / counts[kept_distance - 1]).sum()
    rank_loss = options.rank_weight * rank_loss

    num = torch.tensor(sizes, dtype=dtype, device=device)
    target = torch.tensor(starts, dtype=torch.long, device=device)
    if sft_index is not None:
        target = target + sft_index.to(device)
    gate = lengths[target] > 0
    if reward is not None:
        gate = gate & (reward[target] > options.reward_floor)
    value = sums[target] if options.sft == "sum" else scores[target]
    factor = (num - 1) ** 2 if options.sft_factor == "squared" else torch.ones_like(num)
    nll = torch.where(gate, -value, torch.zeros_like(value))
    sft_loss = options.sft_weight * (factor * nll).sum() / prompts

    loss = rank_loss + sft_loss
    with torch.no_grad():
        lead = scores[i] - scores[j]
        order = torch.ones_like(lead) if reward is None else torch.sign(reward[i] - reward[j])
        ordered = present & (order != 0)
        agreement = (order * lead)[ordered]
        metrics = torch.stack(
            [
                rank_loss,
                sft_loss,
                kept.sum(),
                torch.tensor(float(len(pairs)), device=device),
                (lead[kept] > 0).sum(),
                lead[kept].sum(),
                scores[i][kept].sum(),
                scores[j][kept].sum(),
                (gap[kept] > 0).sum(),
                ordered.sum(),
                (agreement > 0).sum(),
                (agreement < 0).sum(),
                gate.sum(),
                torch.tensor(float(num_prompts), device=device),
                lengths.sum(),
                (lengths > 0).sum(),
                *torch.zeros(3, device=device),  # every gradient is whole here
            ]
        ).to(torch.float32)
    return loss, metrics, scores
