"""Peak memory of methods in a process of its own: a job as a JSON line in, a result as a JSON line out.

Run by `benchmarks.gpu`: `python -m benchmarks.memory`. The figure is the allocator's peak above the inputs, so
that gradients are in it. A method is run once before it is measured, for what its first call allocates for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Shape, make_batch
from benchmarks.measure import FAILURES, clean, describe, peak_bytes
from benchmarks.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One method at one shape, on scored rows or on the padded batch."""

    method: str
    shape: Shape
    padded: bool = False

    def encode(self) -> str:
        s = self.shape
        values = [s.tokens, s.width, s.vocabulary, s.candidates, s.mean_response, str(s.dtype).removeprefix("torch.")]
        return json.dumps([self.method, values, self.padded])

    @classmethod
    def decode(cls, text: str) -> Job:
        method, (*sizes, dtype), padded = json.loads(text)
        return cls(method, Shape(*sizes, dtype=getattr(torch, dtype)), padded)


def measure(job: Job, device: str) -> dict[str, Any]:
    """{"peak_bytes": ...} or {"failed": ...}."""
    clean()
    try:
        batch = make_batch(job.shape, device, padded=job.padded)
        step = METHODS[job.method].build(batch)
        step()
        batch.clear()
        return {"peak_bytes": peak_bytes(step, device), "gradient_bytes": _gradient_bytes(job.shape, batch.rows)}
    except FAILURES as failure:
        return {"failed": describe(failure)}


def _gradient_bytes(shape: Shape, rows: int) -> int:
    return (rows + shape.vocabulary) * shape.width * shape.dtype.itemsize


def in_a_fresh_process(jobs: Sequence[Job], device: str, seconds: float) -> list[dict[str, Any]]:
    """Results of the jobs that ended in time; the others are "out of time"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory", device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        out, _ = process.communicate("\n".join(job.encode() for job in jobs), timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    missing = {"failed": "out of time" if process.returncode < 0 else f"the process ended with {process.returncode}"}
    return found + [missing] * (len(jobs) - len(found))


def main() -> None:
    device = sys.argv[1]
    for line in sys.stdin.read().splitlines():
        print(json.dumps(measure(Job.decode(line), device)), flush=True)


if __name__ == "__main__":
    main()
