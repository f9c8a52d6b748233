"""Time and peak memory of the loss on a CPU, every method interleaved in one run.

    python -m benchmarks.cpu [--workload NAME ...] [--rounds 5] [--output benchmarks/results/cpu.json]

Every method's loss and gradients are compared with eager's first; a method that is wrong is not timed. Times are
medians over the rounds of one interleaved loop, and ratios are medians of the rounds' own ratios: absolute times on a
shared machine say little. Memory is the resident high-water mark above the inputs, one fresh process a method.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import METHODS, WORKLOADS, Workload, bare_gemms, check, make_batch, training_step

BOUND = "bare_gemms"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "commit": _commit(),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def measure_times(workload: Workload, methods: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, and medians of each round's ratio to eager and to the bare GEMMs."""
    batch = make_batch(workload)
    steps = {method: training_step(method, batch) for method in methods}
    steps[BOUND] = bare_gemms(batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(rounds + 1):
        for name, step in steps.items():
            batch.clear()
            gc.collect()
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if round_index:  # the first round warms up
                times[name].append(elapsed)
        print(f"  round {round_index}/{rounds}", file=sys.stderr, flush=True)
    result = {}
    for name, own in times.items():
        row = {"seconds": statistics.median(own), "spread": (max(own) - min(own)) / statistics.median(own)}
        for base in ("eager", BOUND):
            row[f"over_{base}"] = statistics.median(a / b for a, b in zip(own, times[base], strict=True))
        result[name] = row
    return result


def measure_memory(workload: Workload, method: str) -> int:
    command = [sys.executable, "-m", "benchmarks.peak", workload.name, method]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(workload: Workload, rows: dict[str, dict[str, float]], gradient_bytes: int) -> str:
    lines = [
        workload.describe() + f"; gradients {gradient_bytes / 1e6:.0f} MB",
        "",
        "| method | time over eager | time over three bare GEMMs | median | peak memory above inputs |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else "-"
        cells = (f"{row['over_eager']:.2f} x", f"{row[f'over_{BOUND}']:.2f} x", f"{row['seconds']:.2f} s", memory)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["eager", *args.method]))
    report: dict[str, Any] = {"environment": environment(), "workloads": {}}
    print(json.dumps(report["environment"]))
    for workload in (WORKLOADS[name] for name in args.workload):
        print(f"{workload.name}: checking results, then {args.rounds} rounds", file=sys.stderr, flush=True)
        for method in methods:
            check(method, workload)
        rows = measure_times(workload, methods, args.rounds)
        for method in methods:
            rows[method]["peak_bytes"] = measure_memory(workload, method)
        gradient_bytes = make_batch(workload).gradient_bytes()
        report["workloads"][workload.name] = {
            "shape": workload.describe(),
            "gradient_bytes": gradient_bytes,
            "methods": rows,
        }
        print("\n" + table(workload, rows, gradient_bytes) + "\n", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
