"""Speed and memory on a GPU, every method interleaved, after the library's own results have been checked there.

    python -m benchmarks.gpu [--output DIR] [--limit 520] [--resume] [stages] [--cpu-dry-run]

Stages, all of them in this order where none is named: --first-look (versions, one loss, memory; 60 s), --warm (compiles
everything, in parallel processes), --correct (every path against float64, then the tests marked `gpu`), --shapes
(`inputs.SHAPES` on scored rows, then what `extras` measures, memory, padded batches and pairs); --profile (ncu and
compute-sanitizer, where they are) only when named. Speed needs correctness: it is checked first where the folder has
none, and a path that is wrong is not timed.

Every piece runs in a process of its own with a deadline, and is saved as it comes, in DIR/gpu.json; what those said on
stderr is in DIR/gpu.log. Everything stops in time for `--limit` seconds; the same command with --resume goes on where
it stopped. Times are medians between events over interleaved rounds with a flushed L2; ratios are medians of each
round's ratio to three bare GEMMs. Exit status: 0, 1 where something is incorrect, 2 where nothing could run, 3 where
the time was too short.

--cpu-dry-run walks through all of it on tiny shapes without a GPU, with Triton's interpreter. Its numbers mean nothing,
are marked as a dry run, and are neither drawn nor rendered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import correct, profile
from benchmarks import report as report_files
from benchmarks.inputs import SHAPES, TINY, Shape
from benchmarks.measure import Deadline, gpu_environment
from benchmarks.memory import Job, in_a_fresh_process
from benchmarks.methods import GPU_METHODS, methods_of
from benchmarks.pieces import EXTRAS, shape_fields
from benchmarks.processes import OUT_OF_TIME, START_SECONDS, run_piece, run_pieces

ROOT = Path(__file__).resolve().parent
STAGES = ("first_look", "warm", "correct", "shapes")
DRY = ("bound", "bound_forward", "workspace", "fused", "fused_forward", "routed", "eager_hf", "published")
# Which path each of the library's methods runs on a GPU.
RUNS = {"workspace": "workspace", "fused": "triton", "fused_forward": "triton", "routed": "routed 0.01"}
# A rerun within one shape and mode begins without the method that broke the GPU's context; so many may.
MOST_BROKEN = 3
INCORRECT, NOT_CHECKED = "incorrect: ", "not checked: "
# How the reasons begin for which a method without a time gets another chance.
AGAIN = (OUT_OF_TIME, INCORRECT, NOT_CHECKED)


class Run:
    """One call: its device, its deadline and the report that grows."""

    def __init__(
        self,
        device: str,
        output: Path,
        limit: float,
        *,
        shapes: tuple[Shape, ...] = SHAPES,
        only: tuple[str, ...] = (),
        quick: bool = False,
        resume: bool = False,
    ) -> None:
        self.device, self.output, self.quick, self.only = device, output, quick, only
        self.dry = device == "cpu"
        self.deadline = Deadline(limit)
        self.shapes = TINY if self.dry else shapes
        self.file, self.log = output / "gpu.json", output / "gpu.log"
        output.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {
            "dry_run": self.dry,
            "environment": gpu_environment(device),
            "first_look": {},
            "warm": {},
            "correctness": {},
            "shapes": [],
            "extras": {},
        }
        if self.file.exists():
            if resume:
                self.report = self._earlier()
            else:
                report_files.keep_old(self.file)

    def _earlier(self) -> dict[str, Any]:
        earlier: dict[str, Any] = json.loads(self.file.read_text())
        for key in ("device", "commit", "packages"):
            was, now = earlier["environment"].get(key), self.report["environment"][key]
            if was != now:
                raise SystemExit(f"--resume: {self.file} has {key} {was}, here it is {now}: give another --output")
        return earlier

    def save(self) -> None:
        self.report["seconds_left"] = round(self.deadline.left(), 1)
        report_files.save(self.report, self.file)

    def budget(self, most: float) -> Deadline:
        """At most so many seconds of what is left."""
        return Deadline(min(most, self.deadline.left()))

    def workers(self) -> int:
        """Processes at a time: no more than there are cores, or room for the largest head and its gradients."""
        room = 12 if self.dry else torch.cuda.get_device_properties(0).total_memory // (10 * 2**30)
        return max(1, min(12, room, (os.cpu_count() or 1) - 1))

    def first_look(self) -> None:
        deadline = self.budget(600 if self.dry else 60)
        self.report["first_look"] = run_piece("first_look", {"tiny": self.dry}, self.device, deadline, self.log)
        self.save()
        print(json.dumps(self.report["first_look"], indent=1), flush=True)

    def checks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """A process a path and dtype; one for all paths of a dtype in a dry run."""
        dtypes = correct.DTYPES[:2] if self.dry else correct.DTYPES
        groups = [list(correct.PATHS)] if self.dry else [[path] for path in correct.PATHS]
        return {
            f"{dtype}, {', '.join(paths)}": ("check", {"dtype": dtype, "paths": paths, "tiny": self.dry})
            for dtype in dtypes
            for paths in groups
        }

    def warm(self) -> None:
        """Compiles for every width and vocabulary, and for the correctness cases."""
        jobs: dict[str, tuple[str, dict[str, Any]]] = {}
        if not self.dry:  # Triton's interpreter compiles nothing
            jobs = {
                f"{shape.width} x {shape.vocabulary}, {path}, {'padded' if padded else 'scored'}": (
                    "warm",
                    {"shape": shape_fields(shape), "path": path, "padded": padded},
                )
                for shape in self.shapes
                for path in ("triton", "workspace", "routed")
                for padded in ((False,) if path == "routed" else (False, True))
            } | self.checks()
        done = self.report["warm"]
        todo = {name: job for name, job in jobs.items() if "failed" in done.get(name, {"failed": ""})}
        for name, found in run_pieces(todo, self.device, self.budget(400), self.log, self.workers()):
            done[name] = {key: found[key] for key in ("seconds", "failed", "wrong") if found.get(key)}
            self.save()
            print(f"warm: {name}: {done[name] or 'done'}", flush=True)

    def correct(self) -> None:
        found = self.report["correctness"]
        paths = found.setdefault("paths", {})
        todo = {name: job for name, job in self.checks().items() if "failed" in paths.get(name, {"failed": ""})}
        for name, result in run_pieces(todo, self.device, self.budget(400), self.log, self.workers()):
            if "broken" in result:
                result["wrong"] = result.get("wrong", {}) | {result["broken"]: result["why"]}
            paths[name] = result
            self.save()
            print(f"correct: {name}: {result.get('wrong') or result.get('failed') or 'right'}", flush=True)
        if "failed" in found.get("tests", {"failed": ""}) and not self.dry:
            found["tests"] = correct.run_tests(self.budget(240).left())
            print(f"correct: tests: {found['tests']}", flush=True)
        if "failed" in found.get("peers", {"failed": ""}):
            found["peers"] = run_piece("peers", {"tiny": self.dry}, self.device, self.budget(60), self.log)
        self.save()

    def incorrect(self) -> dict[str, str]:
        """Path: why it is not timed. A path that was not checked to the end is not timed either."""
        found = self.report["correctness"]
        wrong: dict[str, str] = {}
        for name, (_, job) in self.checks().items():
            result = found.get("paths", {}).get(name, {"failed": OUT_OF_TIME})
            wrong |= {path: INCORRECT + why for path, why in result.get("wrong", {}).items()}
            if "failed" in result:
                wrong |= {path: NOT_CHECKED + result["failed"] for path in job["paths"] if path not in wrong}
        if "wrong" in found.get("tests", {}):
            wrong.setdefault("triton", f"{INCORRECT}tests: {found['tests']['wrong']}")
        # A routed backward's forward is the fused one.
        if "triton" in wrong:
            wrong.setdefault("routed 0.01", wrong["triton"])
        return wrong

    def entry(self, shape: Shape, mode: str) -> dict[str, Any]:
        for entry in self.report["shapes"]:
            if (entry["shape"], entry["mode"]) == (shape.name, mode):
                return entry
        self.report["shapes"].append({"shape": shape.name, "mode": mode, "entropy": None, "methods": {}})
        return self.report["shapes"][-1]

    def methods(self, mode: str) -> list[str]:
        names = methods_of(mode)
        if self.dry:
            names = [name for name in names if name in DRY]
        return [name for name in names if name in ("bound", *self.only) or not self.only]

    def speed(self, shape: Shape, mode: str, seconds: float) -> None:
        """One shape in one mode, those methods that have no time yet; --only takes times anew."""
        entry, wrong = self.entry(shape, mode), self.incorrect()
        missing = []
        for name in self.methods(mode):
            if RUNS.get(name) in wrong:
                entry["methods"][name] = {"failed": wrong[RUNS[name]]}
            elif self.only or entry["methods"].get(name, {"failed": OUT_OF_TIME}).get("failed", "").startswith(AGAIN):
                missing.append(name)
        if not set(missing) - {"bound"}:
            return
        names = ["bound", *(name for name in missing if name != "bound")]
        rounds = 1 if self.dry else 3 if self.quick or shape.tokens > 20_000 else 5
        asked = dataclasses.replace(shape, candidates=2) if mode == "pairs" else shape
        for _ in range(MOST_BROKEN):
            given = {"shape": shape_fields(asked), "mode": mode, "methods": names, "rounds": rounds}
            found = run_piece("speed", given, self.device, self.budget(seconds), self.log)
            methods = found.pop("methods", {})
            if "broken" in found:
                methods[found["broken"]] = {"failed": f"broke the GPU's context: {found['why']}"}
            for name in names:
                entry["methods"][name] = methods.get(name, {"failed": found.get("failed", OUT_OF_TIME)})
            entry |= {key: value for key, value in found.items() if key not in ("broken", "why", "failed")}
            self.save()
            if "broken" not in found or found["broken"] == "bound":
                break
            names.remove(found["broken"])
        print(report_files.shape_table(entry) + "\n", flush=True)

    def memory(self, mode: str) -> None:
        """Peaks of every method that was timed in a mode, each shape from a process of its own."""
        for shape in self.shapes:
            entry = self.entry(shape, mode)
            names = [
                name
                for name, row in entry["methods"].items()
                if "seconds" in row and row.get("peak_bytes") is None and name != "bound_forward"
            ]
            jobs = [Job(name, shape, mode == "padded") for name in names]
            for name, found in zip(names, self.fresh(jobs), strict=True):
                entry["methods"][name]["peak_bytes"] = found.get("peak_bytes")
                if "failed" in found:
                    entry["methods"][name]["memory_failed"] = found["failed"]
            self.save()

    def memory_over_tokens(self) -> None:
        base = self.shapes[0]
        counts = (32, 64) if self.dry else (1024, 4096, 16384, 65536)
        points = [(name, n) for name in ("workspace", "fused", "eager_hf") for n in counts]
        if "memory_over_tokens" not in self.report["extras"] and self.deadline.allows(START_SECONDS):
            jobs = [Job(name, dataclasses.replace(base, tokens=n)) for name, n in points]
            self.report["extras"]["memory_over_tokens"] = [
                {"method": name, "tokens": n, **found}
                for (name, n), found in zip(points, self.fresh(jobs), strict=True)
            ]
        self.save()

    def fresh(self, jobs: list[Job]) -> list[dict[str, Any]]:
        if not jobs:
            return []
        if not self.deadline.allows(START_SECONDS):
            return [{"failed": OUT_OF_TIME}] * len(jobs)
        return in_a_fresh_process(jobs, self.device, self.budget(60).left() - 5)

    def extra(self, name: str) -> None:
        done = self.report["extras"]
        if "failed" in done.get(name, {"failed": ""}) or OUT_OF_TIME in str(done[name]):
            found = run_piece(
                "extra", {"name": name, "tiny": self.dry}, self.device, self.budget(600 if self.dry else 90), self.log
            )
            done[name] = found.get("result", {"failed": found.get("failed", found.get("why", "unknown"))})
            self.save()

    def all_shapes(self) -> None:
        # What every reader asks first comes first, at every shape; peers that compile for a minute come last.
        for mode in ("scored", "peaked"):
            for shape in self.shapes:
                self.speed(shape, mode, 120)
        if not self.quick and not self.only:
            for name in EXTRAS:
                self.extra(name)
        self.memory("scored")
        if self.quick or self.only:
            return
        self.memory_over_tokens()
        for mode in ("padded", "pairs"):
            for shape in self.shapes:
                self.speed(shape, mode, 240)
        self.memory("padded")
        self.report["plots"] = report_files.plots(self.report, self.output)

    def missing(self) -> Iterator[str]:
        """What the time was too short for."""
        for name in self.checks():
            if self.report["correctness"].get("paths", {}).get(name, {}).get("failed") == OUT_OF_TIME:
                yield f"correct: {name}"
        for entry in self.report["shapes"]:
            out = [name for name, row in entry["methods"].items() if row.get("failed") == OUT_OF_TIME]
            if out:
                yield f"{entry['shape']}, {entry['mode']}: {', '.join(out)}"
        yield from (name for name, found in self.report["extras"].items() if "out of time" in str(found))

    def stages(self, names: tuple[str, ...]) -> int:
        self.save()
        for name in names:
            if name == "first_look":
                if "failed" in (self.report["first_look"] or {"failed": ""}):
                    self.first_look()
            elif name == "warm":
                self.warm()
            elif name == "profile":
                self.report["profile"] = profile.all_tools(self.output, self.deadline, self.dry)
                print(json.dumps(self.report["profile"], indent=1))
            else:
                self.correct()
                if name == "shapes":
                    self.all_shapes()
            self.save()
        status = 0
        for path, why in self.incorrect().items() if self.report["correctness"] else ():
            if why.startswith(INCORRECT):
                status = 1
                print(f"benchmarks.gpu: {path} is incorrect and is not timed: {why}", file=sys.stderr)
        missing = list(self.missing())
        if missing:
            print("benchmarks.gpu: out of time, --resume goes on: " + "; ".join(missing), file=sys.stderr)
        return status or (3 if missing else 0)


def find_shapes(names: list[str]) -> tuple[Shape, ...]:
    """Shapes by name, with or without blanks ("8192x4096x128256"); all of them for none."""
    known = {shape.name.replace(" ", ""): shape for shape in SHAPES}
    unknown = [name for name in names if name.replace(" ", "") not in known]
    if unknown:
        raise SystemExit(f"--shapes: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return tuple(known[name.replace(" ", "")] for name in names) or SHAPES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of gpu.json, gpu.csv, gpu.log")
    parser.add_argument("--limit", type=float, default=520.0, help="seconds for everything in this call")
    parser.add_argument("--resume", action="store_true", help="keep what the folder has and do what is missing")
    parser.add_argument("--first-look", action="store_true", help="versions, one loss, memory check")
    parser.add_argument("--warm", action="store_true", help="compile everything in parallel processes")
    parser.add_argument("--correct", action="store_true", help="every path against float64, the tests marked gpu")
    parser.add_argument("--shapes", nargs="*", metavar="NxHxV", help="speed and memory, at these shapes or at all")
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds, no extras")
    parser.add_argument("--only", nargs="+", default=[], choices=list(GPU_METHODS), metavar="METHOD", help="time these")
    parser.add_argument("--profile", action="store_true", help="ncu and compute-sanitizer, where they are")
    parser.add_argument(
        "--cpu-dry-run", action="store_true", help="tiny shapes without a GPU; the numbers mean nothing"
    )
    args = parser.parse_args()
    device = "cpu" if args.cpu_dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here (--cpu-dry-run walks through without one)", file=sys.stderr)
        return 2
    shapes = find_shapes(args.shapes or [])
    if args.quick and not args.shapes:
        shapes = SHAPES[:2]
    wanted = {"first_look": args.first_look, "warm": args.warm, "correct": args.correct, "profile": args.profile}
    wanted["shapes"] = args.shapes is not None or args.quick or bool(args.only)
    names = tuple(name for name in (*STAGES, "profile") if wanted[name]) or STAGES
    run = Run(
        device,
        args.output,
        args.limit,
        shapes=shapes,
        only=tuple(args.only),
        quick=args.quick,
        resume=args.resume,
    )
    print(json.dumps(run.report["environment"]), flush=True)
    return run.stages(names)


if __name__ == "__main__":
    sys.exit(main())
