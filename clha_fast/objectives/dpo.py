"""DPO (Rafailov et al. 2023) of any number of ranked candidates, in two forms that are one for two.

With x_i = beta * (S_i - S_i^ref), S summed log-probabilities of the policy and of a frozen reference model:

plackett_luce   mean over prompts of -sum_{k < n} log( exp x_k / sum_{i >= k} exp x_i )      (their appendix A.3)
pairs           mean over prompts of the mean over pairs i < j of -log sigmoid(x_i - x_j)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast.objectives.base import Group, Terms
from clha_fast.objectives.listwise import plackett_luce
from clha_fast.objectives.preference import Preference
from clha_fast.options import require, require_positive

DPOForm = Literal["plackett_luce", "pairs"]


@dataclass(frozen=True)
class DPOOptions(Preference):
    """Direct Preference Optimization; n = 2 is TRL's `loss_type="sigmoid"`, in both forms.

    `reference_logps` are needed, a token (summed here) or summed a candidate.

    Attributes:
        beta: how strongly the policy is held to the reference model, a factor on the log-ratio in nats.
        form: "plackett_luce" ranks each candidate against all below it, "pairs" takes pairs alike.
    """

    beta: float = 0.1
    form: DPOForm = "plackett_luce"

    name: ClassVar[str] = "dpo"

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        require("form", self.form, self.form in ("plackett_luce", "pairs"), "one of plackett_luce, pairs")
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference_logps",)

    def implicit_rewards(self, group: Group) -> Tensor:
        return self.beta * (group.sums - group.per_candidate("reference_logps"))

    def pair_loss(self, lead: Tensor) -> Tensor:
        return -F.logsigmoid(lead)

    def terms(self, group: Group) -> Terms:
        if self.form == "pairs":
            return super().terms(group)
        rank = plackett_luce(group, self.implicit_rewards(group)).sum() / group.totals.prompts
        return Terms(rank, torch.zeros_like(rank))
