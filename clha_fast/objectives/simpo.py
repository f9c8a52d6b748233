"""SimPO (Meng et al. 2024): a target margin between length-normalised log-probabilities, without a reference model.

mean over prompts of the mean over pairs i < j of -log sigmoid( beta * (s_i - s_j) - gamma )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from clha_fast.objectives.base import Group
from clha_fast.objectives.preference import Preference
from clha_fast.options import require_not_negative, require_positive


@dataclass(frozen=True)
class SimPOOptions(Preference):
    """Simple Preference Optimization; n = 2 is TRL's CPO trainer with `loss_type="simpo"`, `cpo_alpha=0`.

    Attributes:
        beta: factor on s = S / |y|, nats a token; the paper's are 2 to 10 (TRL's default of 0.1 is CPO's).
        gamma: the margin by which beta * s of the better one is to lead, the same at every rank distance.
    """

    beta: float = 2.0
    gamma: float = 1.0

    name: ClassVar[str] = "simpo"

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        require_not_negative(gamma=self.gamma)
        super().__post_init__()

    def implicit_rewards(self, group: Group) -> Tensor:
        return self.beta * group.scores

    def pair_loss(self, lead: Tensor) -> Tensor:
        return -F.logsigmoid(lead - self.gamma)
