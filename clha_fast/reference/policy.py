"""The clipped policy gradient as equations, candidate by candidate; arguments and results as `objectives.clha_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.objectives import PolicyOptions
from clha_fast.options import HeadOptions
from clha_fast.reference import parts
from clha_fast.types import RankingInputs


def policy_loss(
    logps: Tensor,
    targets: Tensor,
    given: RankingInputs,
    head: HeadOptions,
    options: PolicyOptions,
    entropies: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_weight (exp d - d - 1) a token, where rho =
    exp(logp - old_logp) and d = reference_logp - logp, less entropy_weight times the token's entropy, of `entropies`
    [N]; the mean over tokens, or over candidates of their means.
    """
    sizes, lengths, _, scores, reward = parts.candidates(logps, targets, given, head)
    spans: list[int] = given.candidate_lengths.tolist()
    advantages = _advantages(sizes, spans, reward, given, logps)
    old = logps.detach() if given.old_logps is None else given.old_logps.to(logps)
    total = logps[:0].sum()
    own = dict.fromkeys(("ratio", "clip_share", "old_kl", "reference_kl", "entropy"), 0.0)
    start = 0
    for c, span in enumerate(spans):
        candidate = logps[:0].sum()
        for t in range(start, start + span):
            if targets[t] == head.ignore_index:
                continue
            log_ratio = _at_most_80(logps[t] - old[t])
            ratio = torch.exp(log_ratio)
            a = advantages[t]
            if a > 0:
                high = ratio.new_tensor(1 + options.clip_high)
                candidate = candidate - a * torch.where(ratio > high, high, ratio)  # a minimum halves slopes of equals
            elif a < 0:
                low = ratio.new_tensor(1 - options.clip_low)
                candidate = candidate - a * torch.where(ratio < low, low, ratio)
            rho = float(ratio.detach())
            own["ratio"] += rho
            own["clip_share"] += bool((a > 0 and rho > 1 + options.clip_high) or (a < 0 and rho < 1 - options.clip_low))
            own["old_kl"] += rho - 1 - float(log_ratio.detach())
            if options.kl_weight > 0:
                assert given.reference_logps is not None
                d = _at_most_80(given.reference_logps[t].to(logps) - logps[t])
                divergence = torch.exp(d) - d - 1
                candidate = candidate + options.kl_weight * divergence
                own["reference_kl"] += float(divergence.detach())
            if options.entropy_weight > 0:
                assert entropies is not None
                candidate = candidate - options.entropy_weight * entropies[t]
                own["entropy"] += float(entropies[t].detach())
        start += span
        total = total + (candidate / lengths[c].clamp(min=1) if options.reduction == "sequence_mean" else candidate)
    if options.reduction == "token_mean":
        loss = total / parts.count(given.token_count, max(1.0, float(lengths.sum())), logps)
    else:
        loss = total / parts.count(given.candidate_count, len(spans), logps)
    i, j = parts.pairs(sizes, logps.device)
    kept = (lengths[i] > 0) & (lengths[j] > 0)
    if reward is not None:
        kept = kept & (reward[i].float() != reward[j].float())
    none, shut = torch.zeros_like(kept), torch.zeros(len(sizes), dtype=torch.bool)
    named = tuple(torch.tensor(own[name], dtype=torch.float64) for name in options.metric_names)
    everything = (loss, loss.new_zeros(()), scores, lengths, sizes, reward, kept, none, shut, named)
    metrics = parts.metrics(*everything, by_rank=False)
    return loss, metrics, scores


def _at_most_80(d: Tensor) -> Tensor:
    """A constant above 80; NaN stays one, with a slope."""
    return torch.where(d > 80, 80.0, d)


def _advantages(
    sizes: list[int], spans: list[int], reward: Tensor | None, given: RankingInputs, logps: Tensor
) -> Tensor:
    """[N] A of every token; of rewards, (r - mean) / (std + 1e-4) over all candidates of a prompt, std unbiased."""
    repeats = torch.tensor(spans)
    if given.advantages is not None:
        values = given.advantages.to(logps)
        return values if len(values) == len(logps) else values.repeat_interleave(repeats)
    assert reward is not None
    groups = []
    for r in reward.split(sizes):
        equal = bool((r == r[0]).all())
        groups.append(torch.zeros_like(r) if equal else (r - r.mean()) / (r.std() + 1e-4))
    return torch.cat(groups).repeat_interleave(repeats)
