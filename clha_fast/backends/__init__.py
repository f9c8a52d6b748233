"""How log-probabilities and gradients are made, and what a backend is. Modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor

from clha_fast.objectives import Objective
from clha_fast.options import HeadOptions
from clha_fast.types import (
    EntropySlopes,
    Gradients,
    HeadInputs,
    HeadResult,
    LossResult,
    Needs,
    RankingInputs,
    StatisticsResult,
    SweptGradients,
)

MODULES = {
    "torch": "clha_fast.backends.torch.backend",
    "triton": "clha_fast.backends.triton.backend",
    "workspace": "clha_fast.backends.triton.workspace",
}
# Loss and gradients in one sweep: what they return beside the loss are finished gradients.
SWEEPING = ("torch", "workspace")
# Backends that take `HeadOptions.max_dropped_mass`.
ROUTING = ("torch", "triton")


class HeadBackend(Protocol):
    """A module with these functions; inputs come checked and cast, all tensors on one device, without a graph.

    A token with a zero gradient is skipped, so that an inert candidate's NaN goes nowhere. Sums into repeated rows run
    in a fixed order (`layout.accumulate`), for two runs are bitwise equal. `head.workspace_bytes` bounds the logits. On
    a GPU a target out of range makes its token NaN, without a wait. `objectives.ranked.RankedBatch` makes slopes, loss
    and metrics of log-probabilities.
    """

    def token_logps_forward(self, inputs: HeadInputs, head: HeadOptions) -> HeadResult:
        """Log-probabilities of `reference.token_logps`, without [N, V] logits."""

    def token_logps_backward(
        self, grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
    ) -> Gradients:
        """Gradients of sum_t grad_logps_t * logp_t, in the inputs' dtypes; None where not needed."""

    def statistics_forward(self, inputs: HeadInputs, head: HeadOptions, names: tuple[str, ...]) -> StatisticsResult:
        """`token_logps_forward` and, from the same pass, those of `types.STATISTICS` that are named; nothing routed."""

    def statistics_backward(
        self,
        grad_logps: Tensor,
        slopes: EntropySlopes,
        inputs: HeadInputs,
        lse: Tensor,
        head: HeadOptions,
        needs: Needs,
    ) -> Gradients:
        """`token_logps_backward` of sum_t grad_logps_t * logp_t + slopes.grad_t * entropy_t; lse is the float64 one."""

    def loss_forward(
        self, inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective
    ) -> LossResult:
        """The loss, and dL/dlogp for a backward by `token_logps_backward`."""


class SweepingBackend(HeadBackend, Protocol):
    """A backend of `SWEEPING`, which has the logits of whole prompts at hand when their slopes are known."""

    def loss_sweep(
        self, inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective, needs: Needs
    ) -> tuple[LossResult, SweptGradients]:
        """`loss_forward` and the gradients; float32 or wider, for the upstream gradient is still to come.

        A weight's gradient may be left as its `Factors`: the backend then has `weight_gradient`, and `scaled`, which
        multiplies the upstream gradient into the others and rounds them in one pass.
        """


def load(name: str) -> HeadBackend:
    """The backend called `name`, a key of `MODULES`."""
    return cast(HeadBackend, importlib.import_module(MODULES[name]))
