"""Time and peak memory of the loss on a CPU, every method interleaved in one run.

    python -m benchmarks.cpu [--workload NAME ...] [--method NAME ...] [--rounds 5] [--scaling]
                             [--clock wall|cpu] [--output benchmarks/results]

Every method's loss and gradients are compared with eager's first; a method that is wrong is not timed, and says so.
Peers are optional: `trl`, `cut_cross_entropy` and a C++ compiler are used where they are found. Times are medians over
the rounds of one interleaved loop, and ratios are medians of the rounds' own ratios: absolute times on a shared machine
say little. Memory is the resident high-water mark above the inputs, one fresh process a method. `--scaling` adds time
and memory over the number of tokens and of candidates, the routed path over its kept share, and 65,536 tokens at once.
`--output` is written anew, with a CSV beside it, after every workload: an interrupted run keeps what it measured. In a
folder each kind of CPU has a file of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.correct import check
from benchmarks.inputs import WORKLOADS, Batch, Workload, find, softmax_entropy, workload_batch
from benchmarks.measure import Clock, Deadline, Step, cpu_environment, cpu_kind, interleaved
from benchmarks.memory import Job, in_a_fresh_process
from benchmarks.methods import CPU_BOUND, CPU_METHODS, DROPPED, clha_arguments, routed, why_not
from benchmarks.report import save, workload_table
from clha_fast import HeadOptions, linear_clha_loss

# Where the softmax is peaked, only what depends on it is worth the time.
PEAKED = ("eager", "clha_fast_torch", "clha_fast_routed")
TOKENS = (1024, 2048, 4096, 8192, 16384)
CANDIDATES = (2, 4, 8, 16)
DROPPED_MASSES = (0.0, 1e-3, 1e-2, 1e-1, 0.5)
Row = dict[str, Any]


CLOCKS = {"wall": False, "cpu": True}
clock = Clock("cpu")


def timed(batch: Batch, steps: dict[str, Step], rounds: int, bases: tuple[str, ...]) -> dict[str, Row]:
    """Median seconds of every step, and medians of each round's ratio to the steps in `bases`; a failure is raised."""

    def before() -> None:
        batch.clear()
        gc.collect()

    rows = interleaved(steps, clock, rounds, Deadline(math.inf), bases, before=before, failures=(), progress=True)
    return {name: {key: value for key, value in row.items() if key != "rounds"} for name, row in rows.items()}


def measure_memory(workload: Workload, method: str) -> int:
    (found,) = in_a_fresh_process([Job(method, workload)], "cpu")
    if "failed" in found:
        raise RuntimeError(f"{method} on {workload.name}: {found['failed']}")
    return int(found["peak_bytes"])


def routed_metrics(batch: Batch, dropped_mass: float = DROPPED) -> Row:
    """Kept share, dropped mass and the gradients' errors (norm over norm) against the exact path's."""
    batch.clear()
    CPU_METHODS["clha_fast_torch"].build(batch)()
    exact = batch.gradients()
    batch.clear()
    head = HeadOptions(max_dropped_mass=dropped_mass)
    loss, metrics = linear_clha_loss(**clha_arguments(batch, "torch", head))
    loss.backward()
    hidden, weight = (
        float((got - want).norm() / want.norm()) for got, want in zip(batch.gradients(), exact, strict=True)
    )
    return {
        "max_dropped_mass": dropped_mass,
        "kept_block_share": float(metrics.kept_block_share),
        "dropped_mass": float(metrics.dropped_mass),
        "dhidden_error": hidden,
        "dweight_error": weight,
    }


def entropy(batch: Batch) -> float:
    return softmax_entropy(batch.scored(batch.hidden.detach()), batch.weight, most=None)


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
    batch = workload_batch(workload)
    nats = entropy(batch)
    steps = {method: CPU_METHODS[method].build(batch) for method in (*usable, CPU_BOUND)}
    rows = timed(batch, steps, rounds, ("eager", CPU_BOUND))
    if "clha_fast_routed" in rows:
        rows["clha_fast_routed"] |= routed_metrics(batch)
    gradient_bytes, tokens = batch.gradient_bytes, batch.targets.numel()
    del batch, steps
    gc.collect()
    for method in usable:
        rows[method]["peak_bytes"] = measure_memory(workload, method)
    return {
        "shape": workload.describe(),
        "rounds": rounds,
        "scored_tokens": tokens,
        "softmax_entropy": nats,
        "gradient_bytes": gradient_bytes,
        "methods": rows | others,
    }


def over_sizes(names: list[str], rounds: int) -> list[Row]:
    """Time over the bare products and memory of the exact path, for one workload after another."""
    rows = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        workload = find(name)
        batch = workload_batch(workload)
        steps = {method: CPU_METHODS[method].build(batch) for method in ("clha_fast_torch", CPU_BOUND)}
        row = timed(batch, steps, rounds, (CPU_BOUND,))["clha_fast_torch"]
        row |= {"tokens": batch.targets.numel(), "candidates": workload.candidates}
        row |= {"gradient_bytes": batch.gradient_bytes}
        del batch, steps
        gc.collect()
        row["peak_bytes"] = measure_memory(workload, "clha_fast_torch")
        rows.append(row)
    return rows


def over_kept_share(workload: Workload, rounds: int) -> dict[str, Any]:
    """The routed path's time and errors for several dropped masses."""
    print(f"{workload.name}: over the kept share", file=sys.stderr, flush=True)
    batch = workload_batch(workload)
    steps = {method: CPU_METHODS[method].build(batch) for method in ("clha_fast_torch", CPU_BOUND)}
    steps |= {f"{mass:g}": routed(batch, "torch", mass) for mass in DROPPED_MASSES}
    rows = timed(batch, steps, rounds, (CPU_BOUND,))
    for mass in DROPPED_MASSES:
        rows[f"{mass:g}"] |= routed_metrics(batch, mass)
    return {"softmax_entropy": entropy(batch), "rows": rows}


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


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def results_file(output: Path, environment: Row) -> Path:
    """`output`, or in a folder the file of this kind of CPU: one that is there, else a new one."""
    if output.suffix == ".json":
        return output
    for path in sorted(output.glob("cpu*.json")):
        if cpu_kind(json.loads(path.read_text())["environment"]) == cpu_kind(environment):
            return path
    name = re.sub("[^a-z0-9]+", "-", f"cpu {environment['cpu']} {environment['vector']}".lower()).strip("-")
    return output / f"{name}.json"


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = [name for name in CPU_METHODS if name != CPU_BOUND]
    parser.add_argument("--workload", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--method",
        nargs="+",
        choices=named,
        default=named,
        help="beside eager and the bare products, which always run",
    )
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--scaling", action="store_true", help="also over tokens, candidates and the kept share")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of the process's threads, on a busy machine"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON: a file, or a folder of files")
    args = parser.parse_args()
    methods = list(dict.fromkeys(["eager", *args.method]))
    clock = Clock("cpu", CLOCKS[args.clock])
    report: dict[str, Any] = {"environment": cpu_environment() | {"clock": args.clock}, "workloads": {}}
    print(json.dumps(report["environment"]))
    path = None if args.output is None else results_file(args.output, report["environment"])

    def keep(part: dict[str, Any]) -> None:
        report.update(part)
        if path:
            save(report, path)

    for workload in (WORKLOADS[name] for name in args.workload):
        chosen = [m for m in methods if m in PEAKED] if workload.peaked else [m for m in methods if "routed" not in m]
        found = measure(workload, chosen, args.rounds)
        keep({"workloads": report["workloads"] | {workload.name: found}})
        print("\n" + workload_table(found) + "\n", flush=True)
    if args.scaling:
        found = scaling(min(args.rounds, 3), report["environment"], lambda part: keep({"scaling": part}))
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
