"""Speed and memory on a GPU, every method interleaved, after the library's own results have been checked there.

    python -m benchmarks.gpu [--output DIR] [--limit 520] [--resume] [stages] [--cpu-dry-run]

Stages, all of them in this order where none is named: --first-look (versions, one loss, memory; 120 s), --warm
(compiles everything, in parallel processes), --correct (every path against float64, then the tests marked `gpu`),
--shapes (`inputs.SHAPES` on scored rows, then what `extras` measures, memory, padded batches and pairs); --profile
(ncu and compute-sanitizer, where they are) only when named. Speed needs correctness: it is checked first where the
folder has none, and a path that is wrong is not timed.

Every piece runs in a process of its own with a deadline, and is saved as it comes, in DIR/gpu.json; what those said on
stderr is in DIR/gpu.log. A piece that hangs is ended, named and left out. Everything stops in time for `--limit`
seconds; the same command with --resume goes on where it stopped. Times are medians between events over interleaved
rounds with a flushed L2; ratios are medians of each round's ratio to three bare GEMMs. Exit status: 0, 1 where a path
of the library is incorrect or could not be checked, 2 where nothing could run, 3 where the time was too short.

--cpu-dry-run walks through all of it on tiny shapes without a GPU, with Triton's interpreter. Its numbers mean nothing,
are marked as a dry run, and are neither drawn nor rendered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import correct, profile
from benchmarks import report as report_files
from benchmarks.inputs import SHAPES, TINY, Shape
from benchmarks.measure import Deadline, gpu_environment, why_no_interpreter
from benchmarks.memory import Job, in_a_fresh_process
from benchmarks.methods import GPU_METHODS, methods_of
from benchmarks.pieces import EXTRAS, MODELS, shape_fields
from benchmarks.processes import NO_END, OUT_OF_TIME, START_SECONDS, run_pieces, run_within

ROOT = Path(__file__).resolve().parent
STAGES = ("first_look", "warm", "correct", "shapes")
DRY = ("bound", "bound_forward", "workspace", "fused", "fused_forward", "routed", "eager_hf", "published")
# Which path each of the library's methods runs on a GPU.
RUNS = {"workspace": "workspace", "fused": "triton", "fused_forward": "triton", "routed": "routed 0.01"}
# A rerun within one shape and mode begins without the method that broke the GPU's context or hung; so many may.
MOST_BROKEN = 3
# Seconds of one piece, and how many times that a dry run has: Triton's interpreter is slow.
FIRST_LOOK, WARM, CHECK, PEERS, EXTRA, MEMORY = 120, 200, 150, 60, 90, 60
DRY_FACTOR = 4
ADVICE = 'docs/gpu-first-run.md, "If something fails"'
INCORRECT, NOT_CHECKED = "incorrect: ", "not checked: "
# How the reasons begin for which a method without a time gets another chance.
AGAIN = (OUT_OF_TIME, INCORRECT, NOT_CHECKED)


def wanted(result: dict[str, Any] | None, again: bool) -> bool:
    """Whether a check is still to be made; again: also what has failed otherwise than for want of time."""
    failed = (result or {"failed": OUT_OF_TIME}).get("failed")
    return failed == OUT_OF_TIME or (again and failed is not None)


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

    def seconds(self, most: float) -> float:
        return most * DRY_FACTOR if self.dry else most

    def piece(self, most: float, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """What a process of its own finds in at most so many seconds."""
        return run_within(self.seconds(most), name, given, self.device, self.deadline, self.log)

    def pieces(
        self, most: float, jobs: dict[str, tuple[str, dict[str, Any]]], workers: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Several at once, each in at most so many seconds."""
        return run_pieces(jobs, self.device, self.deadline, self.log, workers, self.seconds(most))

    def workers(self) -> int:
        """Processes at a time: no more than there are cores, or room for the largest head and its gradients."""
        room = 12 if self.dry else torch.cuda.get_device_properties(0).total_memory // (10 * 2**30)
        return max(1, min(12, room, (os.cpu_count() or 1) - 1))

    def first_look(self) -> None:
        found = self.report["first_look"]
        jobs = {path: ("first_look", {"path": path, "tiny": self.dry}) for path in MODELS}
        todo = {path: job for path, job in jobs.items() if self.unseen(path)}
        for path, result in self.pieces(FIRST_LOOK, todo, len(todo) or 1):
            found[path] = result
            self.save()
            print(f"first look: {path}: {self.unseen(path) or report_files.first_look(result)}", flush=True)

    def unseen(self, path: str) -> str:
        """Why a path has not passed the first look; "" where it has."""
        result = self.report["first_look"].get(path, {"failed": OUT_OF_TIME})
        wrong: dict[str, str] = result.get("one_loss", {}).get("wrong", {})
        return str(result.get("why") or wrong.get(path) or result.get("failed", ""))

    def checks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """A process a path and dtype."""
        dtypes = correct.DTYPES[:2] if self.dry else correct.DTYPES
        return {
            f"{dtype}, {path}": ("check", {"dtype": dtype, "paths": [path], "tiny": self.dry})
            for dtype in dtypes
            for path in correct.PATHS
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
        for name, found in self.pieces(WARM, todo, self.workers()):
            done[name] = {key: found[key] for key in ("seconds", "failed", "wrong") if found.get(key)}
            self.save()
            print(f"warm: {name}: {done[name] or 'done'}", flush=True)

    def correct(self, again: bool) -> None:
        """again: also what has failed, or did not come to an end."""
        found = self.report["correctness"]
        paths = found.setdefault("paths", {})

        todo = {name: job for name, job in self.checks().items() if wanted(paths.get(name), again)}
        for name, result in self.pieces(CHECK, todo, self.workers()):
            if "broken" in result:
                result["wrong"] = result.get("wrong", {}) | {result["broken"]: result["why"]}
            paths[name] = result
            self.save()
            said = "; ".join(result.get("wrong", {}).values()) or result.get("failed")
            print(f"correct: {name}: {said or 'right'}", flush=True)
        if wanted(found.get("tests"), again):
            found["tests"] = correct.run_tests(min(240.0, self.deadline.left()), collect=self.dry)
            print(f"correct: tests: {json.dumps(found['tests'])}", flush=True)
        self.save()

    def peers(self, again: bool) -> None:
        """How far the peers' gradients are off: recorded, nothing waits for it. Not where no peer is asked for."""
        found = self.report["correctness"]
        own = {"bound", "bound_forward", *RUNS}
        if wanted(found.get("peers"), again) and not (self.only and own.issuperset(self.only)):
            found["peers"] = self.piece(PEERS, "peers", {"tiny": self.dry})
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
            found = self.piece(seconds, "speed", given)
            methods, failed, bad = found.pop("methods", {}), found.get("failed", OUT_OF_TIME), found.get("broken")
            if bad is not None:
                methods[bad] = {"failed": f"broke the GPU's context: {found['why']}"}
            elif failed != OUT_OF_TIME and (bad := found.get("at")) is not None:
                methods[bad] = {"failed": failed}
            for name in names:
                entry["methods"][name] = methods.get(name, {"failed": failed})
            entry |= {key: value for key, value in found.items() if key not in ("broken", "why", "failed", "at")}
            self.save()
            if bad is None or bad == "bound":
                break
            names.remove(bad)
        print(report_files.shape_table(entry) + "\n", flush=True)

    def memory(self, mode: str) -> None:
        """Peaks of every method that was timed in a mode, each shape from a process of its own."""
        for shape in self.shapes:
            entry = self.entry(shape, mode)
            names = [
                name
                for name, row in entry["methods"].items()
                if "seconds" in row
                and row.get("peak_bytes") is None
                and row.get("memory_failed", OUT_OF_TIME) == OUT_OF_TIME
                and name != "bound_forward"
            ]
            jobs = [Job(name, shape, mode == "padded") for name in names]
            for name, found in zip(names, self.fresh(jobs), strict=True):
                entry["methods"][name]["peak_bytes"] = found.get("peak_bytes")
                entry["methods"][name].pop("memory_failed", None)
                if "failed" in found:
                    entry["methods"][name]["memory_failed"] = found["failed"]
            self.save()

    def memory_over_tokens(self) -> None:
        base = self.shapes[0]
        counts = (32, 64) if self.dry else (1024, 4096, 16384, 65536)
        points = [(name, n) for name in ("workspace", "fused", "eager_hf") for n in counts]
        if OUT_OF_TIME in str(self.report["extras"].get("memory_over_tokens", OUT_OF_TIME)):
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
        most = self.seconds(MEMORY)
        whole = self.deadline.allows(most + 5)
        found = in_a_fresh_process(jobs, self.device, min(most, self.deadline.left() - 5))
        late = NO_END.format(most) if whole else OUT_OF_TIME
        return [{"failed": late} if one.get("failed") == OUT_OF_TIME else one for one in found]

    def extra(self, name: str) -> None:
        done, most = self.report["extras"], self.seconds(EXTRA)
        if OUT_OF_TIME in str(done.get(name, OUT_OF_TIME)):
            whole = self.deadline.allows(most)
            found = self.piece(EXTRA, "extra", {"name": name, "tiny": self.dry})
            done[name] = found.get("result", {"failed": found.get("failed", found.get("why", "unknown"))})
            if whole:  # what is out of time within it would be so again
                done[name] = json.loads(json.dumps(done[name]).replace(OUT_OF_TIME, NO_END.format(most)))
            self.save()
            failed = done[name].get("failed") if isinstance(done[name], dict) else None
            print(f"extra: {name}: {failed or 'done'}", flush=True)

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

    def missing(self, names: tuple[str, ...]) -> Iterator[str]:
        """What the time was too short for. Compiling ahead is asked for by its stage alone: others do it as they go."""
        correctness = self.report["correctness"]
        parts = {
            "first look": self.report["first_look"],
            "warm": self.report["warm"] if "warm" in names else {},
            "correct": {name: correctness.get("paths", {}).get(name, {}) for name in self.checks()}
            | {name: correctness.get(name, {}) for name in ("tests", "peers")},
        }
        for part, found in parts.items():
            yield from (f"{part}: {name}" for name, one in found.items() if one.get("failed") == OUT_OF_TIME)
        for entry in self.report["shapes"]:
            rows = entry["methods"].items()
            out = [name for name, row in rows if OUT_OF_TIME in (row.get("failed"), row.get("memory_failed"))]
            if out:
                yield f"{entry['shape']}, {entry['mode']}: {', '.join(out)}"
        yield from (name for name, found in self.report["extras"].items() if OUT_OF_TIME in str(found))

    def stages(self, names: tuple[str, ...]) -> int:
        self.save()
        for name in names:
            if name == "first_look":
                self.first_look()
            elif name == "warm":
                self.warm()
            elif name == "profile":
                self.report["profile"] = profile.all_tools(self.output, self.deadline, self.dry)
                print(json.dumps(self.report["profile"], indent=1))
            else:
                self.correct(again=name == "correct")
                if name == "shapes":
                    self.all_shapes()
                self.peers(again=name == "correct")
            self.save()
        return self.verdict(names)

    def verdict(self, names: tuple[str, ...]) -> int:
        """The exit status; what failed and what to do next are said on stderr."""
        bad = []
        if "first_look" in names:
            bad = [f"first look: {path}: {why}" for path in MODELS if (why := self.unseen(path))]
        for path, why in self.incorrect().items() if self.report["correctness"] else ():
            if OUT_OF_TIME not in why:
                bad.append(f"{path} is not timed, {why}")
        missing = list(self.missing(names))
        for line in bad:
            print(f"benchmarks.gpu: {line}", file=sys.stderr)
        if bad:
            print(f"benchmarks.gpu: next: {ADVICE}; {self.log} has what processes said", file=sys.stderr)
        if missing:
            words = shlex.join([*(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
            print(f"benchmarks.gpu: out of time for {'; '.join(missing)}", file=sys.stderr)
            print(f"benchmarks.gpu: next: python -m benchmarks.gpu {words}", file=sys.stderr)
        return 1 if bad else 3 if missing else 0


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
    if device == "cpu" and (why := why_no_interpreter()) is not None:
        print(f"benchmarks.gpu: no dry run here: {why}", file=sys.stderr)
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
    # Ended by a scheduler as by a key: no process of ours goes on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run.stages(names)
    except KeyboardInterrupt:
        print(f"benchmarks.gpu: interrupted; {run.file} has what was done, --resume goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
