"""What `test_objective_processes` starts under torch.distributed.run; holds no test.

Each process has prompts of its own, some more than the others, and knows of the others' by the counts of the step
alone. Their losses and gradients, summed, are to be those of one eager loss of the whole step in float64.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from clha_fast import HeadOptions, RankingInputs, linear_loss
from clha_fast.layout import Layout
from clha_fast.objectives import Objective
from clha_fast.types import SIGNALS
from tests.objectives.test_objectives import ROWS, SHAPES
from tests.support.helpers import IGNORE, Case, make_case, random_signals

# The prompts of each process: one has three, with candidates of no token among them, the other one.
SHARES = (slice(0, 3), slice(3, 4))


def share(case: Case, given: RankingInputs, prompts: slice) -> tuple[Case, RankingInputs]:
    """What of a step one process has."""
    sizes, lengths = given.candidates_per_prompt, given.candidate_lengths
    before = int(sizes[: prompts.start].sum())
    candidates = slice(before, before + int(sizes[prompts].sum()))
    start = int(lengths[: candidates.start].sum())
    tokens = slice(start, start + int(lengths[candidates].sum()))
    assert given.rewards is not None
    assert given.sft_index is not None
    assert case.row_index is not None
    signals = {name: value[tokens] for name in SIGNALS if (value := getattr(given, name)) is not None}
    own = RankingInputs(lengths[candidates], sizes[prompts], given.rewards[candidates], given.sft_index[prompts])
    mine = dataclasses.replace(case, targets=case.targets[tokens], row_index=case.row_index[tokens])
    return mine, own._replace(**signals)


def summed(value: Tensor) -> Tensor:
    found = value.detach().clone()
    dist.all_reduce(found)
    return found


def distance(objective: Objective) -> float:
    """How far loss and gradients of all processes are from the eager ones, relative to those."""
    case = make_case(*SHAPES[0], rows=25, rewards=True, sft_index=True, ignored=0.1, dtype=torch.float64, bias=True)
    whole = case.ranking._replace(**random_signals(objective, len(case.targets)))
    mine, own = share(case, whole, SHARES[dist.get_rank()])
    layout = Layout.of(own.candidate_lengths, own.candidates_per_prompt, mine.targets != IGNORE)
    counts = objective.counts(layout, own, max(SHAPES[0][1]) - 1)
    own = own._replace(**{name: summed(counts[name]) for name in objective.divides_by})
    results = []
    for here, given, backend in ((mine, own, "torch"), (case, whole, "reference")):
        leaves = here.leaves()
        loss, _ = linear_loss(
            *(here.hidden, here.weight, here.targets, given, objective),
            bias=here.bias,
            row_index=here.row_index,
            head=HeadOptions(workspace_bytes=9 * 64 * 8),
            backend=backend,
        )
        grads = torch.autograd.grad(loss, leaves)
        parts = [loss.detach(), *grads]
        results.append([summed(part) if here is mine else part for part in parts])
    found, wanted = (torch.cat([part.flatten() for part in parts]) for parts in results)
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-9))


def main(out: str) -> None:
    dist.init_process_group("gloo")
    found = [distance(objective) for objective in ROWS]
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert int(os.environ["WORLD_SIZE"]) == len(SHARES)
    main(sys.argv[1])
