"""Metrics of the loss, added up between two lines of a trainer's log."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import CLHAMetrics, metric_names


class RunningMetrics:
    """Metrics of one objective added up over calls, and over processes when read.

    Args:
        summed: the calls' losses are parts of one, divided by the counts of all, and add up; else a mean.
    """

    def __init__(self, objective: Objective, summed: bool = False) -> None:
        self.objective, self.summed = objective, summed
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.total: CLHAMetrics | None = None
        self.inert = 0
        self.steps = 0.0

    def add(self, metrics: CLHAMetrics, inert: int, loss_scale: float = 1.0, of: int = 1) -> None:
        """One call's metrics; `loss_scale` is what its loss was multiplied by, `of` the calls of its optimiser step."""
        values = metrics.values.detach().clone()
        # rank_loss and sft_loss as the loss itself, which is logged as a mean over steps: not all have as many calls.
        values[:2] *= loss_scale / of
        plain = CLHAMetrics(values, metrics.scores[:0], names=metrics.names)
        self.total = plain if self.total is None else CLHAMetrics.merge([self.total, plain])
        self.inert += inert
        self.steps += 1 / of

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float] | None:
        """The metrics' dictionary with `inert_candidates`, None if no process had a call; an empty accumulator again.

        Args:
            reduce: sums a tensor over the processes; every process must call.
        """
        total, inert, steps = self.total, self.inert, self.steps
        self.reset()
        names = metric_names(self.objective)
        values = (
            torch.zeros(len(names), dtype=torch.float32, device=device) if total is None else total.values.to(device)
        )
        counts = torch.tensor([inert, steps], dtype=torch.float64, device=device)
        values, counts = reduce(values), reduce(counts)
        inert, steps = int(counts[0]), float(counts[1])
        if not steps:
            return None
        found = CLHAMetrics(values, values[:0], 1 if self.summed else steps, self.objective.metric_names)
        return {**found.as_dict(), "inert_candidates": float(inert)}
