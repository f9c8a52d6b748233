"""Predicts each path's time from its operations, its bytes and a device's ceilings, beside what was measured.

    python -m benchmarks.roofline [--device "NVIDIA H100"] [--results benchmarks/results]

A model of three terms: matrix products at the rate that bare ones reach, bytes outside of them at the rate of a copy,
and for products written in Triton an efficiency. Predictions are predictions: they are printed, never written into a
results file, and a path without a measurement says "not measured".
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import render_gpu
from benchmarks.inputs import SHAPES, WORKLOADS, Shape
from clha_fast.backends.memory import Workspace

ROOT = Path(__file__).resolve().parent
NOT_MEASURED = "not measured"
MIB = 2**20
# Share of the vendor's rate that a persistent Triton product reaches, without its epilogue: 0.95 the forward, 0.97
# dweight, on an H200 (`benchmarks.tiles`, results/gpu-tiles.json). Published for hand-written CuTe: 0.90.
TRITON_EFFICIENCY = 0.95
# The fused backward's workspace, in elements.
FUSED_ELEMENTS = 2**25
# Share of (token, block) pairs that a softmax of 2.2 nats keeps at 1e-2 dropped mass and blocks of 128 words; simulated
# on unstructured weights.
KEPT_SHARE = 0.14


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach: dense 16-bit products in FLOP/s, and copies in bytes/s."""

    name: str
    flops: float
    bandwidth: float
    source: str


DEVICES = {
    "NVIDIA H200": Ceilings("NVIDIA H200", 790e12, 4.3e12, "products as measured; a copy's rate taken as an H200's"),
    # 3 * 2 * 8192 * 4096 * 151936 operations in the 42 ms published for a bare cuBLAS head.
    "NVIDIA H100": Ceilings("NVIDIA H100", 728e12, 3.0e12, "published 42 ms of a bare head at 8192 x 4096 x 151936"),
}


@dataclass(frozen=True)
class Cost:
    """Operations, bytes of memory traffic (products' operands and results included), and the predicted seconds."""

    flops: float
    bytes: float
    seconds: float


class _Sum:
    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self.flops = self.bytes = self.seconds = 0.0

    def product(self, m: int, n: int, k: int, size: int, share: float = 1.0, efficiency: float = 1.0) -> None:
        """`share` of an m x n x k product of `size`-byte elements: bound by arithmetic or by its own traffic."""
        flops, traffic = 2.0 * m * n * k * share, size * (m * k + n * k + m * n * share)
        self.flops += flops
        self.bytes += traffic
        self.seconds += max(flops / (self.ceilings.flops * efficiency), traffic / self.ceilings.bandwidth)

    def traffic(self, count: float) -> None:
        """Bytes that nothing hides."""
        self.bytes += count
        self.seconds += count / self.ceilings.bandwidth

    def cost(self) -> Cost:
        return Cost(self.flops, self.bytes, self.seconds)


def cost(
    path: str,
    shape: Shape,
    ceilings: Ceilings,
    kept_share: float = KEPT_SHARE,
    chunk_tokens: int | None = None,
    weight_gradient: bool = True,
) -> Cost:
    """The model of a path: "bound", "bound_forward", "workspace", "fused", "fused_forward", "routed" or "eager".

    kept_share: of (token, block) pairs, for "routed", whose dropped mass is not 0. chunk_tokens: of the workspace, None
    for its default.
    weight_gradient: False for a frozen head ("bound", "workspace", "fused" and "routed").
    """
    n, h, v, size = shape.tokens, shape.width, shape.vocabulary, shape.dtype.itemsize
    total = _Sum(ceilings)
    blocks = -(-v // 128)
    if path == "bound_forward":
        total.product(n, v, h, size)
    elif path == "bound":
        total.product(n, v, h, size)
        total.product(n, h, v, size)
        if weight_gradient:
            total.product(v, h, n, size)
    elif path == "workspace":
        total.product(n, v, h, size)
        total.product(n, h, v, size)
        total.traffic(3.0 * size * n * v)  # statistics read; gradient reads and writes
        total.traffic((4.0 + size) * n * h)  # upstream gradient multiplied in, rounded
        if weight_gradient:
            total.product(v, h, n, size)
            chunks = -(-n // (chunk_tokens or Workspace(v, h, size).tokens))
            # The float32 sum is read and written for every chunk but the first, and rounded like dhidden; of one chunk
            # it is there some rows at a time, which the same bytes are for.
            total.traffic(8.0 * v * h * (chunks - 1) + (4.0 + size) * v * h)
    elif path in ("fused_forward", "fused", "routed"):
        total.product(n, v, h, size, efficiency=TRITON_EFFICIENCY)
        total.traffic(16.0 * blocks * n)  # block maxima and sums, written and read
        if path != "fused_forward":
            tokens = min(n, 8192)
            # Float32 rows of dhidden, read and written for every chunk of words.
            total.traffic(8.0 * n * h * -(-v // min(v, FUSED_ELEMENTS // tokens)))
            share = kept_share if path == "routed" else 1.0
            total.product(n, v, h, size, share, TRITON_EFFICIENCY)
            total.product(n, h, v, size, share, TRITON_EFFICIENCY)
            if weight_gradient:
                total.product(v, h, n, size, share, TRITON_EFFICIENCY)
                if path == "fused" and n > tokens:
                    # And a chunk of dweight for every chunk of tokens.
                    total.traffic(8.0 * v * h * -(-n // tokens))
        if path == "routed":
            # The left-out blocks' means: formed in one read of the weight, masses turned into an operand, a product of
            # the vendor's, and what it gives as the start of the float32 sums.
            total.traffic(float(size) * v * h + (4.0 + size) * blocks * n + (4.0 + size) * n * h)
            total.product(n, h, blocks, size)
    elif path == "eager":
        total.product(n, v, h, size)
        total.product(n, h, v, size)
        total.product(v, h, n, size)
        # Copied to float32, log-softmax, zeros for the gather's gradient, softmax's gradient, copied back.
        total.traffic((size + 4.0 + 8.0 + 8.0 + 12.0 + 4.0 + size) * n * v)
    else:
        raise ValueError(f"path: expected one of the modelled paths, got {path!r}")
    return total.cost()


def counted_bytes(path: str, shape: Shape) -> tuple[int, int]:
    """(bytes of a fused forward, of the whole call, gradients included) at the peak above the inputs, by the design.

    path: "fused", "routed" or "workspace". For 16-bit inputs in the caller's own rows, all gradients wanted, no
    `workspace_bytes`. About 100 bytes a token go to what is numbered by tokens: targets, log-sum-exps, coefficients,
    their order.
    """
    n, h, v = shape.tokens, shape.width, shape.vocabulary
    small = 100 * n + MIB
    if path == "workspace":
        return 0, Workspace(v, h, 2).peak(n) + small
    # dhidden comes last, in the place of the sorted rows.
    dweight, rows = 2 * v * h, 6 * -(-n // 128) * 128 * h
    # Tokens go in chunks of 8192 by 4096 words; with several, a chunk's words are summed in float32.
    partial = 4 * 4096 * h if n > 8192 else 0
    if path == "fused":
        return 8 * n * -(-v // 256) + small, dweight + 64 * MIB + rows + partial + small
    blocks = -(-v // 128)
    route = 4 * n * blocks
    return 3 * route + small, dweight + 65 * MIB + rows + route + 8 * blocks * -(-n // 512) + small


PATHS = ("bound_forward", "fused_forward", "bound", "workspace", "fused", "routed", "eager")
# Name in a results file of each modelled path that has another there.
MEASURED_AS = {"eager": "eager_hf"}


def _entry(report: dict[str, Any], shape: Shape, mode: str) -> dict[str, Any]:
    """A shape and mode of a GPU report, without a method where there is none; a dry run measures nothing."""
    entries = [] if report.get("dry_run", True) else report.get("shapes", [])
    return next((e for e in entries if (e["shape"], e["mode"]) == (shape.name, mode)), {"methods": {}})


def measured_seconds(report: dict[str, Any], shape: Shape, path: str) -> float | None:
    """A path's median in a GPU report, None where there is none."""
    entry = _entry(report, shape, "peaked" if path == "routed" else "scored")
    seconds: float | None = entry["methods"].get(MEASURED_AS.get(path, path), {}).get("seconds")
    return seconds


def ceilings_of(report: dict[str, Any] | None, device: str) -> Ceilings:
    """A device's ceilings; its own bare products in a report take the place of the tabulated rate."""
    known = next((c for name, c in DEVICES.items() if device.startswith(name)), None)
    if known is None:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    rates = []
    for shape in SHAPES if report else ():
        assert report is not None
        seconds = measured_seconds(report, shape, "bound")
        if seconds is not None:
            rates.append(6.0 * shape.tokens * shape.width * shape.vocabulary / seconds)
    if not rates:
        return known
    return Ceilings(device, max(rates), known.bandwidth, "the report's own bare products")


def table(report: dict[str, Any] | None, ceilings: Ceilings) -> str:
    """Predicted and measured milliseconds of every modelled path at every shape, and their ratios to the bound."""
    lines = [
        f"{ceilings.name}: {ceilings.flops / 1e12:.0f} TFLOP/s and {ceilings.bandwidth / 1e12:.1f} TB/s "
        f"({ceilings.source})",
        "",
        "| N x H x V | path | TFLOP | GB | predicted ms | over its bound | measured ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        # What the routed backward kept there, where that was recorded.
        share = _entry(report or {}, shape, "peaked").get("kept_share", KEPT_SHARE)
        for path in PATHS:
            found = cost(path, shape, ceilings, share)
            bound = cost("bound_forward" if path.endswith("forward") else "bound", shape, ceilings)
            seconds = None if report is None else measured_seconds(report, shape, path)
            cells = (
                shape.name,
                f"routed, {share:.0%} kept" if path == "routed" else path,
                f"{found.flops / 1e12:.1f}",
                f"{found.bytes / 1e9:.1f}",
                f"{found.seconds * 1e3:.1f}",
                f"{found.seconds / bound.seconds:.2f} x",
                NOT_MEASURED if seconds is None else f"{seconds * 1e3:.1f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes on this CPU, now: the best of five."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2.0 * source.nbytes / best


def cpu_table(report: dict[str, Any], bandwidth: float) -> str:
    """The torch backend on a CPU: the run's own bare products, and the passes over its logits at a copy's rate."""
    lines = ["| workload | GEMM rate of the run | predicted over the bound | measured |", "|---|---|---|---|"]
    for name, workload in report["workloads"].items():
        methods = workload["methods"]
        known = WORKLOADS.get(name)
        if known is None:
            lines.append(f"| {name} | {NOT_MEASURED} | - | {methods['clha_fast_torch']['over_bare_gemms']:.2f} x |")
            continue
        n, h, v = workload["scored_tokens"], known.hidden_size, known.vocabulary
        flops, bare = 6.0 * n * h * v, methods["bare_gemms"]["seconds"]
        passes = (4.0 * 4 * n * v + 8.0 * n * h) / bandwidth  # exponentials and their correction, in place; rows scaled
        measured = methods["clha_fast_torch"]["over_bare_gemms"]
        lines.append(f"| {name} | {flops / bare / 1e9:.0f} GFLOP/s | {1 + passes / bare:.2f} x | {measured:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DEVICES), help="one of them; default: all that were measured")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    reports = render_gpu.by_device(args.results)
    wanted = {d: r for d, r in reports.items() if args.device is None or d.startswith(args.device)}
    for device, report in wanted.items() or [(args.device or "NVIDIA H200", None)]:
        print(table(report, ceilings_of(report, device)) + "\n")
    cpu = args.results / "cpu.json"
    if cpu.exists():
        print("CPU, float32, copies measured now:\n")
        print(cpu_table(json.loads(cpu.read_text()), copy_bandwidth()))


if __name__ == "__main__":
    main()
