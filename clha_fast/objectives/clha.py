"""CLHA (Fang et al. 2024, Eq. 3-6): a margin hinge on all pairs that are no noise, and adaptive SFT.

With s_i the length-normalised log-probabilities (nats a token), S_i their sums, i < j in one prompt (i ranked better):

    h_ij = (1 - k_ij) * max(0, s_j - s_i + margin * (j - i))                 k_ij = 1 for noise
    L    = reduction of h_ij + sft_weight * (n_p - 1)^2 * mean over prompts of -(g_p * S_t)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clha_fast.layout import Layout, accumulate
from clha_fast.objectives.base import Group, Objective, Plan, Terms
from clha_fast.objectives.pairs import COMPARED, Pairs
from clha_fast.options import is_number, require, require_not_negative
from clha_fast.types import RankingInputs

NoiseRule = Literal["abs", "signed", "none"]
Reduction = Literal["sum", "distance_mean", "pair_mean"]
SFTForm = Literal["sum", "mean"]
SFTFactor = Literal["squared", "one"]
Preset = Literal["published", "paper", "sft_only"]


@dataclass(frozen=True)
class CLHAOptions(Objective):
    """Options of the CLHA loss (Fang et al. 2024, Eq. 3-6); the defaults are the published training code's.

    Attributes:
        margin: m_ij = margin * (j - i), Eq. 6.
        reward_margin: threshold of the noise rule.
        noise_rule: "abs" keeps a pair when |r_i - r_j| > reward_margin, "signed" when
            r_i - r_j > reward_margin, "none" keeps all. Without rewards all pairs are kept.
        reduction: "sum" (Eq. 5: over a prompt's pairs, mean over prompts), "distance_mean" (published: mean over the
            kept pairs of each rank distance, summed over distances) or "pair_mean" (over all kept pairs).
        rank_weight: factor on the ranking term; 0 leaves SFT alone.
        sft: "sum" uses S_t, the target's summed log-probability; "mean" uses s_t = S_t / |y_t|.
        sft_weight: factor on the SFT term; 0 leaves ranking alone.
        sft_factor: "squared" multiplies by (n_p - 1)^2, "one" does not.
        reward_floor: the SFT gate of a prompt is open when its target's reward is above this.
    """

    margin: float = 3.0
    reward_margin: float = 3.0
    noise_rule: NoiseRule = "abs"
    reduction: Reduction = "distance_mean"
    rank_weight: float = 1.0
    sft: SFTForm = "sum"
    sft_weight: float = 0.05
    sft_factor: SFTFactor = "squared"
    reward_floor: float = 0.0

    name: ClassVar[str] = "clha"
    divides_by: ClassVar[tuple[str, ...]] = ("pair_counts", "prompt_count")

    def __post_init__(self) -> None:
        numbers = ("margin", "reward_margin", "rank_weight", "sft_weight")
        require_not_negative(**{name: getattr(self, name) for name in numbers})
        floor = self.reward_floor
        require("reward_floor", floor, is_number(floor) and not math.isnan(floor), "a number or -inf")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"one of {', '.join(allowed)}")
        super().__post_init__()

    @classmethod
    def preset(cls, name: Preset) -> CLHAOptions:
        """A named preset: "published" (the training code), "paper" (Eq. 5 as printed) or "sft_only" (targets' NLL)."""
        require("preset", name, name in PRESETS, f"one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def kept(self, pairs: Pairs) -> Tensor:
        return pairs.kept(self.noise_rule, self.reward_margin)

    def gates(self, rewards: Tensor | None) -> Tensor | bool:
        return True if rewards is None else rewards > self.reward_floor

    def plan(self, layout: Layout, given: RankingInputs, dtype: torch.dtype) -> CLHAPlan:
        plan = super().plan(layout, given, dtype)
        pairs, kept, prompts = plan.pairs, plan.kept, plan.totals.prompts
        # A few thousand numbers: float64 on the targets' device costs nothing and rounds nowhere.
        if self.reduction == "sum":
            weight = torch.ones_like(pairs.distance, dtype=torch.float64) / prompts
        else:
            if given.pair_counts is None:
                counts = pairs.at_distances(kept, layout.largest)
            else:
                counts = given.pair_counts.to(device=layout.device, dtype=torch.float64)
            if self.reduction == "pair_mean":
                weight = (1 / counts.sum()).expand(pairs.distance.shape)
            else:
                weight = 1 / counts[pairs.distance - 1]
        return CLHAPlan(
            **vars(plan),
            margins=self.margin * pairs.distance.to(torch.float64),
            pair_weight=torch.where(kept, self.rank_weight * weight, 0.0),
            sft_coefficient=self._sft_coefficient(plan),
        )

    def _sft_coefficient(self, plan: Plan) -> Tensor:
        """[P] d(SFT term) / dS_t, 0 behind a closed gate."""
        size = plan.layout.sizes
        factor = (size - 1) ** 2 if self.sft_factor == "squared" else torch.ones_like(size)
        coefficient = -self.sft_weight * factor / plan.totals.prompts
        if self.sft == "mean":
            coefficient = coefficient / plan.layout.lengths[plan.target].clamp(min=1)
        return torch.where(plan.gate, coefficient, 0.0)

    def terms(self, group: Group) -> Terms:
        plan = _own(group)
        weight, slack = plan.pair_weight[group.pairs], _slack(group)
        # where, not a product: a dropped pair stays dropped even when its scores are NaN.
        rank = torch.where(weight > 0, weight * torch.relu(slack), 0.0)
        coefficient = plan.sft_coefficient[group.prompts]
        sft = torch.where(coefficient != 0, coefficient * group.sums[group.target], 0.0)
        return Terms(rank.sum(), sft.sum())

    def slopes(self, group: Group) -> Tensor:
        """dL/dS_i of each candidate, which is dL/dlogp of its tokens."""
        plan = _own(group)
        # Compared this way round, a NaN counts as active and reaches the gradient as it reaches the loss.
        push = torch.where(_slack(group) <= 0, 0.0, plan.pair_weight[group.pairs])
        slope = torch.zeros_like(group.lengths)
        accumulate(slope, group.j, push)
        accumulate(slope, group.i, -push)
        slope = slope / group.lengths.clamp(min=1)
        accumulate(slope, group.target, plan.sft_coefficient[group.prompts])
        return slope[group.owner]

    def active(self, group: Group) -> Tensor:
        return _slack(group) > 0

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """Candidates in no kept pair that are no open SFT target."""
        used = torch.zeros(layout.num_candidates, dtype=torch.bool, device=layout.device)
        target = self.targets(layout, rewards, sft_index)
        weight = self.sft_weight * ((layout.sizes - 1) ** 2 if self.sft_factor == "squared" else 1)
        weighs = torch.as_tensor(weight > 0, device=layout.device).expand(layout.num_prompts)
        compared = None if rewards is None else rewards.to(COMPARED)
        if self.rank_weight > 0:
            pairs = Pairs.of(layout, compared)
            kept = self.kept(pairs)
            used[pairs.i[kept]] = True
            used[pairs.j[kept]] = True
        gate = weighs & self.gates(None if compared is None else compared[target])
        used[target[gate]] = True
        return ~used

    @property
    def ranks(self) -> bool:
        return self.rank_weight > 0

    @property
    def noise_hint(self) -> str:
        return (
            f"reward_margin={self.reward_margin:g} with noise_rule={self.noise_rule!r} drops all pairs as noise. Set a "
            "margin that fits the rewards, or noise_rule='none'"
        )

    def silence_hint(self, several: bool) -> str:
        """As `Objective`: ranking is off or has no pair, and SFT is off, has factor 0 or closed gates."""
        rank = f"rank_weight={self.rank_weight:g} turns ranking off"
        if self.rank_weight > 0:
            rank = "no pair is ranked" if not several else f"reward_margin={self.reward_margin:g} drops every pair"
        way = "reward_margin and reward_floor have to fit the rewards (or noise_rule='none')"
        if self.sft_weight == 0:
            sft, way = "sft_weight=0 turns SFT off", "set a weight above 0 on what the data have"
        elif not several and self.sft_factor == "squared":
            sft, way = "sft_factor='squared' is (1 - 1)^2 = 0", "preset='sft_only' or sft_factor='one' trains on them"
        else:
            sft = f"no SFT target's reward is above reward_floor={self.reward_floor:g}"
        single = "" if several else "every prompt has one response: "
        return f"{single}{rank} and {sft}; {way}"


@dataclass(frozen=True)
class CLHAPlan(Plan):
    """`Plan` with m_ij [pairs] (Eq. 6), the weight of each pair's hinge [pairs], and d(SFT term) / dS_t [P]."""

    margins: Tensor
    pair_weight: Tensor
    sft_coefficient: Tensor


def _own(group: Group) -> CLHAPlan:
    assert isinstance(group.plan, CLHAPlan)
    return group.plan


def _slack(group: Group) -> Tensor:
    """s_j - s_i + m_ij [pairs], what the hinge cuts off at 0."""
    return group.scores[group.j] - group.scores[group.i] + _own(group).margins[group.pairs]


_CHOICES: dict[str, tuple[str, ...]] = {
    "noise_rule": ("abs", "signed", "none"),
    "reduction": ("sum", "distance_mean", "pair_mean"),
    "sft": ("sum", "mean"),
    "sft_factor": ("squared", "one"),
}

PUBLISHED = CLHAOptions()
PRESETS: dict[Preset, CLHAOptions] = {
    "published": PUBLISHED,
    "paper": CLHAOptions(reduction="sum", sft="mean"),
    "sft_only": CLHAOptions(rank_weight=0.0, sft="mean", sft_weight=1.0, sft_factor="one", reward_floor=-math.inf),
}
