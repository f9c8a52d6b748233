"""Time of token statistics beside log-probabilities alone, on a CPU: forward, and forward with backward.

    python -m benchmarks.token_statistics [--workload small-vocabulary] [--rounds 7]

All are interleaved in one run, log-probabilities twice: the second row's ratio is what noise alone makes of 1.
Predicted for H = 1024: an entropy costs about seven more passes over a logit in cache, 2 ns beside four matrix products
of 40 ns each, so 1.01 to 1.03 times the time. Values and gradients are compared with the reference's first.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import WORKLOADS, Batch, find, shrink, workload_batch
from benchmarks.measure import Clock, Deadline, Step, cpu_environment, interleaved
from clha_fast import token_logps
from clha_fast.types import STATISTICS

BASE = "logps, forward and backward"
FORWARD = "logps, forward"
CASES: dict[str, tuple[tuple[str, ...], bool]] = {
    BASE: ((), True),
    f"{BASE}, again": ((), True),
    "and entropy, forward and backward": (("entropy",), True),
    "and all four, forward and backward": (STATISTICS, True),
    FORWARD: ((), False),
    "and entropy, forward": (("entropy",), False),
    "and all four, forward": (STATISTICS, False),
}


def step(batch: Batch, names: tuple[str, ...], backward: bool, backend: str = "torch") -> Step:
    """Log-probabilities, and with an entropy its mean in the loss; gradients are left in the batch."""

    def run() -> Tensor:
        batch.clear()
        with torch.set_grad_enabled(backward):
            logps, values = token_logps(
                batch.hidden,
                batch.weight,
                batch.targets,
                row_index=batch.row_index,
                backend=backend,
                statistics=names,
            )
            loss = logps.mean()
            if "entropy" in values:
                loss = loss + 0.1 * values["entropy"].mean()
        if backward:
            loss.backward()
        return loss.detach()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="small-vocabulary", help=f"{', '.join(WORKLOADS)}, or tokens-N")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    workload = find(args.workload)
    print(json.dumps(cpu_environment()))
    small = workload_batch(shrink(workload, 8))
    found = [step(small, STATISTICS, True)(), *small.gradients()]
    wanted = [step(small, STATISTICS, True, "reference")(), *small.gradients()]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    if not error < 1e-5:
        raise SystemExit(f"off by {error:.1e} from the reference, not timed")
    batch = workload_batch(workload)
    steps = {name: step(batch, *case) for name, case in CASES.items()}

    def before() -> None:
        batch.clear()
        gc.collect()

    deadline = Deadline(math.inf)
    rows: dict[str, Any] = interleaved(
        steps, Clock("cpu"), args.rounds, deadline, (BASE, FORWARD), before=before, failures=(), progress=True
    )
    for name, row in rows.items():
        ratios = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "rounds")
        print(f"{name:38} {ratios}")


if __name__ == "__main__":
    main()
