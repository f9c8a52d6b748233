"""SFT on the target of each prompt, in the two forms that are both called so.

prompt_mean   mean over prompts of -S_t / |y_t|
token_mean    sum over prompts of -S_t / all tokens of targets
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Objective, Terms, or_one
from clha_fast.options import require

SFTMean = Literal["prompt_mean", "token_mean"]
SFT_MEANS = ("prompt_mean", "token_mean")


def target_nll(group: Group, form: SFTMean) -> Tensor:
    """The loss above, a scalar, for objectives with such an SFT term; `divides_by` of theirs is SFT's."""
    if form == "prompt_mean":
        return -group.of_targets(group.scores).sum() / group.totals.prompts
    # No target anywhere has a token where they have none in all: 0, not 0 / 0.
    return -group.of_targets(group.sums).sum() / or_one(group.totals.target_tokens)


@dataclass(frozen=True)
class SFTOptions(Objective):
    """Negative log-likelihood of the SFT targets alone; rewards and the other candidates show in the metrics only.

    Attributes:
        form: "prompt_mean" weighs every prompt alike, "token_mean" every token.
    """

    form: SFTMean = "prompt_mean"

    name: ClassVar[str] = "sft"
    divides_by: ClassVar[tuple[str, ...]] = ("prompt_count", "target_token_count")
    metric_names: ClassVar[tuple[str, ...]] = ("target_nll",)

    def __post_init__(self) -> None:
        require("form", self.form, self.form in SFT_MEANS, f"one of {', '.join(SFT_MEANS)}")
        super().__post_init__()

    def terms(self, group: Group) -> Terms:
        sft = target_nll(group, self.form)
        return Terms(torch.zeros_like(sft), sft)

    def active(self, group: Group) -> Tensor:
        return torch.zeros_like(group.kept)

    def report(self, group: Group) -> Mapping[str, Tensor]:
        """target_nll: -s_t, nats a token."""
        return {"target_nll": -group.of_targets(group.scores).sum()}

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """All but the targets."""
        inert = torch.ones(layout.num_candidates, dtype=torch.bool, device=layout.device)
        inert[self.targets(layout, rewards, sft_index)] = False
        return inert

    @property
    def ranks(self) -> bool:
        return False
