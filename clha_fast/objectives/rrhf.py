"""RRHF (Yuan et al. 2023): a hinge without margin on the pairs that rewards tell apart, and SFT on the best-rewarded.

With p_i = S_i / |y_i|^length_penalty, and b the candidate with the highest reward:

    mean over prompts of weight * sum over pairs with r_i < r_j of max(0, p_i - p_j) - ( S_b / |y_b| or S_b )

The published code divides every score and the SFT term by one padded width instead of |y|; this is the formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Objective, Terms
from clha_fast.objectives.pairs import COMPARED, Pairs
from clha_fast.options import require, require_not_negative, require_positive

RRHFTarget = Literal["mean", "sum"]


@dataclass(frozen=True)
class RRHFOptions(Objective):
    """Rank Responses to align Human Feedback: rewards rank, whatever the order of candidates; equal ones are no pair.

    SFT raises the best-rewarded candidate that has a token, the first of equals; `sft_index` plays no part.

    Attributes:
        weight: factor on the ranking term.
        length_penalty: power of the number of tokens that divides summed log-probabilities; 1 means a token.
        sft: "mean" raises S_b / |y_b|, "sum" (the paper's) S_b.
    """

    weight: float = 1.0
    length_penalty: float = 1.0
    sft: RRHFTarget = "mean"

    name: ClassVar[str] = "rrhf"

    def __post_init__(self) -> None:
        require_positive(weight=self.weight)
        require_not_negative(length_penalty=self.length_penalty)
        require("sft", self.sft, self.sft in ("mean", "sum"), "one of mean, sum")
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("rewards",)

    def targets(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        if rewards is None:  # before anybody has asked for them
            return super().targets(layout, rewards, sft_index)
        table = rewards.new_full((layout.num_prompts, max(layout.largest, 1)), -math.inf)
        table[layout.prompt, layout.rank] = torch.where(layout.lengths > 0, rewards, -math.inf)
        return layout.starts + table.argmax(1)

    def terms(self, group: Group) -> Terms:
        hinge = torch.where(group.kept, torch.relu(-self._leads(group)), 0.0)
        best = group.of_targets(group.scores if self.sft == "mean" else group.sums)
        return Terms(self.weight * hinge.sum() / group.totals.prompts, -best.sum() / group.totals.prompts)

    def _leads(self, group: Group) -> Tensor:
        """[pairs], p of the better-rewarded less p of the other."""
        p = group.sums / group.lengths.clamp(min=1) ** self.length_penalty
        return group.order * (p[group.i] - p[group.j])

    def active(self, group: Group) -> Tensor:
        return self._leads(group) < 0

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """Candidates that tie with all others and are not the best of their prompt."""
        used = torch.zeros(layout.num_candidates, dtype=torch.bool, device=layout.device)
        compared = None if rewards is None else rewards.to(COMPARED)
        pairs = Pairs.of(layout, compared)
        kept = self.kept(pairs)
        used[pairs.i[kept]] = True
        used[pairs.j[kept]] = True
        used[self.targets(layout, compared, sft_index)] = True
        return ~used

    @property
    def by_rank(self) -> bool:
        return False

    @property
    def noise_hint(self) -> str:
        return "the rewards of each prompt are all equal, which tells no candidate from another"
