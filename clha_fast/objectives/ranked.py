"""An objective at work on one batch: groups of prompts become slopes, and all of them the loss and its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Objective
from clha_fast.objectives.metrics import metric_sums
from clha_fast.types import RankingInputs

# Of tokens, by their names in `types.STATISTICS`.
Statistics = Mapping[str, Tensor] | None

_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView")


class Ranked(Protocol):
    """What turns log-probabilities into slopes; a kernel that is fused for one objective is another one."""

    def rank(self, first: int, last: int, logps: Tensor, statistics: Statistics = None) -> Tensor:
        """dL/dlogp of the tokens of prompts [first, last), whose log-probabilities are given [n].

        `statistics` [n] are those that the objective names. Of one that `reads_entropy`, [2, n]: dL/dlogp, dL/dentropy.
        """

    def finish(self, logps: Tensor, statistics: Statistics = None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [], metrics, scores [C]) of all tokens [N]; a kernel takes what `rank` has left."""


class RankedBatch:
    """`Ranked` in torch, for any objective; float64 inside, on the device of `scored`.

    Reads the sizes on the host: with CPU tensors that costs a GPU nothing.

    Args:
        given: as `functional.linear_loss` takes it. scored: bool [N]. dtype: of the results.
    """

    def __init__(self, objective: Objective, given: RankingInputs, scored: Tensor, dtype: torch.dtype) -> None:
        self.objective, self.dtype = objective, dtype
        self.layout = Layout.of(given.candidate_lengths, given.candidates_per_prompt, scored)
        self.plan = objective.plan(self.layout, given, dtype)

    def rank(self, first: int, last: int, logps: Tensor, statistics: Statistics = None) -> Tensor:
        return slopes(self.objective, Group(self.plan, first, last, logps, statistics))

    @torch.no_grad()
    def finish(self, logps: Tensor, statistics: Statistics = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.evaluate(logps, statistics)

    def evaluate(self, logps: Tensor, statistics: Statistics = None) -> tuple[Tensor, Tensor, Tensor]:
        """`finish` with autograd's own graph from the loss to `logps`, for as many derivatives as anyone wants."""
        group = Group(self.plan, 0, self.layout.num_prompts, logps, statistics)
        terms = self.objective.terms(group)
        with torch.no_grad():
            metrics = metric_sums(self.objective, group, terms)
        return (terms.rank + terms.sft).to(self.dtype), metrics, group.scores.to(self.dtype)


def slopes(objective: Objective, group: Group) -> Tensor:
    """float64 [n], d(rank + sft) / dlogp: the objective's closed form, else autograd's on this group alone.

    [2, n] with d(rank + sft) / dentropy behind it where the objective reads entropies. 0 of autograd's in inference
    mode, in which nothing is recorded and nobody can ask for them.
    """
    found = objective.slopes(group)
    if found is not None:
        return found
    if torch.is_inference_mode_enabled():
        return torch.zeros_like(group.logps.expand(2, -1) if objective.reads_entropy else group.logps)
    with recording():
        leaf = group.logps.detach().requires_grad_()
        leaves, seen = [leaf], dict(group.statistics)
        if objective.reads_entropy:
            leaves.append(group.statistic("entropy").detach().requires_grad_())
            seen["entropy"] = leaves[1]
        recorded = Group(group.plan, group.first, group.last, leaf, seen)
        terms = objective.terms(recorded)
        loss = terms.rank + terms.sft
        if not loss.requires_grad:
            # Prompts may have nothing to rank; but never is a loss without its slopes taken for one.
            assert recorded.sums.requires_grad, "autograd does not record here"
            return torch.zeros_like(leaf if len(leaves) == 1 else torch.stack(leaves))
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return grads[0] if len(grads) == 1 else torch.stack(grads)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd records, also within a custom operator, below which torch takes it to be done.

    `torch.autograd.grad` finds no graph there, and `torch.func.grad` none under `torch.compile`: an operator's body
    runs with autograd's dispatch keys excluded. Hooks of the caller's on saved tensors (checkpointing, offloading) do
    not see this graph, which is gone at the end.
    """
    core: Any = torch._C
    included, excluded = core._dispatch_tls_local_include_set(), core._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:
        excluded = excluded.remove(getattr(core.DispatchKey, name))
    plain: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if core._autograd._saved_tensors_hooks_is_enabled():
        plain = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with core._ForceDispatchKeyGuard(included, excluded), torch.enable_grad(), plain:
        yield
