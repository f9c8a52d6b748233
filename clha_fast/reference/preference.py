"""Losses of preferences as equations, prompt by prompt; arguments and results as `objectives.clha_loss`.

Candidates without a scored token take no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast.objectives import (
    CPOOptions,
    DPOOptions,
    HingeOptions,
    IPOOptions,
    ORPOOptions,
    RRHFOptions,
    SimPOOptions,
)
from clha_fast.options import HeadOptions
from clha_fast.reference import parts
from clha_fast.types import RankingInputs

Result = tuple[Tensor, Tensor, Tensor]


def dpo_loss(logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: DPOOptions) -> Result:
    """x_i = beta (S_i - S_i^ref). Plackett-Luce: -sum_{k<n} log(exp x_k / sum_{i>=k} exp x_i); pairs:
    the mean over pairs of -log sigmoid(x_i - x_j).
    """
    known = parts.candidates(logps, targets, given, head)
    sizes, lengths, sums, *_ = known
    x = options.beta * (sums - parts.per_candidate(given.reference_logps, logps, targets, given, head))
    if options.form == "pairs":
        return _of_pairs(known, given, x, lambda lead: -F.logsigmoid(lead))
    total = logps[:0].sum()
    for here in _present(sizes, lengths):
        for place, k in enumerate(here[:-1]):
            total = total + torch.logsumexp(x[here[place:]], 0) - x[k]
    return _result(known, given, x, total)


def simpo_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: SimPOOptions
) -> Result:
    """-log sigmoid(beta (s_i - s_j) - gamma)."""
    known = parts.candidates(logps, targets, given, head)
    return _of_pairs(known, given, options.beta * known[3], lambda lead: -F.logsigmoid(lead - options.gamma))


def ipo_loss(logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: IPOOptions) -> Result:
    """x_i = (S_i - S_i^ref) / |y_i|; (x_i - x_j - 1 / (2 beta))^2."""
    known = parts.candidates(logps, targets, given, head)
    reference = parts.per_candidate(given.reference_logps, logps, targets, given, head)
    x = (known[2] - reference) / known[1].clamp(min=1)
    return _of_pairs(known, given, x, lambda lead: (lead - 1 / (2 * options.beta)) ** 2)


def hinge_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: HingeOptions
) -> Result:
    """x_i = beta (S_i - S_i^ref), without a reference beta S_i; max(0, 1 - (x_i - x_j))."""
    known = parts.candidates(logps, targets, given, head)
    x = options.beta * known[2]
    if not options.reference_free:
        x = x - options.beta * parts.per_candidate(given.reference_logps, logps, targets, given, head)
    return _of_pairs(known, given, x, lambda lead: torch.relu(1 - lead), lambda lead: lead < 1)


def orpo_loss(logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: ORPOOptions) -> Result:
    """o_i = log(p_i / (1 - p_i)) of p_i = exp s_i, 1 - p_i at least the epsilon of float32;
    -beta log sigmoid(o_i - o_j), and the NLL of the targets.
    """
    known = parts.candidates(logps, targets, given, head)
    s = known[3]
    odds = s - torch.log((-torch.expm1(s)).clamp(min=2**-23))
    return _of_pairs(known, given, odds, lambda lead: -options.beta * F.logsigmoid(lead), sft=(1.0, options.sft))


def cpo_loss(logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: CPOOptions) -> Result:
    """-log sigmoid(beta (S_i - S_j)), and alpha times the NLL of the targets."""
    known = parts.candidates(logps, targets, given, head)
    sft = (options.alpha, options.sft)
    return _of_pairs(known, given, options.beta * known[2], lambda lead: -F.logsigmoid(lead), sft=sft)


def rrhf_loss(logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: RRHFOptions) -> Result:
    """p_i = S_i / |y_i|^length_penalty: sum over r_i < r_j of max(0, p_i - p_j), and -s or -S of the best-rewarded."""
    sizes, lengths, sums, scores, reward = parts.candidates(logps, targets, given, head)
    assert reward is not None
    reward = reward.float()  # compared, no more
    p = sums / lengths.clamp(min=1) ** options.length_penalty
    rank, best = logps[:0].sum(), logps[:0].sum()
    gate = []
    for here in _present(sizes, lengths):
        for a, b in itertools.permutations(here, 2):
            if reward[a] < reward[b]:
                rank = rank + torch.relu(p[a] - p[b])
        gate.append(bool(here))
        if here:
            chosen = max(here, key=lambda c: float(reward[c]))  # the first of equals
            best = best - (scores if options.sft == "mean" else sums)[chosen]
    prompts = parts.count(given.prompt_count, len(sizes), logps)
    rank, best = options.weight * rank / prompts, best / prompts
    i, j = parts.pairs(sizes, logps.device)
    kept = (lengths[i] > 0) & (lengths[j] > 0) & (reward[i] != reward[j])
    active = torch.sign(reward[i] - reward[j]) * (p[i] - p[j]) < 0
    everything = (rank, best, scores, lengths, sizes, reward, kept, active, torch.tensor(gate))
    metrics = parts.metrics(*everything, by_rank=False)
    return rank + best, metrics, scores


_Known = tuple[list[int], Tensor, Tensor, Tensor, Tensor | None]


def _present(sizes: list[int], lengths: Tensor) -> list[list[int]]:
    """Each prompt's candidates that have a scored token, best first."""
    starts = [sum(sizes[:p]) for p in range(len(sizes))]
    return [[c for c in range(a, a + n) if lengths[c] > 0] for a, n in zip(starts, sizes, strict=True)]


def _of_pairs(
    known: _Known,
    given: RankingInputs,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    active: Callable[[Tensor], Tensor] | None = None,
    sft: tuple[float, str] = (0.0, ""),
) -> Result:
    """The mean over prompts of the mean over pairs i < j of loss(x_i - x_j); `sft`: weight and form of an NLL."""
    total = x[:0].sum()
    for here in _present(known[0], known[1]):
        each = [loss(x[a] - x[b]) for a, b in itertools.combinations(here, 2)]
        total = total + (torch.stack(each).mean() if each else 0)
    return _result(known, given, x, total, active, sft)


def _result(
    known: _Known,
    given: RankingInputs,
    x: Tensor,
    total: Tensor,
    active: Callable[[Tensor], Tensor] | None = None,
    sft: tuple[float, str] = (0.0, ""),
) -> Result:
    sizes, lengths, sums, scores, reward = known
    rank = total / parts.count(given.prompt_count, len(sizes), scores)
    weight, form = sft
    nll, gate = torch.zeros_like(rank), torch.zeros(len(sizes), dtype=torch.bool)
    if weight > 0:
        nll, gate = parts.target_nll(form, parts.targets(sizes, given), lengths, sums, scores, given)
        nll = weight * nll
    i, j = parts.pairs(sizes, scores.device)
    kept = (lengths[i] > 0) & (lengths[j] > 0)
    lead = (x[i] - x[j]).detach()
    pushes = kept if active is None else active(lead)
    own = (lead[kept].sum(), (lead[kept] > 0).sum() + 0.5 * (lead[kept] == 0).sum())
    return rank + nll, parts.metrics(rank, nll, scores, lengths, sizes, reward, kept, pushes, gate, own), scores
