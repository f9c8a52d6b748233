"""What losses of pairs have in common: a function of x_i - x_j for i ranked above j, mean over all pairs of a prompt.

    L = mean over prompts of ( mean over its pairs i < j of loss(x_i - x_j) )

x is the implicit reward that the objective gives a candidate. With two candidates a prompt this is the loss of chosen
and rejected that the method was published with. Pairs of an absent candidate are none, a prompt of one has none and
adds 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clha_fast.layout import Layout, accumulate
from clha_fast.objectives.base import Group, Objective, Terms
from clha_fast.objectives.pairs import wins


@dataclass(frozen=True)
class Preference(Objective):
    """Subclasses say what x is and what is lost on a pair; the SFT term is theirs, too."""

    metric_names: ClassVar[Mapping[str, str]] = {
        "implicit_rewards/margins": "kept_pairs",
        "implicit_rewards/accuracies": "kept_pairs",
    }

    def implicit_rewards(self, group: Group) -> Tensor:
        """[candidates], the x; where absent, any finite number."""
        raise NotImplementedError(f"objective {self.name!r}: expected a method implicit_rewards(group)")

    def pair_loss(self, lead: Tensor) -> Tensor:
        """[pairs], what is lost on pairs whose x_i - x_j are `lead`."""
        raise NotImplementedError(f"objective {self.name!r}: expected a method pair_loss(lead)")

    def terms(self, group: Group) -> Terms:
        prompt, kept = group.prompt[group.i], group.kept
        pairs = torch.zeros_like(group.sizes)
        accumulate(pairs, prompt, kept.to(pairs.dtype))
        each = self.pair_loss(self.leads(group)) / pairs.clamp(min=1)[prompt]
        rank = torch.where(kept, each, 0.0).sum() / group.totals.prompts
        return Terms(rank, torch.zeros_like(rank))

    def leads(self, group: Group) -> Tensor:
        """x_i - x_j [pairs]."""
        x = self.implicit_rewards(group)
        return x[group.i] - x[group.j]

    def report(self, group: Group) -> Mapping[str, Tensor]:
        """Of the kept pairs, the sum of x_i - x_j, and how many are above 0, those at 0 half."""
        leads = self.leads(group)[group.kept]
        return dict(zip(self.metric_names, (leads.sum(), wins(leads).sum()), strict=True))

    def gates(self, rewards: Tensor | None) -> Tensor | bool:
        return False

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """Prompts of one candidate, which have no pair."""
        return layout.sizes[layout.prompt] == 1
