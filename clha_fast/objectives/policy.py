"""Clipped policy gradients: PPO's surrogate (Schulman et al. 2017), GRPO (Shao et al. 2024) and DAPO (Yu et al. 2025).

A token of candidate i with advantage A_i, rho = exp(logp - old_logp) and d = reference_logp - logp costs

    -min( rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i ) + kl_weight * ( exp d - d - 1 ) - entropy_weight * H

with H the entropy of its whole distribution:

token_mean      sum over tokens / all scored tokens
sequence_mean   sum over candidates of their means a token / all candidates
group           A_i = (r_i - mean r) / (std r + 1e-4) in the candidate's prompt, std unbiased
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clha_fast.layout import Layout, accumulate
from clha_fast.objectives.base import Group, Objective, Terms, or_one
from clha_fast.options import require, require_not_negative, require_positive
from clha_fast.types import RankingInputs

Advantages = Literal["group", "given"]
PolicyReduction = Literal["token_mean", "sequence_mean"]

# Of a log-ratio. What differs by more gets no slope, where it would get inf or NaN.
_MOST = 80.0


@dataclass(frozen=True)
class PolicyOptions(Objective):
    """The clipped surrogate on responses that are there already: without a rollout step, offline policy gradient.

    GRPO is ``PolicyOptions(reduction="sequence_mean")``, DAPO ``PolicyOptions(clip_high=0.28)``, PPO's policy loss
    ``PolicyOptions(advantages="given")``. `old_logps`, one a token, are of the model that sampled; None says that this
    very model did: rho is then 1, and a token's slope -A. Log-ratios count up to 80 nats, for exp of more leaves
    float32.

    Mean and std of "group" are over all candidates of a prompt, also those without tokens or that did not run: a
    reward counts whether or not its response is here. Equal rewards, and a prompt of one, have advantage 0.

    Attributes:
        advantages: "group" makes them of `rewards`; "given" takes `advantages`, one a token or one a candidate.
        clip_low, clip_high: how far rho may fall below, or rise above 1, where that pays.
        reduction: "token_mean" weighs every token alike (DAPO, PPO), "sequence_mean" every candidate (GRPO), one
            without tokens too.
        kl_weight: factor on the estimate of the divergence from a reference model; above 0 it needs `reference_logps`,
            one a token.
        entropy_weight: factor on the entropy bonus: the mean entropy of the tokens' distributions, under the same
            reduction, is taken off the loss. 0 for none.
    """

    advantages: Advantages = "group"
    clip_low: float = 0.2
    clip_high: float = 0.2
    reduction: PolicyReduction = "token_mean"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0

    name: ClassVar[str] = "policy"
    reads: ClassVar[tuple[str, ...]] = ("old_logps",)
    divides_by: ClassVar[tuple[str, ...]] = ("candidate_count", "token_count")
    metric_names: ClassVar[Mapping[str, str]] = dict.fromkeys(("ratio", "clip_share", "old_kl"), "scored_tokens")

    def __post_init__(self) -> None:
        for name, allowed in (("advantages", ("group", "given")), ("reduction", ("token_mean", "sequence_mean"))):
            require(name, getattr(self, name), getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)
        require("clip_low", self.clip_low, self.clip_low <= 1, "at most 1, for rho is never below 0")
        require_not_negative(kl_weight=self.kl_weight, entropy_weight=self.entropy_weight)
        super().__post_init__()
        more = {"reference_kl": self.kl_weight, "entropy": self.entropy_weight}
        names = {name: "scored_tokens" for name, weight in more.items() if weight}
        object.__setattr__(self, "metric_names", {**type(self).metric_names, **names})

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_weight else ()

    @property
    def reads_entropy(self) -> bool:
        return bool(self.entropy_weight)

    @property
    def needs(self) -> tuple[str, ...]:
        source = "rewards" if self.advantages == "group" else "advantages"
        return (source, "reference_logps") if self.kl_weight else (source,)

    def check(self, given: RankingInputs) -> None:
        if self.advantages == "group" and given.advantages is not None:
            raise ValueError(
                "advantages: expected None for PolicyOptions(advantages='group'), which makes them of rewards, got "
                "values; advantages='given' takes them"
            )
        super().check(given)

    def count_candidates(self, layout: Layout) -> Tensor:
        """All: who drops candidates of advantage 0 before the model runs changes no mean."""
        return torch.tensor(layout.num_candidates, device=layout.device)

    def terms(self, group: Group) -> Terms:
        advantage = self._advantages(group)
        rho = torch.exp(self._log_ratio(group, advantage != 0))
        each = -torch.minimum(rho * advantage, rho.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage)
        if self.kl_weight:
            each = each + self.kl_weight * _divergence(self._from_reference(group))
        if self.entropy_weight:
            each = each - self.entropy_weight * group.statistic("entropy")
        if self.reduction == "sequence_mean":
            each = each / group.lengths.clamp(min=1)[group.owner]
        of = group.totals.tokens if self.reduction == "token_mean" else group.totals.candidates
        # Ignored tokens cost nothing: no advantage, and no divergence. No token anywhere is 0, not 0 / 0.
        rank = each.sum() / or_one(of)
        return Terms(rank, torch.zeros_like(rank))

    def _advantages(self, group: Group) -> Tensor:
        """A [n] of each token, 0 where that is not scored."""
        if self.advantages == "given":
            return group.per_token("advantages")
        return torch.where(group.scored, group_advantages(group)[group.owner], 0.0)

    @staticmethod
    def _log_ratio(group: Group, where: Tensor) -> Tensor:
        """log rho [n], 0 where nothing depends on it, be it NaN."""
        old = group.logps.detach() if group.plan.given.old_logps is None else group.per_token("old_logps")
        return _difference(group.logps, old, where)

    @staticmethod
    def _from_reference(group: Group) -> Tensor:
        """d [n]."""
        return _difference(group.per_token("reference_logps"), group.logps, group.scored)

    def report(self, group: Group) -> Mapping[str, Tensor]:
        """Sums over scored tokens: rho, whether its clip binds, and the estimates of both divergences.

        old_kl is rho - 1 - log rho, of the policy from the one that sampled.
        """
        log_ratio, advantage = self._log_ratio(group, group.scored), self._advantages(group)
        rho = torch.where(group.scored, torch.exp(log_ratio), 0.0)
        clipped = ((rho < 1 - self.clip_low) & (advantage < 0)) | ((rho > 1 + self.clip_high) & (advantage > 0))
        sums = {"ratio": rho.sum(), "clip_share": clipped.sum(), "old_kl": _divergence(log_ratio).sum()}
        if self.kl_weight:
            sums["reference_kl"] = _divergence(self._from_reference(group)).sum()
        if self.entropy_weight:
            sums["entropy"] = group.statistic("entropy").sum()
        return sums

    def gates(self, rewards: Tensor | None) -> Tensor | bool:
        return False

    def active(self, group: Group) -> Tensor:
        return torch.zeros_like(group.kept)

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """Prompts whose rewards are all equal, which have advantage 0; none where they count all the same.

        They do where advantages are given, in the divergence from a reference model, with an entropy bonus, and among
        the tokens of a mean.
        """
        counts = self.advantages == "given" or self.kl_weight or self.entropy_weight or self.reduction == "token_mean"
        if rewards is None or counts:
            return torch.zeros(layout.num_candidates, dtype=torch.bool, device=layout.device)
        differs = torch.zeros(layout.num_prompts, device=layout.device)
        # As they came: what float64 tells apart may be equal in float32, never the other way round.
        accumulate(differs, layout.prompt, (rewards != rewards[layout.starts][layout.prompt]).to(differs.dtype))
        return (differs == 0)[layout.prompt]

    @property
    def ranks(self) -> bool:
        return False

    @property
    def by_rank(self) -> bool:
        return False

    def silence_hint(self, several: bool) -> str:
        if not several:
            return "every prompt has one response, which has no advantage over others; give several, or advantages"
        return "the rewards of each prompt are all equal, so that every advantage is 0"


def group_advantages(group: Group) -> Tensor:
    """(r - mean) / (std + 1e-4) [candidates] within each prompt, exactly 0 where its rewards are equal."""
    rewards, prompt = group.rewards, group.prompt
    first = group.plan.layout.starts[group.prompts] - group.candidates.start
    lead = rewards - rewards[first][prompt]  # equal rewards less their rounded mean would be noise, over 1e-4
    centred = lead - (_sums(lead, group) / group.sizes)[prompt]
    std = (_sums(centred**2, group) / (group.sizes - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-4)[prompt]


def _sums(values: Tensor, group: Group) -> Tensor:
    """[prompts], of values [candidates]."""
    sums = torch.zeros_like(group.sizes)
    accumulate(sums, group.prompt, values)
    return sums


def _difference(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """a - b of log-probabilities, where it is wanted; at most `_MOST`."""
    # Chosen before and not after: exp of what is not wanted may be inf, whose slope of 0 would be NaN.
    d = torch.where(where, a, 0.0) - torch.where(where, b, 0.0)
    return torch.where(d > _MOST, _MOST, d)  # not a clamp, which gives a NaN the slope 0


def _divergence(d: Tensor) -> Tensor:
    """exp d - d - 1 >= 0, whose mean over samples of p, with d = log q - log p, is the divergence of p from q."""
    return torch.expm1(d) - d
