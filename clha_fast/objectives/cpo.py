"""CPO (Xu et al. 2024): DPO with a uniform reference model, and SFT on the target.

mean over prompts of the mean over pairs i < j of -log sigmoid( beta * (S_i - S_j) ) + alpha * NLL of the targets
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Terms
from clha_fast.objectives.preference import Preference
from clha_fast.objectives.sft import SFT_MEANS, SFTMean, target_nll
from clha_fast.options import require, require_not_negative, require_positive


@dataclass(frozen=True)
class CPOOptions(Preference):
    """Contrastive Preference Optimization; n = 2 is TRL's `loss_type="sigmoid"` of its CPO trainer.

    Attributes:
        beta: factor on the difference of summed log-probabilities in nats.
        alpha: factor on the SFT term; 0 leaves it out.
        sft: "token_mean" over all tokens of targets, as TRL's; "prompt_mean" weighs every prompt alike.
    """

    beta: float = 0.1
    alpha: float = 1.0
    sft: SFTMean = "token_mean"

    name: ClassVar[str] = "cpo"
    divides_by: ClassVar[tuple[str, ...]] = ("prompt_count", "target_token_count")

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        require_not_negative(alpha=self.alpha)
        require("sft", self.sft, self.sft in SFT_MEANS, f"one of {', '.join(SFT_MEANS)}")
        super().__post_init__()

    def implicit_rewards(self, group: Group) -> Tensor:
        return self.beta * group.sums

    def pair_loss(self, lead: Tensor) -> Tensor:
        return -F.logsigmoid(lead)

    def terms(self, group: Group) -> Terms:
        pairs = super().terms(group)
        return Terms(pairs.rank, self.alpha * target_nll(group, self.sft)) if self.alpha else pairs

    def gates(self, rewards: Tensor | None) -> Tensor | bool:
        return self.alpha > 0

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """Prompts of one candidate where there is no SFT term; else none."""
        return super().inert(layout, rewards, sft_index) & (self.alpha == 0)
