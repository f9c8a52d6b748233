"""The CLHA loss of token log-probabilities that are there already, wherever they came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clha_fast.objectives.clha import Plan, Ranking, make_plan
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.ops import checks
from clha_fast.options import PUBLISHED, CLHAOptions, HeadOptions
from clha_fast.types import RankingInputs


class _Rank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor, plan: Plan, options: CLHAOptions) -> tuple[Tensor, Tensor, Tensor]:
        ranking, last = Ranking(plan, options), len(plan.candidate_offsets) - 1
        ranking.rank(0, last, logps)
        ctx.save_for_backward(ranking.token_coefficients(0, last).to(logps.dtype))
        loss, metrics, scores = ranking.finish(logps.dtype)
        ctx.mark_non_differentiable(metrics, scores)
        return loss, metrics, scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (coefficients,) = ctx.saved_tensors
        return coefficients * grads[0], None, None


def clha_loss(
    logps: Tensor,
    targets: Tensor,
    ranking: RankingInputs,
    *,
    ignore_index: int = -100,
    options: CLHAOptions = PUBLISHED,
) -> tuple[Tensor, CLHAMetrics]:
    """The ranking half of `functional.linear_clha_loss` (Fang et al. 2024, Eq. 3-6).

    Replaces, for callers with log-probabilities of their own::

        s = torch.stack([part.mean() for part in logps.split(lengths)])       # Eq. 3
        ...                                                                   # as in `functional.linear_clha_loss`

    Args:
        logps: [N] nats, float32 or float64, packed candidate after candidate. targets: [N] int64, of which only
            `ignore_index` is read. ranking: lengths, counts and rewards, as in `functional.linear_clha_loss`.

    Returns:
        (loss, metrics); the loss has a gradient for `logps`, and no second one. `candidate_lengths` and
        `candidates_per_prompt` are read on the host.

    Raises:
        ValueError: as `functional.linear_clha_loss`.
    """
    checks.ranking_inputs(ranking)
    checks.ranking_values(targets.shape[0], ranking)
    plan = make_plan(targets, ranking, HeadOptions(ignore_index=ignore_index), options, logps.dtype)
    loss, values, scores = _Rank.apply(logps, plan, options)
    return loss, CLHAMetrics(values, scores)
