"""PRO (Song et al. 2023): every candidate against all that are ranked below it, and SFT on the target.

paper (Eq. 2)   L_k = -log( exp s_k / sum_{i >= k} exp s_i )
published       L_k = log( 1e-10 + exp(s_k T_k) + sum_{i > k} exp(s_i T_ki) ) - s_k T_k
                with T_ki = r_k - r_i and T_k = max_i T_ki, defined for rewards in descending order
L = mean over prompts of sum_{k < n} L_k + sft_weight * (n - 1)^2 * (-S_t)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Objective, Terms
from clha_fast.objectives.listwise import later, plackett_luce
from clha_fast.options import require, require_not_negative

PROForm = Literal["paper", "published"]

_FLOOR = math.log(1e-10)


@dataclass(frozen=True)
class PROOptions(Objective):
    """Preference Ranking Optimization over the candidates that have a token.

    Attributes:
        form: "paper" is Eq. 2; "published" is the training code's, whose temperatures come from the rewards.
        sft_weight: factor on the SFT term, which has no gate.
    """

    form: PROForm = "published"
    sft_weight: float = 0.05

    name: ClassVar[str] = "pro"
    metric_names: ClassVar[tuple[str, ...]] = ("best_first",)

    def __post_init__(self) -> None:
        require("form", self.form, self.form in ("paper", "published"), "one of paper, published")
        require_not_negative(sft_weight=self.sft_weight)
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("rewards",) if self.form == "published" else ()

    def terms(self, group: Group) -> Terms:
        each = self._published(group) if self.form == "published" else plackett_luce(group, group.scores)
        # Selected, not multiplied: what has no weight stays out even when it is NaN.
        weight = self.sft_weight * (group.sizes - 1) ** 2
        nll = torch.where(weight > 0, -group.of_targets(group.sums), 0.0) * weight
        return Terms(each.sum() / group.totals.prompts, nll.sum() / group.totals.prompts)

    def _published(self, group: Group) -> Tensor:
        """[prompts, most], the L_k; none for the last of a prompt."""
        below = later(group)
        ranked = below.any(2)
        s, r = group.rectangle(group.scores, 0.0), group.rectangle(group.rewards, 0.0)
        gap = r[:, :, None] - r[:, None, :]
        largest = torch.where(below, gap, -math.inf).amax(2)
        own = torch.where(ranked, s * torch.where(ranked, largest, 0.0), 0.0)
        # Exponentials of rewards out of order overflow; inside one logsumexp they do not.
        others = torch.where(below, s[:, None, :] * gap, -math.inf)
        total = torch.cat([s.new_full((*s.shape, 1), _FLOOR), own[:, :, None], others], 2).logsumexp(2)
        return torch.where(ranked, total - own, 0.0)

    def report(self, group: Group) -> Mapping[str, Tensor]:
        """best_first: prompts whose first candidate has the highest score; a prompt of one has."""
        s = group.rectangle(group.scores, -math.inf)
        here = group.rectangle(torch.ones_like(group.lengths), 0.0).any(1)
        return {"best_first": (((s[:, 0] == s.amax(1)) & here) | (group.sizes == 1)).sum()}

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """Prompts of one candidate: no pairs, and (n - 1)^2 = 0."""
        return layout.sizes[layout.prompt] == 1

    def silence_hint(self, several: bool) -> str:
        return "every prompt has one response, which has no pair and the SFT factor (1 - 1)^2 = 0; SFTOptions trains it"
