"""Shared builders: loss inputs, heads with planted log-probabilities, and the losses in plain Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clha_fast import CLHAMetrics, CLHAOptions, HeadOptions, Objective, backends, linear_clha_loss, reference
from clha_fast.types import SIGNALS, HeadInputs, RankingInputs

ROOT = Path(__file__).resolve().parents[2]
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """Inputs of one loss call; `leaves` makes the head's tensors differentiable."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    candidate_lengths: Tensor
    candidates_per_prompt: Tensor
    bias: Tensor | None = None
    row_index: Tensor | None = None
    rewards: Tensor | None = None
    sft_index: Tensor | None = None
    pair_counts: Tensor | None = None
    prompt_count: Tensor | None = None

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def to(self, dtype: torch.dtype) -> Case:
        """A copy with the head's tensors in `dtype`."""
        bias = None if self.bias is None else self.bias.detach().to(dtype, copy=True)
        hidden, weight = (t.detach().to(dtype, copy=True) for t in (self.hidden, self.weight))
        return self.replace(hidden=hidden, weight=weight, bias=bias)

    def leaves(self) -> list[Tensor]:
        """hidden, weight and bias where there is one, now requiring gradients."""
        return [t.requires_grad_() for t in (self.hidden, self.weight, self.bias) if t is not None]

    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def head(self) -> HeadInputs:
        return HeadInputs(self.hidden, self.weight, self.bias, self.targets, self.row_index)

    @property
    def ranking(self) -> RankingInputs:
        return RankingInputs(*(getattr(self, name, None) for name in RankingInputs._fields))

    def loss(self, backend: str = "torch", **settings: Any) -> tuple[Tensor, CLHAMetrics]:
        return linear_clha_loss(**self.arguments(), backend=backend, **settings)

    def gradients(self, backend: str = "torch", upstream: float = 1.0, **settings: Any) -> tuple[Tensor, list[Tensor]]:
        """(loss, gradients of the leaves), from fresh leaves."""
        case = self.to(self.hidden.dtype)
        leaves = case.leaves()
        loss, _ = case.loss(backend, **settings)
        return loss.detach(), list(torch.autograd.grad(loss, leaves, torch.tensor(upstream, dtype=loss.dtype)))


def make_case(
    lengths: Sequence[int],
    sizes: Sequence[int],
    *,
    hidden_size: int = 8,
    vocab_size: int = 19,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weight_scale: float = 1.0,
    bias: bool = False,
    rewards: bool = False,
    rows: int | None = None,
    ignored: float = 0.0,
    sft_index: bool = False,
) -> Case:
    """Random inputs; `rows` is a number of hidden rows under a row_index with repeats, `ignored` a share of tokens."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    tokens = sum(lengths)
    targets = torch.randint(vocab_size, (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < ignored] = IGNORE
    counts = torch.tensor(list(sizes))
    return Case(
        hidden=normal(tokens if rows is None else rows, hidden_size).to(dtype),
        weight=(weight_scale * normal(vocab_size, hidden_size)).to(dtype),
        bias=normal(vocab_size).to(dtype) if bias else None,
        targets=targets,
        row_index=None if rows is None else torch.randint(rows, (tokens,), generator=random),
        candidate_lengths=torch.tensor(list(lengths)),
        candidates_per_prompt=counts,
        rewards=(4 * normal(len(lengths))).float() if rewards else None,
        sft_index=(torch.rand(len(counts), generator=random) * counts).long() if sft_index else None,
    )


def random_signals(objective: Objective, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Float32 [tokens] of each signal that `objective` reads: of the size of log-probabilities, advantages around 0."""
    draw = torch.Generator().manual_seed(seed)
    values = {name: 3 * torch.rand(tokens, generator=draw) for name in SIGNALS}
    read = {*objective.reads, *objective.needs}
    return {name: value - 1.5 if name == "advantages" else -value for name, value in values.items() if name in read}


def planted(logps: Sequence[float], **ranking: Any) -> Case:
    """A case whose token log-probabilities are `logps` (each < 0): two words, and a hidden row for each token."""
    # log(1 / (1 + exp(-z))) = logp for logits (z, 0)
    z = [-math.log(math.expm1(-logp)) for logp in logps]
    return Case(
        hidden=torch.eye(len(z), dtype=torch.float64),
        weight=torch.tensor([z, [0.0] * len(z)], dtype=torch.float64),
        targets=torch.zeros(len(z), dtype=torch.int64),
        **{name: torch.as_tensor(value) for name, value in ranking.items() if value is not None},
    )


@dataclass(frozen=True)
class Ranked:
    """What a backend makes of token log-probabilities."""

    loss: float
    metrics: dict[str, float]
    scores: list[float]
    slopes: list[float]  # dL/dlogp of every token


def rank(backend: str, logps: Sequence[float], options: CLHAOptions, **ranking: Any) -> Ranked:
    """The loss of given token log-probabilities: the reference on them, the torch backend on a planted head."""
    case = planted(logps, **ranking)
    tensors = [case.candidate_lengths, case.candidates_per_prompt, case.rewards, case.sft_index]
    tensors += [case.pair_counts, case.prompt_count]
    if backend == "reference":
        leaf = torch.tensor(list(logps), dtype=torch.float64, requires_grad=True)
        loss, values, scores = reference.clha_loss(leaf, case.targets, *tensors, HeadOptions(), options)
        loss.backward()
        assert leaf.grad is not None
        slopes = leaf.grad
    else:
        result = backends.load(backend).loss_forward(case.head, case.ranking, HeadOptions(), options)
        loss, values, scores, slopes = result[:4]
    metrics = CLHAMetrics(values, scores.detach()).as_dict()
    return Ranked(loss.item(), metrics, scores.tolist(), slopes.tolist())


def plain_loss(
    sums: Sequence[float],
    tokens: Sequence[int],
    sizes: Sequence[int],
    options: CLHAOptions,
    rewards: Sequence[float] | None = None,
    sft_index: Sequence[int] | None = None,
) -> dict[str, float]:
    """spec.md in plain Python loops, from S_i and |y_i|: every sum of METRIC_NAMES, and "loss"."""
    s = [total / count if count else 0.0 for total, count in zip(sums, tokens, strict=True)]
    hinges: dict[int, list[float]] = {}
    per_prompt, sft = [], 0.0
    m = dict.fromkeys(("kept", "total", "correct", "margin", "chosen", "rejected", "active"), 0.0)
    m |= dict.fromkeys(("ordered", "concordant", "discordant", "gates"), 0.0)
    start = 0
    for p, n in enumerate(sizes):
        in_prompt = 0.0
        for i in range(start, start + n):
            for j in range(i + 1, start + n):
                m["total"] += 1
                if not (tokens[i] and tokens[j]):
                    continue
                lead = None if rewards is None else rewards[i] - rewards[j]
                if lead is None or lead != 0:
                    m["ordered"] += 1
                    agreement = (s[i] - s[j]) * (1 if lead is None or lead > 0 else -1)
                    m["concordant"] += agreement > 0
                    m["discordant"] += agreement < 0
                if lead is not None and options.noise_rule == "abs" and not abs(lead) > options.reward_margin:
                    continue
                if lead is not None and options.noise_rule == "signed" and not lead > options.reward_margin:
                    continue
                hinge = max(0.0, s[j] - s[i] + options.margin * (j - i))
                hinges.setdefault(j - i, []).append(hinge)
                in_prompt += hinge
                m["kept"] += 1
                m["correct"] += (s[i] > s[j]) + 0.5 * (s[i] == s[j])
                m["margin"] += s[i] - s[j]
                m["chosen"] += s[i]
                m["rejected"] += s[j]
                m["active"] += hinge > 0
        per_prompt.append(in_prompt)
        t = start + (sft_index[p] if sft_index is not None else 0)
        if tokens[t] and (rewards is None or rewards[t] > options.reward_floor):
            m["gates"] += 1
            factor = (n - 1) ** 2 if options.sft_factor == "squared" else 1
            sft -= factor * (sums[t] if options.sft == "sum" else s[t])
        start += n
    everything = [h for distance in hinges.values() for h in distance]
    if options.reduction == "sum":
        ranking = sum(per_prompt) / len(sizes)
    elif options.reduction == "distance_mean":
        ranking = sum(sum(distance) / len(distance) for distance in hinges.values())
    else:
        ranking = sum(everything) / len(everything) if everything else 0.0
    rank_loss, sft_loss = options.rank_weight * ranking, options.sft_weight * sft / len(sizes)
    return {
        "loss": rank_loss + sft_loss,
        "rank_loss": rank_loss,
        "sft_loss": sft_loss,
        "kept_pairs": m["kept"],
        "total_pairs": m["total"],
        "correct_pairs": m["correct"],
        "margin_sum": m["margin"],
        "chosen_sum": m["chosen"],
        "rejected_sum": m["rejected"],
        "active_pairs": m["active"],
        "ordered_pairs": m["ordered"],
        "concordant_pairs": m["concordant"],
        "discordant_pairs": m["discordant"],
        "open_gates": m["gates"],
        "prompts": len(sizes),
        "scored_tokens": sum(tokens),
        "scored_candidates": sum(count > 0 for count in tokens),
        "kept_blocks": 0,
        "routable_blocks": 0,
        "dropped_mass": 0.0,
    }
