"""How log-probabilities and gradients are made, and what a backend is. Modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor

from clha_fast.objectives import Objective
from clha_fast.options import HeadOptions
from clha_fast.types import Gradients, HeadInputs, HeadResult, LossResult, Needs, RankingInputs

MODULES = {
    "torch": "clha_fast.backends.torch.backend",
    "triton": "clha_fast.backends.triton.backend",
    "workspace": "clha_fast.backends.triton.workspace",
}
# Loss and gradients in one sweep: what they return beside the loss are finished gradients.
SWEEPING = ("torch", "workspace")
# Backends that take `HeadOptions.max_dropped_mass`.
ROUTING = ("torch", "triton")


class Backend(Protocol):
    """A module with these functions; all tensors on one device, inputs checked, no graph."""

    def token_logps_forward(self, inputs: HeadInputs, head: HeadOptions) -> HeadResult:
        """Log-probabilities of `reference.token_logps`, without [N, V] logits."""

    def token_logps_backward(
        self, grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
    ) -> Gradients:
        """Gradients of sum_t grad_logps_t * logp_t, in the inputs' dtypes; None where not needed."""

    def loss_forward(
        self, inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective
    ) -> LossResult:
        """The loss, and dL/dlogp for a backward by `token_logps_backward`."""


class SweepingBackend(Backend, Protocol):
    """A backend of `SWEEPING`, which has the logits of whole prompts at hand when their slopes are known."""

    def loss_sweep(
        self, inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective, needs: Needs
    ) -> tuple[LossResult, Gradients]:
        """`loss_forward` and the gradients; float32 or wider, for the upstream gradient is still to come."""


def load(name: str) -> Backend:
    """The backend called `name`, a key of `MODULES`."""
    return cast(Backend, importlib.import_module(MODULES[name]))
