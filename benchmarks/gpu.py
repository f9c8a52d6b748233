"""Speed and memory on a GPU, every method interleaved, after the library's own results have been checked there.

    python -m benchmarks.gpu [--output benchmarks/results] [--limit 520] [--quick] [--cpu-dry-run]

In this order, saved after every step: correctness of every path on this device (a failure ends the run with exit
status 1 and no speed), the shapes of `inputs.SHAPES`, then what `extras` measures. Times are medians between
events over interleaved rounds with a flushed L2; ratios are medians of each round's ratio to three bare GEMMs.
Everything stops in time for `--limit` seconds; what was not reached is missing or says "out of time".

--cpu-dry-run walks through all of it on tiny shapes without a GPU, with Triton's interpreter. Its numbers mean nothing,
are marked as a dry run, and are neither drawn nor rendered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--cpu-dry-run" in sys.argv:
    # Read once, when triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import correct, extras
from benchmarks import report as report_files
from benchmarks.inputs import SHAPES, TINY, Batch, Shape, make_batch
from benchmarks.measure import FAILURES, Clock, Deadline, clean, describe, gpu_environment, interleaved
from benchmarks.memory import Job, in_a_fresh_process
from benchmarks.methods import DROPPED, GPU_METHODS, methods_of
from benchmarks.roofline import ceilings_of, cost
from clha_fast import HeadOptions

ROOT = Path(__file__).resolve().parent
DRY = ("bound", "bound_forward", "workspace", "fused", "fused_forward", "routed", "eager_hf", "published")
PEAK_NATS = 2.0


class Run:
    """One benchmark: its device, its deadline and the report that grows."""

    def __init__(self, device: str, output: Path, limit: float, quick: bool, dry: bool) -> None:
        self.device, self.output, self.quick, self.dry = device, output, quick, dry
        self.deadline = Deadline(limit)
        self.clock = Clock(device)
        self.shapes = TINY if dry else SHAPES[:2] if quick else SHAPES
        self.report: dict[str, Any] = {
            "dry_run": dry,
            "quick": quick,
            "environment": gpu_environment(device),
            "correctness": {},
            "shapes": [],
            "extras": {},
        }

    def save(self) -> None:
        self.report["seconds_left"] = round(self.deadline.left(), 1)
        report_files.save(self.report, self.output / "gpu.json")

    def correctness(self) -> None:
        """Raises IncorrectError."""
        found = self.report["correctness"]
        found["paths"] = correct.check_paths(self.device, tiny=self.dry)
        found["routed"] = correct.check_routed(self.device, tiny=self.dry)
        found["peers"] = correct.check_peers(self.device, tiny=self.dry)
        if not self.dry:
            found["tests"] = correct.run_tests(min(120.0, self.deadline.left() / 3))
        self.save()

    def shape(self, shape: Shape, mode: str) -> None:
        """One shape in one mode; the memory of its methods comes later, from another process."""
        rounds = 1 if self.dry else 3 if self.quick or shape.tokens > 20_000 else 5
        padded, nats = mode in ("padded", "pairs"), PEAK_NATS if mode == "peaked" else None
        if mode == "pairs":
            shape = dataclasses.replace(shape, candidates=2)
        clean()
        batch = make_batch(shape, self.device, padded=padded, nats=nats)
        steps: dict[str, Callable[[], Any]] = {}
        failed: dict[str, str] = {}
        for name in self.methods(mode):
            if GPU_METHODS[name].compiles and not self.deadline.allows(150):
                failed[name] = "out of time"
                continue
            try:
                steps[name] = GPU_METHODS[name].build(batch)
            except FAILURES as failure:
                failed[name] = describe(failure)
        entry: dict[str, Any] = {"shape": shape.name, "mode": mode, "entropy": batch.entropy, "rows": batch.rows}
        rows = interleaved(steps, self.clock, rounds, self.deadline)
        entry["methods"] = {
            name: rows.get(name, {"failed": failed.get(name)}) | self.known(name, shape, batch, rows.get(name, {}))
            for name in (*steps, *failed)
        }
        if "seconds" in rows.get("routed", {}):
            entry.update(extras.kept(batch, HeadOptions(max_dropped_mass=DROPPED)))
        self.report["shapes"].append(entry)
        del batch, steps
        clean()
        self.save()
        print(report_files.shape_table(entry) + "\n", flush=True)

    def methods(self, mode: str) -> list[str]:
        names = methods_of(mode)
        return [name for name in names if name in DRY] if self.dry else names

    def known(self, name: str, shape: Shape, batch: Batch, row: dict[str, Any]) -> dict[str, Any]:
        """Operations and bytes beside a time: of the cost model where there is one."""
        method = GPU_METHODS[name]
        rows = batch.rows if name in ("eager_hf", "published", "torch_compile") else shape.tokens
        shape = dataclasses.replace(shape, tokens=rows)
        flops = 2.0 * method.gemms * rows * shape.width * shape.vocabulary
        found: dict[str, Any] = {"computes": method.computes, "flops": flops}
        if method.model is None:
            elements = (rows + shape.vocabulary) * shape.width
            found |= {"bytes": 2 * elements * shape.dtype.itemsize, "bytes_are": "inputs and gradients, once"}
        else:
            model = cost(method.model, shape, ceilings_of(None, "NVIDIA H200"))
            found |= {"bytes": model.bytes, "bytes_are": "the cost model's"}
        if "seconds" in row:
            found["tflops_per_second"] = flops / row["seconds"] / 1e12
        return found

    def memory(self, mode: str) -> None:
        """Peaks of every method that was timed in a mode, each shape from a process of its own."""
        shapes = {shape.name: shape for shape in self.shapes}
        for entry in self.report["shapes"]:
            if entry["mode"] != mode or not self.deadline.allows(20):
                continue
            names = [name for name, row in entry["methods"].items() if "seconds" in row and name != "bound_forward"]
            jobs = [Job(name, shapes[entry["shape"]], entry["mode"] == "padded") for name in names]
            for name, found in zip(names, self.fresh(jobs), strict=True):
                entry["methods"][name]["peak_bytes"] = found.get("peak_bytes")
                if "failed" in found:
                    entry["methods"][name]["memory_failed"] = found["failed"]
            self.save()

    def memory_over_tokens(self) -> None:
        base = self.shapes[0]
        counts = (32, 64) if self.dry else (1024, 4096, 16384, 65536)
        points = [(name, n) for name in ("workspace", "fused", "eager_hf") for n in counts]
        jobs = [Job(name, dataclasses.replace(base, tokens=n)) for name, n in points]
        if self.deadline.allows(20):
            self.report["extras"]["memory_over_tokens"] = [
                {"method": name, "tokens": n, **found}
                for (name, n), found in zip(points, self.fresh(jobs), strict=True)
            ]
        self.save()

    def fresh(self, jobs: list[Job]) -> list[dict[str, Any]]:
        return in_a_fresh_process(jobs, self.device, min(60.0, self.deadline.left() - 5))

    def extra(self, name: str, seconds: float, compute: Callable[[], Any]) -> None:
        if not self.deadline.allows(seconds):
            self.report["extras"][name] = {"failed": "out of time"}
        else:
            try:
                self.report["extras"][name] = compute()
            except FAILURES as failure:
                self.report["extras"][name] = {"failed": describe(failure)}
            clean()
        self.save()

    def extras(self) -> None:
        device, dry, deadline = self.device, self.dry, self.deadline
        self.extra("synchronisation", 10, lambda: extras.synchronisation(device, dry))
        self.extra("graph_capture", 10, lambda: extras.graph_capture(device, dry))
        self.extra("ranking_share", 10, lambda: extras.ranking_share(device, dry))
        self.extra("over_candidates", 10, lambda: extras.over_candidates(device, dry, deadline))
        self.extra("over_kept_share", 15, lambda: extras.over_kept_share(device, dry, deadline))
        self.extra("long_input", 20, lambda: extras.long_input(device, dry, deadline))
        self.extra("first_call", 30, lambda: extras.first_call(device, min(60.0, deadline.left() - 5)))

    def all(self) -> None:
        self.save()
        self.correctness()
        # What every reader asks first comes first, at every shape; peers that compile for a minute come last.
        for shape in self.shapes:
            for mode in ("scored", "peaked"):
                if self.deadline.allows(25):
                    self.shape(shape, mode)
        self.extras()
        self.memory("scored")
        self.memory_over_tokens()
        for mode in ("padded", "pairs"):
            for shape in self.shapes:
                if self.deadline.allows(40):
                    self.shape(shape, mode)
        self.memory("padded")
        self.report["plots"] = report_files.plots(self.report, self.output)
        self.save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer rounds")
    parser.add_argument(
        "--cpu-dry-run", action="store_true", help="tiny shapes without a GPU; the numbers mean nothing"
    )
    args = parser.parse_args()
    device = "cpu" if args.cpu_dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here (--cpu-dry-run walks through without one)", file=sys.stderr)
        return 2
    run = Run(device, args.output, args.limit, args.quick, args.cpu_dry_run)
    print(json.dumps(run.report["environment"]), flush=True)
    try:
        run.all()
    except correct.IncorrectError as wrong:
        run.report["correctness"]["failed"] = str(wrong)
        run.report["shapes"] = []
        run.save()
        print(f"benchmarks.gpu: incorrect, no speed is reported: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
