"""Times the kernels by name on a GPU, with the table's tiles and with others: what `csrc_triton.configs` goes by.

    python -m benchmarks.tiles --output DIR [--limit 240] [--shape 8192x4096x128256]

Every run gives each kernel the next of its `TILES`, and times a step of each path under torch's profiler: kernels are
timed one by one, so one run tries a tile of every kernel. Run 0 is the table as it is. What the others compute is
compared with it. All runs are compiled first, in parallel processes; then one process times them. DIR/tiles.json has
microseconds by kernel, DIR/tiles.log what the processes said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Batch, Shape, make_batch
from benchmarks.measure import FAILURES, Deadline, clean, describe, gpu_environment, is_broken
from benchmarks.methods import GPU_METHODS, clha
from benchmarks.pieces import PEAK_NATS
from benchmarks.processes import output_within
from clha_fast import HeadOptions
from csrc_triton import configs

STEPS = 3
# Of a tile that is tried, what differs from the table's.
_FLAT = {"FLATTEN": True}
_FREE = {"maxnreg": None}
_TALL = {"BLOCK_N": 256, "BLOCK_V": 128}
TILES: dict[str, list[dict[str, Any]]] = {
    "persistent_forward": [
        _FLAT,
        _FLAT | _FREE,
        _FREE,
        {"num_stages": 3},
        {"GROUP": 8},
        {"GROUP": 32},
        {"BLOCK_H": 128, "num_stages": 2},
        _TALL,
        {"BLOCK_V": 128},
        {"BLOCK_V": 128, "BLOCK_H": 128, "num_stages": 3},
    ],
    "persistent_logit_grad": [
        _FLAT,
        {"num_stages": 4},
        _FLAT | {"num_stages": 4},
        {"maxnreg": 208},
        {"GROUP": 8},
        {"GROUP": 32},
        {"BLOCK_H": 128, "num_stages": 2},
        _TALL,
        {"BLOCK_V": 128, "num_stages": 4},
        {"BLOCK_V": 128, "BLOCK_H": 128, "num_stages": 3},
    ],
    "persistent_hidden_grad": [
        {"FLATTEN": True, "num_stages": 2},
        {"num_stages": 3},
        {"GROUP": 16},
        {"GROUP": 64},
        {"BLOCK_N": 256, "BLOCK_H": 128},
        {"BLOCK_V": 128, "num_stages": 2},
        {"BLOCK_H": 128},
        {"BLOCK_H": 128, "BLOCK_V": 128, "num_stages": 3},
        {"GROUP": 4},
    ],
    "persistent_weight_grad": [
        {"FLATTEN": True, "num_stages": 3},
        {"num_stages": 3},
        {"GROUP": 16},
        {"GROUP": 32},
        {"BLOCK_V": 256, "BLOCK_H": 128},
        {"BLOCK_N": 128, "num_stages": 2},
        {"BLOCK_H": 128},
        {"BLOCK_H": 128, "BLOCK_N": 128, "num_stages": 3},
        {"GROUP": 4},
        {"FLATTEN": True},
    ],
    "persistent_weight_grad_partial": [
        {"BLOCK_H": 128, "GROUP": 16},
        {"num_stages": 3},
        {"GROUP": 16},
        {"GROUP": 4},
    ],
    "persistent_forward_softcap": [
        {"FLATTEN": True},
        {"num_stages": 3},
        {"BLOCK_V": 256, "num_stages": 3},
        {"BLOCK_V": 256},
    ],
    "persistent_logit_grad_softcap": [
        {"FLATTEN": True},
        {"num_stages": 3},
        {"BLOCK_V": 256, "num_stages": 3},
        {"BLOCK_V": 256},
    ],
    "statistics": [
        {"BLOCK_V": 1024},
        {"BLOCK_V": 1024, "BLOCK_K": 8},
        {"BLOCK_K": 2},
        {"BLOCK_V": 4096, "BLOCK_K": 2},
        {"num_warps": 16},
        {"num_warps": 4},
    ],
    "gradient": [
        {"BLOCK_V": 2048},
        {"BLOCK_V": 8192},
        {"num_warps": 4},
        {"num_warps": 16},
        {"BLOCK_V": 2048, "num_warps": 4},
        {"BLOCK_V": 1024, "num_warps": 4},
    ],
    "routed_logit_grad": [
        {"num_stages": 4},
        {"num_stages": 2},
        {"GROUP": 16},
        {"BLOCK_H": 128, "num_stages": 2},
        {"num_warps": 4},
        {"GROUP": 1},
    ],
    "routed_weight_grad": [
        {"num_stages": 4},
        {"num_stages": 2},
        {"BLOCK_H": 256},
        {"BLOCK_N": 32},
        {"BLOCK_N": 128},
        {"GROUP": 8},
    ],
    "routed_hidden_grad": [
        {"BLOCK_H": 128},
        {"RESIDENT": 4},
        {"RESIDENT": 1},
        {"BLOCK_N": 128},
        {"num_warps": 4},
    ],
}


# Of more tokens the fused backward makes several chunks, and dweight's sums have a row of their own in the table.
ONE_CHUNK, PARTIAL = 8192, "persistent_weight_grad_partial"
# The path whose kernels they are; the others are the fused one's.
PATHS = {
    "workspace": ("statistics", "gradient"),
    "routed": tuple(kernel for kernel in TILES if kernel.startswith("routed")),
    "softcap": tuple(kernel for kernel in TILES if kernel.endswith("softcap")),
}


def other_weight_grad(tokens: int) -> str:
    """The row of dweight that so many tokens do not read, though its kernel has the same name."""
    return PARTIAL if tokens <= ONE_CHUNK else "persistent_weight_grad"


def tried(run: int) -> dict[str, dict[str, Any]]:
    """Kernel: what this run tries of it; run 0 is the table."""
    return {kernel: tiles[run - 1] for kernel, tiles in TILES.items() if 0 < run <= len(tiles)}


def take(run: int, base: dict[str, dict[str, Any]], arch: str = "sm_90") -> None:
    """Puts a run's tiles into the table; `base` has the table's own."""
    for kernel, own in base.items():
        tile = own | tried(run).get(kernel, {})
        tile = {name: value for name, value in tile.items() if value is not None}
        if kernel in configs.PERSISTENT:
            configs.PERSISTENT[kernel][arch] = tile
        elif kernel in configs.GEMMS:
            configs.GEMMS[kernel][arch, "16-bit"] = tile
        else:
            configs.SMALL[kernel] = (tile, configs.SMALL[kernel][1])


def table(arch: str = "sm_90") -> dict[str, dict[str, Any]]:
    """Each kernel's own tile."""
    return {
        kernel: dict(
            configs.PERSISTENT[kernel][arch]
            if kernel in configs.PERSISTENT
            else configs.GEMMS[kernel][arch, "16-bit"]
            if kernel in configs.GEMMS
            else configs.SMALL[kernel][0]
        )
        for kernel in TILES
    }


def paths(batch: Batch, peaked: Batch) -> dict[str, Any]:
    """The library's paths that a kernel of `TILES` belongs to, each of its own batch."""
    wanted = {next((path for path, kernels in PATHS.items() if kernel in kernels), "fused") for kernel in TILES}
    used = {"fused": batch, "workspace": batch, "routed": peaked}
    steps = {name: GPU_METHODS[name].build(batch) for name, batch in used.items() if name in wanted}
    return steps | ({"softcap": clha(batch, "triton", HeadOptions(softcap=30.0))} if "softcap" in wanted else {})


def by_kernel(step: Any) -> dict[str, float]:
    """Microseconds of a step by kernel, largest first."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found = {event.key[:90]: event.self_device_time_total / STEPS for event in profile.key_averages()}
    return dict(sorted(((k, round(t, 1)) for k, t in found.items() if t >= STEPS), key=lambda item: -item[1]))


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest norm of a difference over the norm of what is wanted."""
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True))


def compile_run(run: int, shape: Shape) -> None:
    """Few tokens compile what all tokens launch: of one chunk, or of several."""
    take(run, table())
    small = Shape(ONE_CHUNK + 128 if PARTIAL in TILES else 1024, shape.width, shape.vocabulary)
    for name, step in paths(make_batch(small, "cuda"), make_batch(small, "cuda")).items():
        try:
            step()
            torch.cuda.synchronize()
        except FAILURES as failure:
            print(f"{name}: {describe(failure)}", flush=True)


def time_runs(shape: Shape, deadline: Deadline) -> None:
    """A line of JSON a run."""
    base = table()
    batch, peaked = make_batch(shape, "cuda"), make_batch(shape, "cuda", nats=PEAK_NATS)
    for name in ("bound", "eager_hf"):
        step = GPU_METHODS[name].build(batch)
        print(json.dumps({"run": name, "kernels": by_kernel(step)}), flush=True)
        batch.clear()
        batch.scratch.clear()
        clean()
    wanted: dict[str, list[torch.Tensor]] = {}
    for run in range(1 + max(map(len, TILES.values()))):
        take(run, base)
        row: dict[str, Any] = {"run": run, "tried": tried(run), "kernels": {}, "off": {}}
        for name, step in paths(batch, peaked).items():
            used = peaked if name == "routed" else batch
            if not deadline.allows(5):
                return
            try:
                row["kernels"][name] = by_kernel(step)
                gradients = [g.clone() for g in used.gradients()]
                if run:
                    row["off"][name] = distance(gradients, wanted[name])
                else:
                    wanted[name] = gradients
            except FAILURES as failure:
                row["kernels"][name] = {"failed": describe(failure)}
                if is_broken():
                    print(json.dumps(row), flush=True)
                    return
            used.clear()
            clean()
        print(json.dumps(row), flush=True)


def shape_of(text: str) -> Shape:
    """Any NxHxV, not those of the benchmark alone: of some, L2 holds all sums."""
    sizes = [int(size) for size in text.replace(" ", "").split("x") if size.isdecimal() and int(size)]
    if len(sizes) != 3 or "x".join(map(str, sizes)) != text.replace(" ", ""):
        raise SystemExit(f"--shape: expected NxHxV, such as 8192x4096x128256, got {text!r}")
    return Shape(*sizes)


def why_not() -> str | None:
    """Why nothing can be timed here: the rows of the table that are tried are those of one architecture."""
    if not torch.cuda.is_available():
        return "no GPU here"
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] != 9:
        return f"expected compute capability 9.x, whose tiles are tried, got {torch.cuda.get_device_name()}"
    return None


def _run_all(args: argparse.Namespace, deadline: Deadline) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.tiles", "--shape", args.shape, "--output", str(args.output)]
    command += ["--only", *TILES]
    runs = range(1 + max(map(len, TILES.values())))
    report: dict[str, Any] = {"environment": gpu_environment("cuda"), "shape": args.shape, "compile": {}, "runs": []}

    def compiled(run: int) -> tuple[int, str, float]:
        start = time.monotonic()
        out, errors, status = output_within([*command, "--compile", str(run)], deadline.left() / 2, merge=False)
        said = out.strip() + ("" if status == 0 else f" status {status}: {errors.strip()[-300:]}")
        return run, said, time.monotonic() - start

    with ThreadPoolExecutor(min(len(runs), 14, os.cpu_count() or 1)) as pool:
        for run, said, seconds in pool.map(compiled, runs):
            report["compile"][run] = {"seconds": round(seconds, 1), "said": said}
            print(f"compile {run}: {seconds:.0f} s {said[:200]}", flush=True)
    left = deadline.left() - 5
    out, errors, _ = output_within([*command, "--time", str(left - 10)], left)
    report["runs"] = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
    (args.output / "tiles.log").write_text(errors)
    (args.output / "tiles.json").write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report["runs"]))


def summary(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of each kernel by run."""
    lines = []
    for row in rows:
        if isinstance(row["run"], str):
            lines.append(f"{row['run']}: {sum(row['kernels'].values()) / 1e3:.2f} ms")
    numbered = [row for row in rows if isinstance(row["run"], int)]
    for kernel in TILES:
        shown, softcap = kernel.removesuffix("_partial").removesuffix("_softcap"), kernel.endswith("_softcap")
        name = f"{shown}_kernel"
        for row in numbered:
            found = {path: kernels.get(name) for path, kernels in row["kernels"].items()}
            times = [(path, t) for path, t in found.items() if t is not None and (path == "softcap") == softcap]
            if row["run"] == 0 or kernel in row["tried"]:
                said = ", ".join(f"{path} {t / 1e3:.2f}" for path, t in times)
                lines.append(f"{kernel} {row['tried'].get(kernel, 'table')}: {said or 'failed'}")
    for row in numbered[:1]:
        for path, kernels in row["kernels"].items():
            times = {k: t for k, t in kernels.items() if not isinstance(t, str)}
            top = ", ".join(f"{k[:40]} {t / 1e3:.2f}" for k, t in list(times.items())[:12])
            lines.append(f"{path}: {sum(times.values()) / 1e3:.2f} ms: {top}")
    lines.append(f"off: {[row['off'] for row in numbered[1:]]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", default="8192x4096x128256")
    parser.add_argument("--only", nargs="+", choices=list(TILES), default=[], help="kernels to try tiles of")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for everything")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--time", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = shape_of(args.shape)
    if (why := why_not()) is not None:
        print(f"benchmarks.tiles: {why}", file=sys.stderr)
        return 2
    only = set(args.only) or set(TILES) - {other_weight_grad(shape.tokens)}
    if other_weight_grad(shape.tokens) in only:
        print(
            f"benchmarks.tiles: --only: expected no {other_weight_grad(shape.tokens)} at {args.shape}, where dweight "
            f"is summed in {'one chunk' if shape.tokens <= ONE_CHUNK else 'chunks'} of {ONE_CHUNK} tokens",
            file=sys.stderr,
        )
        return 2
    for kernel in set(TILES) - only:
        del TILES[kernel]
    if args.compile is not None:
        compile_run(args.compile, shape)
    elif args.time is not None:
        time_runs(shape, Deadline(args.time))
    else:
        _run_all(args, Deadline(args.limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
