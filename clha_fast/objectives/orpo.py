"""ORPO (Hong et al. 2024): SFT on the target, and the log odds ratio of each pair.

With o_i = s_i - log(1 - exp s_i), the log odds of the length-normalised likelihood:

    NLL of the targets + beta * mean over prompts of the mean over pairs i < j of -log sigmoid(o_i - o_j)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Terms
from clha_fast.objectives.preference import Preference
from clha_fast.objectives.sft import SFT_MEANS, SFTMean, target_nll
from clha_fast.options import require, require_positive

# Log-probabilities come in float32, in which 1 - exp s below this is rounding; o has a slope of at most its inverse.
LEAST_COMPLEMENT = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class ORPOOptions(Preference):
    """Odds Ratio Preference Optimization; of two candidates the second term is that of TRL's ORPO trainer.

    The first term is the paper's, the NLL of the target's own tokens. TRL's is not: it means over the prompts' tokens
    too, which are not scored here. As s nears 0 (a response that the model is sure of), o is bounded: 1 - exp s counts
    as at least the epsilon of float32, where TRL's o is infinite and two of them are NaN.

    Attributes:
        beta: factor on the odds ratio term, the paper's lambda.
        sft: "prompt_mean" (the paper's) weighs every prompt alike, "token_mean" every token of targets.
    """

    beta: float = 0.1
    sft: SFTMean = "prompt_mean"

    name: ClassVar[str] = "orpo"
    divides_by: ClassVar[tuple[str, ...]] = ("prompt_count", "target_token_count")

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        require("sft", self.sft, self.sft in SFT_MEANS, f"one of {', '.join(SFT_MEANS)}")
        super().__post_init__()

    def implicit_rewards(self, group: Group) -> Tensor:
        s = group.scores
        return s - torch.log((-torch.expm1(s)).clamp(min=LEAST_COMPLEMENT))

    def pair_loss(self, lead: Tensor) -> Tensor:
        return -self.beta * F.logsigmoid(lead)

    def terms(self, group: Group) -> Terms:
        return Terms(super().terms(group).rank, target_nll(group, self.sft))

    def gates(self, rewards: Tensor | None) -> Tensor | bool:
        return True

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """None: a prompt of one candidate has its SFT term."""
        return torch.zeros(layout.num_candidates, dtype=torch.bool, device=layout.device)
