"""Time and peak memory of the loss on a CPU, every method interleaved in one run.

    python -m benchmarks.cpu [--workload NAME ...] [--method NAME ...] [--rounds 5] [--scaling]
                             [--output benchmarks/results/cpu.json]

Every method's loss and gradients are compared with eager's first; a method that is wrong is not timed, and says so.
Peers are optional: `trl`, `cut_cross_entropy` and a C++ compiler are used where they are found. Times are medians over
the rounds of one interleaved loop, and ratios are medians of the rounds' own ratios: absolute times on a shared machine
say little. Memory is the resident high-water mark above the inputs, one fresh process a method. `--scaling` adds time
and memory over the number of tokens and of candidates, the routed path over its kept share, and 65,536 tokens at once.
`--output` is written anew, with a CSV beside it, after every workload: an interrupted run keeps what it measured.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_methods import METHODS, Step, bare_gemms, check, routed, routed_metrics, training_step, why_not
from benchmarks.workloads import WORKLOADS, Batch, Workload, find, make_batch, softmax_entropy

BOUND = "bare_gemms"
# Where the softmax is peaked, only what depends on it is worth the time.
PEAKED = ("eager", "clha_fast_torch", "clha_fast_routed")
TOKENS = (1024, 2048, 4096, 8192, 16384)
CANDIDATES = (2, 4, 8, 16)
DROPPED_MASSES = (0.0, 1e-3, 1e-2, 1e-1, 0.5)
Row = dict[str, Any]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "trl", "cut-cross-entropy", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


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
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def interleaved(batch: Batch, steps: dict[str, Step], rounds: int, bases: tuple[str, ...]) -> dict[str, Row]:
    """Median seconds of every step, and medians of each round's ratio to the steps in `bases`."""
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
        for base in bases:
            row[f"over_{base}"] = statistics.median(a / b for a, b in zip(own, times[base], strict=True))
        result[name] = row
    return result


def measure_memory(workload: str, method: str) -> int:
    command = [sys.executable, "-m", "benchmarks.peak", workload, method]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def accepted(workload: Workload, methods: list[str]) -> tuple[list[str], dict[str, Row]]:
    """(methods to time, rows that say why the others are not)."""
    usable, rows = [], {}
    for method in methods:
        reason = why_not(method)
        if reason is None:
            try:
                check(method, workload)
            except (RuntimeError, ImportError, TypeError, ValueError, NotImplementedError) as error:
                if method in PEAKED:
                    raise
                reason = f"refused: {str(error).splitlines()[0]}"
        if reason is None:
            usable.append(method)
        else:
            rows[method] = {"status": reason}
    return usable, rows


def measure(workload: Workload, methods: list[str], rounds: int) -> dict[str, Any]:
    """Everything about one workload."""
    print(f"{workload.name}: checking results, then {rounds} rounds", file=sys.stderr, flush=True)
    usable, others = accepted(workload, methods)
    batch = make_batch(workload)
    entropy = softmax_entropy(batch)
    steps = {method: training_step(method, batch) for method in usable}
    steps[BOUND] = bare_gemms(batch)
    rows = interleaved(batch, steps, rounds, ("eager", BOUND))
    if "clha_fast_routed" in rows:
        rows["clha_fast_routed"] |= routed_metrics(batch)
    gradient_bytes, tokens = batch.gradient_bytes(), batch.targets.numel()
    del batch, steps
    gc.collect()
    for method in usable:
        rows[method]["peak_bytes"] = measure_memory(workload.name, method)
    return {
        "shape": workload.describe(),
        "rounds": rounds,
        "scored_tokens": tokens,
        "softmax_entropy": entropy,
        "gradient_bytes": gradient_bytes,
        "methods": rows | others,
    }


def over_sizes(names: list[str], rounds: int) -> list[Row]:
    """Time over the bare products and memory of the exact path, for one workload after another."""
    rows = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        batch = make_batch(find(name))
        steps = {"clha_fast_torch": training_step("clha_fast_torch", batch), BOUND: bare_gemms(batch)}
        row = interleaved(batch, steps, rounds, (BOUND,))["clha_fast_torch"]
        row |= {"tokens": batch.targets.numel(), "candidates": batch.workload.candidates}
        row |= {"gradient_bytes": batch.gradient_bytes()}
        del batch, steps
        gc.collect()
        row["peak_bytes"] = measure_memory(name, "clha_fast_torch")
        rows.append(row)
    return rows


def over_kept_share(workload: Workload, rounds: int) -> dict[str, Any]:
    """The routed path's time and errors for several dropped masses."""
    print(f"{workload.name}: over the kept share", file=sys.stderr, flush=True)
    batch = make_batch(workload)
    steps = {"clha_fast_torch": training_step("clha_fast_torch", batch), BOUND: bare_gemms(batch)}
    for mass in DROPPED_MASSES:
        steps[f"{mass:g}"] = training_step(routed(mass), batch)
    rows = interleaved(batch, steps, rounds, (BOUND,))
    for mass in DROPPED_MASSES:
        rows[f"{mass:g}"] |= routed_metrics(batch, mass)
    return {"softmax_entropy": softmax_entropy(batch), "rows": rows}


def scaling(rounds: int, origin: Row, save: Callable[[Row], None]) -> Row:
    """Time and memory over sizes and over the kept share; `save` gets what there is after every part."""
    found: Row = {"rounds": rounds, "environment": origin}

    def add(part: str, rows: Any) -> None:
        found[part] = rows
        save(found)

    add("tokens", over_sizes([f"tokens-{n}" for n in TOKENS], rounds))
    add("candidates", over_sizes([f"candidates-{n}" for n in CANDIDATES], rounds))
    add("long", over_sizes(["tokens-65536"], 1))
    add("kept_share", {w.name: over_kept_share(w, rounds) for w in WORKLOADS.values() if w.peaked})
    return found


COLUMNS = (
    *("workload", "scored_tokens", "softmax_entropy", "method", "seconds", "spread", "over_eager", f"over_{BOUND}"),
    *("peak_bytes", "gradient_bytes", "kept_block_share", "dropped_mass", "dhidden_error", "dweight_error", "status"),
)


def save(report: dict[str, Any], path: Path) -> None:
    """The report as JSON and its workloads as CSV, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, path)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for name, workload in report["workloads"].items():
            for method, row in workload["methods"].items():
                writer.writerow(workload | {"workload": name, "method": method} | row)


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['shape']}; gradients {report['gradient_bytes'] / 1e6:.0f} MB; "
        f"softmax entropy {report['softmax_entropy']:.2f} nats",
        "",
        "| method | time over eager | time over three bare GEMMs | median | peak memory above inputs |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["methods"].items():
        if "status" in row:
            lines.append(f"| {name} | {row['status']} | | | |")
            continue
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else "-"
        cells = (f"{row['over_eager']:.2f} x", f"{row[f'over_{BOUND}']:.2f} x", f"{row['seconds']:.2f} s", memory)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        help="beside eager and the bare products, which always run",
    )
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--scaling", action="store_true", help="also over tokens, candidates and the kept share")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["eager", *args.method]))
    report: dict[str, Any] = {"environment": environment(), "workloads": {}}
    print(json.dumps(report["environment"]))

    def keep(part: dict[str, Any]) -> None:
        report.update(part)
        if args.output:
            save(report, args.output)

    for workload in (WORKLOADS[name] for name in args.workload):
        chosen = [m for m in methods if m in PEAKED] if workload.peaked else [m for m in methods if "routed" not in m]
        found = measure(workload, chosen, args.rounds)
        keep({"workloads": report["workloads"] | {workload.name: found}})
        print("\n" + table(found) + "\n", flush=True)
    if args.scaling:
        found = scaling(min(args.rounds, 3), report["environment"], lambda part: keep({"scaling": part}))
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
