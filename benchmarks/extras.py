"""What the GPU benchmark measures beside the main table: shares, capture, waiting, compile times, curves."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import SHAPES, TINY, Batch, Shape, make_batch
from benchmarks.measure import FAILURES, Clock, Deadline, clean, describe, interleaved
from benchmarks.methods import bare_gemms, clha, clha_arguments, routed
from clha_fast import HeadOptions, linear_clha_loss

ROOT = Path(__file__).resolve().parent.parent
RANKING_KERNELS = ("combine_kernel", "prompts_kernel", "finish_kernel", "count_kernel")
OWN = ("workspace", "triton")


def _profile(step: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """Microseconds on the device by kernel name (none on a CPU)."""
    step()
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    return {event.key: float(event.self_device_time_total) for event in profile.key_averages()}


def ranking_share(device: str, tiny: bool) -> dict[str, Any]:
    """Device time of the ranking kernels over that of the step, for up to 4,096 candidates of two tokens."""
    base = TINY[0] if tiny else SHAPES[0]
    result = {}
    for candidates in (8, 16) if tiny else (64, 512, 4096):
        shape = dataclasses.replace(base, candidates=min(candidates, 64), mean_response=base.tokens // candidates)
        for path in OWN:
            batch = make_batch(shape, device)
            times = _profile(clha(batch, path), device == "cuda")
            total = sum(times.values())
            own = sum(time for name, time in times.items() if any(kernel in name for kernel in RANKING_KERNELS))
            result[f"{path}, {len(batch.lengths)} candidates"] = {
                "ranking_us": own,
                "step_us": total,
                "share": own / total if total else None,
            }
            clean()
    return result


def _fresh(batch: Batch) -> list[torch.Tensor]:
    return [g.clone() for g in batch.gradients()]


def graph_capture(device: str, tiny: bool) -> dict[str, Any]:
    """Forward and backward captured, replayed on other hidden states, and compared with a direct call."""
    if device != "cuda":
        return {"skipped": "needs a GPU"}
    base = TINY[0] if tiny else Shape(4096, 2048, 32000)
    result: dict[str, Any] = {}
    for path in OWN:
        batch = make_batch(base, device)
        step = clha(batch, path)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            batch.clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            with torch.no_grad():
                batch.hidden.mul_(0.5)
            graph.replay()
            replayed = _fresh(batch)
            step()
            same = all(torch.equal(a, b) for a, b in zip(replayed, _fresh(batch), strict=True))
            result[path] = {"captured": True, "bitwise_equal_to_a_direct_call": same}
        except FAILURES as failure:
            result[path] = {"captured": False, "failed": describe(failure)}
        clean()
    return result


def synchronisation(device: str, tiny: bool) -> dict[str, Any]:
    """Whether forward and backward run under torch's sync debug mode, which raises where the host waits."""
    if device != "cuda":
        return {"skipped": "needs a GPU"}
    base = TINY[0] if tiny else Shape(4096, 2048, 32000)
    result: dict[str, Any] = {}
    for path in OWN:
        for on_device in (True, False):
            batch = make_batch(base, device, padded=True, on_device=on_device)
            name = f"{path}, sizes on the {'GPU' if on_device else 'CPU'}"
            step = clha(batch, path, HeadOptions(workspace_bytes=2 * 32000 * 1024))
            step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
                result[name] = "none"
            except FAILURES as failure:
                result[name] = describe(failure)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            clean()
    return result


def first_call(device: str, seconds: float) -> dict[str, Any]:
    """Compile times of each kernel in a fresh process with an empty cache."""
    if device != "cuda":
        return {"skipped": "needs a GPU"}
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "benchmarks.extras"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": "out of time"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["unknown"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _print_compile_times() -> None:
    """The child of `first_call`: seconds of the compiler by kernel, the slowest specialisation of each."""
    from triton import knobs

    slowest: dict[str, float] = {}

    def listener(*, src: Any, times: Any, **_others: Any) -> None:
        slowest[src.name] = max(slowest.get(src.name, 0.0), times.total / 1e6)

    knobs.compilation.listener = listener
    for build in (lambda b: clha(b, "workspace"), lambda b: clha(b, "triton"), lambda b: routed(b, "triton")):
        build(make_batch(Shape(1024, 2048, 32000), "cuda", padded=True))()
    torch.cuda.synchronize()
    print(json.dumps({"seconds_by_kernel": slowest, "slowest": max(slowest.values())}))


def long_input(device: str, tiny: bool, deadline: Deadline) -> dict[str, Any]:
    """131,072 scored tokens in one call."""
    shape = dataclasses.replace(TINY[0], tokens=192) if tiny else Shape(131072, 4096, 128256)
    batch = make_batch(shape, device, on_device=False)
    clock = Clock(device)
    result: dict[str, Any] = {"shape": shape.name}
    for path in OWN:
        if not deadline.allows(15):
            result[path] = {"failed": "out of time"}
            continue
        rows = interleaved({path: clha(batch, path)}, clock, 1, deadline)
        result[path] = rows[path]
        batch.clear()
        clean()
    return result


def over_candidates(device: str, tiny: bool, deadline: Deadline) -> list[dict[str, Any]]:
    """Time over the number of candidates a prompt, at a fixed number of scored tokens."""
    base, clock = (TINY[0] if tiny else SHAPES[0]), Clock(device)
    rows = []
    for n in (2, 4) if tiny else (2, 4, 8, 16, 32, 64):
        if not deadline.allows(5):
            break
        response = max(1, base.tokens // max(n, 8 if tiny else 64))
        batch = make_batch(dataclasses.replace(base, candidates=n, mean_response=response), device, on_device=False)
        steps = {"bound": bare_gemms(batch), **{path: clha(batch, path) for path in OWN}}
        rows.append({"candidates": n, "methods": interleaved(steps, clock, 2, deadline)})
        clean()
    return rows


def over_kept_share(device: str, tiny: bool, deadline: Deadline) -> list[dict[str, Any]]:
    """Time of the routed backward over the share of (token, block) pairs that it keeps."""
    base, clock = (TINY[0] if tiny else SHAPES[0]), Clock(device)
    rows: list[dict[str, Any]] = []
    for nats in (2.2,) if tiny else (1.4, 2.2, 3.9):
        batch = make_batch(base, device, nats=nats)
        for mass in (0.0, 1e-2) if tiny else (0.0, 1e-3, 1e-2, 1e-1):
            if not deadline.allows(5):
                return rows
            head = HeadOptions(max_dropped_mass=mass)
            steps = {"bound": bare_gemms(batch), "fused": clha(batch, "triton"), "routed": clha(batch, "triton", head)}
            found = interleaved(steps, clock, 2, deadline)
            rows.append({"entropy": batch.entropy, "dropped_mass": mass, **kept(batch, head), "methods": found})
            batch.clear()
        clean()
    return rows


def kept(batch: Batch, head: HeadOptions) -> dict[str, float]:
    """Share of the pairs that a routed backward keeps, and the mass that it drops, of this batch."""
    _, metrics = linear_clha_loss(**clha_arguments(batch, "triton", head))
    return {"kept_share": float(metrics.kept_block_share), "mean_dropped_mass": float(metrics.dropped_mass)}


if __name__ == "__main__":
    _print_compile_times()
