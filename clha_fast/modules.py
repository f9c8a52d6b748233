"""Losses as modules: settings fixed once, tensors at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clha_fast.functional import linear_clha_loss, linear_loss
from clha_fast.objectives import Group, Objective, as_objective
from clha_fast.objectives.additive import check_adds_up
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.ops import checks
from clha_fast.ops.dispatch import Backend, check_name
from clha_fast.options import HeadOptions
from clha_fast.types import RankingInputs, VocabShard


class CLHALoss(nn.Module):
    """`functional.linear_clha_loss` with its settings bound; it has no parameters.

    Args:
        options: what is done with log-probabilities; `CLHAOptions.preset("published")` by default.
        head: how log-probabilities come from hidden states.
        backend: "auto", "triton", "workspace", "torch" or "reference".

    Raises:
        ValueError: `options` is not a `CLHAOptions`, or `head` not a `HeadOptions`.

    Example::

        criterion = CLHALoss(CLHAOptions.preset("paper"))
        loss, metrics = criterion(hidden, lm_head.weight, targets, candidate_lengths, candidates_per_prompt,
                                  rewards=rewards)
        loss.backward()
    """

    def __init__(
        self,
        options: CLHAOptions = PUBLISHED,
        head: HeadOptions | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.options = options
        self.head = HeadOptions() if head is None else head
        self.backend: Backend = backend
        checks.settings(self.head, self.options)
        check_name(backend)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        candidate_lengths: Tensor,
        candidates_per_prompt: Tensor,
        **tensors: Tensor | None,
    ) -> tuple[Tensor, CLHAMetrics]:
        """Arguments and result of `linear_clha_loss`; `tensors` are its optional ones (rewards, row_index, ...)."""
        return linear_clha_loss(
            hidden,
            weight,
            targets,
            candidate_lengths,
            candidates_per_prompt,
            head=self.head,
            options=self.options,
            backend=self.backend,
            **tensors,
        )

    def extra_repr(self) -> str:
        return f"options={self.options}, head={self.head}, backend={self.backend!r}"


class LinearLoss(nn.Module):
    """`functional.linear_loss` with its settings bound; it has no parameters.

    Args:
        objective: one of `clha_fast.objectives.OBJECTIVES`, an `Objective` of your own or a function of a `Group`.
        head: how log-probabilities come from hidden states.
        backend: "auto", "triton", "workspace", "torch" or "reference".

    Raises:
        ValueError: `objective` is none, or does not add up over prompts; `head` is not a `HeadOptions`.

    Example::

        criterion = LinearLoss(PROOptions(form="paper"))
        loss, metrics = criterion(hidden, lm_head.weight, targets, RankingInputs(lengths, sizes, rewards=rewards))
        loss.backward()
    """

    def __init__(
        self,
        objective: Objective | Callable[[Group], Tensor],
        head: HeadOptions | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.objective = check_adds_up(as_objective(objective))
        self.head = HeadOptions() if head is None else head
        self.backend: Backend = backend
        checks.settings(self.head)
        check_name(backend)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        given: RankingInputs,
        *,
        bias: Tensor | None = None,
        row_index: Tensor | None = None,
        shard: VocabShard | None = None,
    ) -> tuple[Tensor, CLHAMetrics]:
        """Arguments and result of `linear_loss`."""
        tensors: dict[str, Any] = {"bias": bias, "row_index": row_index, "shard": shard}
        return linear_loss(
            hidden, weight, targets, given, self.objective, head=self.head, backend=self.backend, **tensors
        )

    def extra_repr(self) -> str:
        return f"objective={self.objective}, head={self.head}, backend={self.backend!r}"
