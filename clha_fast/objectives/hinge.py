"""The hinge of SLiC (Zhao et al. 2023; Liu et al. 2024) on all pairs.

With x_i = beta * (S_i - S_i^ref), or beta * S_i without a reference model:

    mean over prompts of the mean over pairs i < j of max(0, 1 - (x_i - x_j))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clha_fast.objectives.base import Group
from clha_fast.objectives.preference import Preference
from clha_fast.options import require, require_positive


@dataclass(frozen=True)
class HingeOptions(Preference):
    """Sequence likelihood calibration; n = 2 is the `loss_type="hinge"` of TRL's DPO, without reference its CPO's.

    Unlike CLHA's margin, 1 / beta nats are the same at every rank distance, and log-probabilities are sums. The
    gradient at the kink is 0.

    Attributes:
        beta: 1 / beta is the lead in nats beyond which a pair costs nothing.
        reference_free: True leaves the reference model out; False needs `reference_logps`, a token (summed here) or
            summed a candidate.
    """

    beta: float = 0.1
    reference_free: bool = False

    name: ClassVar[str] = "hinge"

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        require("reference_free", self.reference_free, isinstance(self.reference_free, bool), "True or False")
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.reference_free else ("reference_logps",)

    def implicit_rewards(self, group: Group) -> Tensor:
        if self.reference_free:
            return self.beta * group.sums
        return self.beta * (group.sums - group.per_candidate("reference_logps"))

    def pair_loss(self, lead: Tensor) -> Tensor:
        return torch.relu(1 - lead)

    def active(self, group: Group) -> Tensor:
        return self.leads(group) < 1
