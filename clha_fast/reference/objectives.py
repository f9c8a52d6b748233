"""Objectives as equations, in plain differentiable torch: what every fast implementation is tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clha_fast.objectives import CLHAOptions, CoHOptions, PROOptions, SFTOptions
from clha_fast.options import HeadOptions
from clha_fast.reference import parts, policy, preference
from clha_fast.types import RankingInputs


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

    i, j = parts.pairs(sizes, device)
    starts = [sum(sizes[:p]) for p in range(num_prompts)]
    distance = j - i
    # Converted first: an integer tensor times a Python float is float32, whatever the dtype of the scores.
    margins = options.margin * distance.to(dtype)

    present = (lengths[i] > 0) & (lengths[j] > 0)
    kept = present
    reward = None if rewards is None else rewards.to(device=device, dtype=torch.float32)  # compared, no more
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
    rank_loss = options.rank_weight * rank_loss if options.rank_weight > 0 else hinge[:0].sum()

    num = torch.tensor(sizes, dtype=dtype, device=device)
    target = torch.tensor(starts, dtype=torch.long, device=device)
    if sft_index is not None:
        target = target + sft_index.to(device)
    gate = lengths[target] > 0
    if reward is not None:
        gate = gate & (reward[target] > options.reward_floor)
    value = sums[target] if options.sft == "sum" else scores[target]
    factor = (num - 1) ** 2 if options.sft_factor == "squared" else torch.ones_like(num)
    nll = torch.where(gate & (options.sft_weight * factor > 0), -value, torch.zeros_like(value))
    sft_loss = options.sft_weight * (factor * nll).sum() / prompts

    metrics = parts.metrics(rank_loss, sft_loss, scores, lengths, sizes, reward, kept, gap > 0, gate)
    return rank_loss + sft_loss, metrics, scores


def pro_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: PROOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """PRO on token log-probabilities, prompt by prompt; results as `clha_loss`.

    Paper, Eq. 2: -sum_{k<n} log(exp s_k / sum_{i>=k} exp s_i). Published: for each k<n, with T_ki = r_k - r_i (i>k)
    and T_k = max_i T_ki, log(1e-10 + exp(s_k T_k) + sum_{i>k} exp(s_i T_ki)) - s_k T_k. And the target's -S_t times
    sft_weight * (n - 1)^2. Candidates without a scored token take no part.
    """
    sizes, lengths, sums, scores, reward = parts.candidates(logps, targets, given, head)
    rank_loss, sft_loss = logps[:0].sum(), logps[:0].sum()  # with a graph, whatever the values
    gate, best_first, start = [], 0, 0
    for size, target in zip(sizes, parts.targets(sizes, given), strict=True):
        here = [c for c in range(start, start + size) if lengths[c] > 0]
        for place, k in enumerate(here[:-1]):
            later = here[place + 1 :]
            if options.form == "paper":
                rank_loss = rank_loss + torch.logsumexp(scores[here[place:]], 0) - scores[k]
            else:
                assert reward is not None
                temperature = reward[k] - reward[later]
                own = scores[k] * temperature.max()
                floor = scores.new_tensor([math.log(1e-10)])
                entries = torch.cat([floor, own.reshape(1), scores[later] * temperature])
                rank_loss = rank_loss + torch.logsumexp(entries, 0) - own
        gate.append(bool(lengths[target] > 0))
        if gate[-1] and size > 1 and options.sft_weight > 0:
            sft_loss = sft_loss - options.sft_weight * (size - 1) ** 2 * sums[target]
        first = bool(here) and here[0] == start and bool(scores[start] == scores[here].max())
        best_first += first or size == 1
        start += size
    prompts = parts.count(given.prompt_count, len(sizes), logps)
    rank_loss, sft_loss = rank_loss / prompts, sft_loss / prompts
    i, j = parts.pairs(sizes, logps.device)
    kept = (lengths[i] > 0) & (lengths[j] > 0)
    own_sums = (torch.tensor(float(best_first), dtype=torch.float32),)
    everything = (rank_loss, sft_loss, scores, lengths, sizes, reward, kept, kept, torch.tensor(gate), own_sums)
    return rank_loss + sft_loss, parts.metrics(*everything), scores


def sft_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: SFTOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """SFT on token log-probabilities: the mean over prompts of -S_t / |y_t|, or over the targets' tokens of -S_t."""
    sizes, lengths, sums, scores, reward = parts.candidates(logps, targets, given, head)
    chosen = parts.targets(sizes, given)
    loss, gate = parts.target_nll(options.form, chosen, lengths, sums, scores, given)
    nll = -scores[chosen][gate].sum().detach()
    i, j = parts.pairs(sizes, logps.device)
    kept = (lengths[i] > 0) & (lengths[j] > 0)
    none = torch.zeros_like(kept)
    metrics = parts.metrics(loss.new_zeros(()), loss, scores, lengths, sizes, reward, kept, none, gate, (nll,))
    return loss, metrics, scores


def coh_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: CoHOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Chain of Hindsight on token log-probabilities: minus their sum over all chains, by the number of tokens."""
    sizes, lengths, sums, scores, _ = parts.candidates(logps, targets, given, head)
    present = lengths > 0
    loss = -sums[present].sum() / parts.count(given.token_count, max(1.0, float(lengths.sum())), logps)
    good_nll = -sum(scores[sum(sizes[:p])].detach() for p in range(len(sizes)))
    i, _ = parts.pairs(sizes, logps.device)
    none = torch.zeros_like(i, dtype=torch.bool)
    closed = torch.zeros(len(sizes), dtype=torch.bool)
    # Rewards all equal: no pair of chains has an order.
    everything = (loss.new_zeros(()), loss, scores, lengths, sizes, torch.zeros_like(scores), none, none, closed)
    return loss, parts.metrics(*everything, (torch.as_tensor(good_nll),)), scores


def loss(
    logps: Tensor,
    targets: Tensor,
    given: RankingInputs,
    head: HeadOptions,
    objective: Any,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of an objective of `LOSSES`: (loss [], metrics, scores [C]); `entropies` [N] where it reads them."""
    more = (entropies,) if objective.reads_entropy else ()
    return LOSSES[objective.name](logps, targets, given, head, objective, *more)


def _clha(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: CLHAOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return clha_loss(logps, targets, *given[:6], head, options)


# Every objective of `objectives.OBJECTIVES` by its name.
LOSSES: dict[str, Any] = {
    "clha": _clha,
    "pro": pro_loss,
    "rrhf": preference.rrhf_loss,
    "dpo": preference.dpo_loss,
    "simpo": preference.simpo_loss,
    "ipo": preference.ipo_loss,
    "hinge": preference.hinge_loss,
    "orpo": preference.orpo_loss,
    "cpo": preference.cpo_loss,
    "sft": sft_loss,
    "coh": coh_loss,
    "policy": policy.policy_loss,
}
