"""Clocks and memory of a device: interleaved rounds, a call's peak memory, the time left, where numbers come from."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from packaging.version import Version

from clha_fast.backends.torch.caches import caches

try:
    from triton import TritonError
except ImportError:  # a CPU does without
    TritonError = RuntimeError

Step = Callable[[], Any]
# What a foreign package may end in here; anything else is a mistake of ours and stops the run.
FAILURES = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    KeyError,
    IndexError,
    TritonError,
)
# Larger than any L2 in sight.
FLUSH_BYTES = 256 * 2**20
# What a GPU waits before a step that is timed, some 10 ms: the host, which launches, is ahead then, as it is behind the
# passes of a model. The library's own takes 1 to 3 ms to its first product, and would be timed for itself.
LEAD_CYCLES = 20_000_000
MIB = 2**20


class Deadline:
    """Seconds left of the whole run; every stage asks before it starts."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        return self.left() > seconds


def describe(failure: BaseException) -> str:
    """One line of what happened."""
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(failure, ImportError):
        return f"not installed: {failure}"
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"[:300]


def clean() -> None:
    """Frees what is not referenced, so that a peer that ran out of memory does not take the next one with it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class BrokenDeviceError(Exception):
    """A method left the GPU's context unusable: nothing else can run in this process."""

    def __init__(self, method: str, reason: str) -> None:
        super().__init__(f"{method}: {reason}")
        self.method, self.reason = method, reason


def is_broken() -> bool:
    """Whether this process's context on the GPU is of no more use, as after an illegal address."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


class Clock:
    """Times one call on a device: a GPU by events, with a flushed L2 and the host ahead, others by a wall clock.

    cpu_time: of the process's threads instead of the wall's, for a machine whose cores others use.
    """

    def __init__(self, device: str, cpu_time: bool = False) -> None:
        self.cuda = device == "cuda"
        self.now = time.process_time if cpu_time else time.perf_counter
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def seconds(self, step: Step) -> float:
        if not self.cuda:
            start = self.now()
            step()
            return self.now() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(LEAD_CYCLES)
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3


def interleaved(
    steps: dict[str, Step],
    clock: Clock,
    rounds: int,
    deadline: Deadline,
    bases: tuple[str, ...] = ("bound",),
    *,
    before: Step | None = None,
    failures: tuple[type[BaseException], ...] = FAILURES,
    progress: bool = False,
    first: Callable[[str], None] | None = None,
    after: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Medians and spreads over interleaved rounds, and medians of each round's ratio to every method in `bases`.

    The first round is not counted: it compiles, allocates and warms up. Each of the others takes the methods in another
    order, the same in every run: what comes before a method has left its mark on caches. A method that fails leaves the
    loop with its reason. Rounds stop early, after at least one, when the deadline is near; behind it no method but the
    first begins.
    before: called ahead of every step, not timed. first: gets each method's name ahead of its first step. after: gets
    what is known after each round. progress: a line a round.

    Raises:
        BrokenDeviceError: a method took the GPU's context with it.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    slowest, shuffled = 0.0, Random(0)
    for index in range(rounds + 1):
        if index > 1 and not deadline.allows(3 * slowest):
            break
        start = time.monotonic()
        order = list(steps.items())
        if index:
            shuffled.shuffle(order)
        for name, step in order:
            if name in failed:
                continue
            if not deadline.allows(0) and (times[name] or (index == 0 and name != next(iter(steps)))):
                if not times[name]:
                    failed[name] = "out of time"
                continue
            if first is not None and index == 0:
                first(name)
            if before is not None:
                before()
            try:
                seconds = clock.seconds(step)
            except failures as failure:
                failed[name] = describe(failure)
            else:
                if index:
                    times[name].append(seconds)
            if name in failed:  # outside of the handler, whose traceback holds what the method had allocated
                if clock.cuda and is_broken():
                    raise BrokenDeviceError(name, failed[name])
                clean()
        slowest = time.monotonic() - start if index else 0.0
        if progress:
            print(f"  round {index}/{rounds}", file=sys.stderr, flush=True)
        if after is not None and index:
            after(_summary(times, failed, bases))
    return _summary(times, failed, bases)


def _summary(
    times: dict[str, list[float]], failed: dict[str, str], bases: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        if name in failed or not own:
            result[name] = {"failed": failed.get(name, "out of time")}
            continue
        median = statistics.median(own)
        row: dict[str, Any] = {
            "seconds": median,
            "fastest": min(own),
            "spread": (max(own) - min(own)) / median,
            "rounds": len(own),
        }
        for base in bases:
            if times.get(base) and base not in failed:
                # Rounds that both took part in: the deadline may have come within one.
                ratios = [a / b for a, b in zip(own, times[base], strict=False)]
                row[f"over_{base}"] = statistics.median(ratios)
                if len(ratios) > 3:
                    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
                    row[f"over_{base}_quartiles"] = [low, high]
        result[name] = row
    return result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_bytes(step: Step, device: str) -> int:
    """One call's peak above what was held before: the allocator's on a GPU, resident memory of the process on a CPU."""
    clean()
    if device != "cuda":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        resident = _status("VmRSS")
        step()
        return _status("VmHWM") - resident
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def why_no_interpreter() -> str | None:
    """Why Triton's interpreter, and with it a dry run, cannot be had here."""
    found = versions("triton", "numpy")
    for name, version in found.items():
        if version == "not installed":
            return f"{name} is not installed"
    if Version(found["triton"]) < Version("3.7") and Version(found["numpy"]) >= Version("2.4"):
        return (
            f"the interpreter of Triton {found['triton']} fails with numpy {found['numpy']}; numpy < 2.4 would do, or "
            "Triton 3.7 (on a GPU neither matters)"
        )
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _origin() -> dict[str, Any]:
    return {
        # Named by hand where the tree was copied without its history.
        "commit": os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def gpu_environment(device: str) -> dict[str, Any]:
    """Where a GPU's numbers come from, or a dry run's."""
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
    packages = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "trl", "clha-fast")
    return _origin() | {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU dry run ({platform.machine()})",
        "gpu": _output("nvidia-smi", query, "--format=csv,noheader") if device == "cuda" else "none",
        "cuda": torch.version.cuda,
        "packages": versions(*packages),
    }


def cpu_kind(environment: dict[str, Any]) -> str:
    """A CPU's name, and what it has of vectors and caches where that is known."""
    parts = [environment["cpu"], environment.get("vector", "")]
    if known := environment.get("caches"):
        second, last = (known[level] / MIB for level in ("second", "last"))
        parts.append(f"{second:g} MiB of L2 a core, {last:g} MiB of last-level cache for {known['sharing']} CPUs")
    return ", ".join(filter(None, parts))


def cpu_environment() -> dict[str, Any]:
    """Where a CPU's numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return _origin() | {
        "cpu": models[0] if models else "unknown",
        "vector": torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512"),
        "caches": caches()._asdict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "versions": versions("torch", "trl", "cut-cross-entropy", "triton"),
    }
