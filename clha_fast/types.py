"""What travels between the custom operators and the backends: one tuple for a head, one for a ranking, one a result.

Shapes are those of `functional.token_logps` and `functional.linear_clha_loss`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadInputs(NamedTuple):
    """hidden [M, H], weight [V, H], bias [V] or None, targets [N] int64, row_index [N] int64 or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    row_index: Tensor | None


class RankingInputs(NamedTuple):
    """candidate_lengths [C], candidates_per_prompt [P], and where given rewards [C], sft_index [P], counts."""

    candidate_lengths: Tensor
    candidates_per_prompt: Tensor
    rewards: Tensor | None = None
    sft_index: Tensor | None = None
    pair_counts: Tensor | None = None
    prompt_count: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted; nothing is computed or allocated for the others."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """dhidden [M, H], dweight [V, H], dbias [V]; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class HeadResult(NamedTuple):
    """logps [N], lse [N], and `route`: what a routed backward needs of the forward, of size 0 where that is nothing."""

    logps: Tensor
    lse: Tensor
    route: Tensor


class LossResult(NamedTuple):
    """loss [], metrics [19], scores [C], coefficients dL/dS [C], lse [N], and `route` as in `HeadResult`."""

    loss: Tensor
    metrics: Tensor
    scores: Tensor
    coefficients: Tensor
    lse: Tensor
    route: Tensor
