"""Peak memory of methods in a process of its own: a job as a JSON line in, a result as a JSON line out.

Run by both benchmarks: `python -m benchmarks.memory DEVICE`. The figure is the peak above the inputs, so that gradients
are in it; what it counts on a device says `measure.peak_bytes`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.inputs import TINY, Batch, Shape, Workload, make_batch, workload_batch
from benchmarks.measure import FAILURES, clean, describe, peak_bytes
from benchmarks.methods import CPU_METHODS, GPU_METHODS, Method
from benchmarks.processes import OUT_OF_TIME, end_with_parent, output_within

KINDS = {kind.__name__: kind for kind in (Shape, Workload)}
TINY_WORKLOAD = Workload("tiny", hidden_size=64, vocabulary=512, prompts=1, candidates=2, prompt_tokens=4)


@dataclass(frozen=True)
class Job:
    """A method of the GPU at a shape, on scored rows or on the padded batch, or one of the CPU at a workload."""

    method: str
    inputs: Shape | Workload
    padded: bool = False

    def encode(self) -> str:
        fields = vars(self.inputs) | {"dtype": str(self.inputs.dtype).removeprefix("torch.")}
        return json.dumps([self.method, type(self.inputs).__name__, fields, self.padded])

    @classmethod
    def decode(cls, text: str) -> Job:
        method, kind, fields, padded = json.loads(text)
        return cls(method, KINDS[kind](**fields | {"dtype": getattr(torch, fields["dtype"])}), padded)

    def find(self) -> Method:
        return (CPU_METHODS if isinstance(self.inputs, Workload) else GPU_METHODS)[self.method]

    def batch(self, device: str, tiny: bool = False) -> Batch:
        if isinstance(self.inputs, Workload):
            return workload_batch(TINY_WORKLOAD if tiny else self.inputs, device)
        return make_batch(TINY[0] if tiny else self.inputs, device, padded=self.padded)


def measure(job: Job, device: str) -> dict[str, Any]:
    """{"peak_bytes": ..., "gradient_bytes": ...} or {"failed": ...}."""
    clean()
    try:
        method = job.find()
        if device == "cpu":  # the libraries' own threads and buffers are not the method's
            method.build(job.batch(device, tiny=True))()
        batch = job.batch(device)
        step = method.build(batch)
        if device != "cpu" or method.compiles:  # nor what a first call allocates for good, nor a compiler's
            step()
            batch.clear()
        else:
            torch.mm(batch.hidden.detach()[:128], batch.weight.detach()[:128].t())
        return {"peak_bytes": peak_bytes(step, device), "gradient_bytes": batch.gradient_bytes}
    except (*FAILURES, OSError) as failure:
        return {"failed": describe(failure)}


def in_a_fresh_process(jobs: Sequence[Job], device: str, seconds: float | None = None) -> list[dict[str, Any]]:
    """Results of the jobs that ended in time; the others are "out of time"."""
    given = "\n".join(job.encode() for job in jobs)
    command = [sys.executable, "-m", "benchmarks.memory", device]
    out, _, status = output_within(command, 86400.0 if seconds is None else seconds, given)
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    missing = {"failed": OUT_OF_TIME if status is None else f"the process ended with {status}"}
    return found + [missing] * (len(jobs) - len(found))


def main() -> None:
    device = sys.argv[1]
    end_with_parent()
    for line in sys.stdin.read().splitlines():
        print(json.dumps(measure(Job.decode(line), device)), flush=True)


if __name__ == "__main__":
    main()
