"""Time of every objective beside CLHA's on the same batch: what the seam between objective and head costs, on a CPU.

    python -m benchmarks.objectives [--workload small-vocabulary] [--rounds 7]

All objectives are interleaved in one run, CLHA twice: the second row's ratio is what noise alone makes of 1. Loss and
gradients of every objective are compared with the reference's first, and one that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from typing import Any

import torch

from benchmarks.inputs import WORKLOADS, Batch, Workload, shrink, workload_batch
from benchmarks.measure import Clock, Deadline, Step, cpu_environment, interleaved
from clha_fast import CLHAOptions, Objective, PROOptions, RankingInputs, SFTOptions, linear_loss

OBJECTIVES: dict[str, Objective] = {
    "clha": CLHAOptions(),
    "clha, again": CLHAOptions(),
    "pro, published": PROOptions(),
    "pro, paper": PROOptions(form="paper"),
    "sft, prompt_mean": SFTOptions(),
    "sft, token_mean": SFTOptions(form="token_mean"),
}


def step(batch: Batch, objective: Objective, backend: str = "torch") -> Step:
    """Forward and backward of a loss, its gradients left in the batch."""
    given = RankingInputs(batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards)

    def run() -> torch.Tensor:
        batch.clear()
        arguments = (batch.hidden, batch.weight, batch.targets, given, objective)
        loss = linear_loss(*arguments, row_index=batch.row_index, backend=backend)[0]
        loss.backward()
        return loss.detach()

    return run


def check(workload: Workload, objective: Objective) -> float:
    """The largest error (norm over norm) of loss and gradients on a small workload, against the reference."""
    batch = workload_batch(shrink(workload, 8))
    found = [step(batch, objective)(), *batch.gradients()]
    wanted = [step(batch, objective, "reference")(), *batch.gradients()]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="small-vocabulary")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    print(json.dumps(cpu_environment()))
    for name, objective in OBJECTIVES.items():
        error = check(workload, objective)
        if not error < 1e-5:
            raise SystemExit(f"{name}: off by {error:.1e} from the reference, not timed")
    batch = workload_batch(workload)
    steps = {name: step(batch, objective) for name, objective in OBJECTIVES.items()}

    def before() -> None:
        batch.clear()
        gc.collect()

    deadline = Deadline(math.inf)
    rows: dict[str, Any] = interleaved(
        steps, Clock("cpu"), args.rounds, deadline, ("clha",), before=before, failures=(), progress=True
    )
    for name, row in rows.items():
        print(f"{name:18}", {key: value for key, value in row.items() if key != "rounds"})


if __name__ == "__main__":
    main()
