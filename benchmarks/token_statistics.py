"""Time of token statistics beside log-probabilities alone, on a CPU: forward, and forward with backward.

    python -m benchmarks.token_statistics [--workload small-vocabulary] [--hidden 256] [--rounds 7] [--cpu-time]

All are interleaved in one run, log-probabilities twice: the second row's ratio is what noise alone makes of 1. What is
printed are medians and quartiles of the ratios within each round.
Predicted for H = 1024: an entropy costs about seven more passes over a logit in cache, 2 ns beside four matrix products
of 40 ns each, so 1.01 to 1.03 times the time. Values and gradients are compared with the reference's first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks.inputs import WORKLOADS, Batch, find, shrink, workload_batch
from benchmarks.measure import Step, cpu_environment
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
    f"{FORWARD}, again": ((), False),
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


def rounds_of(steps: dict[str, Step], rounds: int, clock: Callable[[], float], batch: Batch) -> dict[str, list[float]]:
    """Seconds of each, a round after the other; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, run in steps.items():
            batch.clear()
            gc.collect()
            start = clock()
            run()
            if index:
                times[name].append(clock() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="small-vocabulary", help=f"{', '.join(WORKLOADS)}, or tokens-N")
    parser.add_argument("--hidden", type=int, help="hidden size, in the workload's place")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, on a machine that others use too")
    args = parser.parse_args()
    workload = find(args.workload)
    if args.hidden is not None:
        workload = dataclasses.replace(workload, hidden_size=args.hidden)
    print(json.dumps({"options": vars(args), **cpu_environment()}))
    small = workload_batch(shrink(workload, 8))
    found = [step(small, STATISTICS, True)(), *small.gradients()]
    wanted = [step(small, STATISTICS, True, "reference")(), *small.gradients()]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    if not error < 1e-5:
        raise SystemExit(f"off by {error:.1e} from the reference, not timed")
    batch = workload_batch(workload)
    steps = {name: step(batch, *case) for name, case in CASES.items()}
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = rounds_of(steps, args.rounds, clock, batch)
    print(f"H {workload.hidden_size}, V {workload.vocabulary}, {batch.targets.numel()} tokens, {args.rounds} rounds")
    print("| | over log-probabilities alone | quartiles | seconds |\n|---|---|---|---|")
    for name, own in times.items():
        base = times[BASE if CASES[name][1] else FORWARD]
        low, middle, high = quantiles([a / b for a, b in zip(own, base, strict=True)], n=4, method="inclusive")
        print(f"| {name} | {middle:.3f} x | {low:.3f}, {high:.3f} | {median(own):.2f} |")


if __name__ == "__main__":
    main()
