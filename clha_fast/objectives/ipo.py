"""IPO (Azar et al. 2023, Eq. 17): a squared error that holds the difference of log-ratios to a fixed target.

With x_i = (S_i - S_i^ref) / |y_i|:

    mean over prompts of the mean over pairs i < j of ( x_i - x_j - 1 / (2 * beta) )^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clha_fast.objectives.base import Group
from clha_fast.objectives.preference import Preference
from clha_fast.options import require_positive


@dataclass(frozen=True)
class IPOOptions(Preference):
    """Identity Preference Optimization; n = 2 is TRL's `loss_type="ipo"`.

    Like TRL's, and unlike the paper as printed, log-ratios are means a token: sums would make the squared error grow
    with length. `reference_logps` are needed, a token (summed here) or summed a candidate.

    Attributes:
        beta: the paper's tau; 1 / (2 * beta) is the lead that pairs are held to, nats a token.
    """

    beta: float = 0.1

    name: ClassVar[str] = "ipo"

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference_logps",)

    def implicit_rewards(self, group: Group) -> Tensor:
        return (group.sums - group.per_candidate("reference_logps")) / group.lengths.clamp(min=1)

    def pair_loss(self, lead: Tensor) -> Tensor:
        return (lead - 1 / (2 * self.beta)) ** 2
