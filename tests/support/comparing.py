"""An objective that compares with a frozen model, two candidates or more; and the table of objectives with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast import Objective, RankingInputs, reference
from clha_fast.objectives import OBJECTIVES, Group, Terms
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.options import HeadOptions


@dataclass(frozen=True)
class Comparing(Objective):
    """DPO of all pairs: mean over prompts of the sum of -log sigmoid(x_i - x_j), x = beta (S - S_ref)."""

    beta: float = 0.1
    must: bool = True

    name: ClassVar[str] = "comparing"
    reads: ClassVar[tuple[str, ...]] = ("reference_logps",)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference_logps",) if self.must else ()

    def terms(self, group: Group) -> Terms:
        given = group.plan.given.reference_logps
        sums = torch.zeros_like(group.sums)
        if given is not None and given.shape[0] == group.plan.layout.num_candidates != len(group.plan.layout.owner):
            sums = given[group.candidates].to(group.sums)
        elif given is not None:
            sums = sums.index_add(0, group.owner, given[group.tokens].to(sums))
        x = self.beta * (group.sums - sums)
        each = torch.where(group.kept, -F.logsigmoid(x[group.i] - x[group.j]), 0.0)
        rank = each.sum() / group.totals.prompts
        return Terms(rank, torch.zeros_like(rank))


def comparing_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: Comparing
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain loops, without metrics."""
    own = [part.sum() for part in logps.split(given.candidate_lengths.tolist())]
    assert given.reference_logps is not None
    frozen = given.reference_logps
    if len(frozen) == len(logps):
        frozen = torch.stack([part.sum() for part in frozen.split(given.candidate_lengths.tolist())])
    loss, start = logps.sum() * 0, 0
    sizes = given.candidates_per_prompt.tolist()
    for size in sizes:
        for i in range(start, start + size):
            for j in range(i + 1, start + size):
                lead = (own[i] - frozen[i]) - (own[j] - frozen[j])
                loss = loss + torch.log1p(torch.exp(-options.beta * lead)) / len(sizes)
        start += size
    return loss, torch.zeros(len(METRIC_NAMES)), torch.stack(own)


@pytest.fixture
def comparing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class, in the table as `comparing`."""
    monkeypatch.setitem(OBJECTIVES, "comparing", Comparing)
    monkeypatch.setitem(reference.LOSSES, "comparing", comparing_loss)
    return Comparing
