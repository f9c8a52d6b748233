"""Peak memory of one training step of the loss above its inputs, in this fresh process; prints one number of bytes.

Run by `benchmarks.cpu` as a child: `python -m benchmarks.peak WORKLOAD METHOD`.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from benchmarks.cpu_methods import COMPILED, METHODS, training_step
from benchmarks.workloads import Workload, find, make_batch


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_above_inputs(workload: Workload, method: str) -> int:
    """Bytes of resident memory that one forward and backward needed above inputs that were there before."""
    # The libraries' own threads and buffers are not the method's: a tiny step brings them up first.
    tiny = Workload("tiny", hidden_size=64, vocabulary=512, prompts=1, candidates=2, prompt_tokens=4)
    training_step(method, make_batch(tiny))()
    batch = make_batch(workload)
    if method in COMPILED:  # a compiler's memory is not the method's either
        training_step(method, batch)()
        batch.clear()
    torch.mm(batch.hidden.detach()[:128], batch.weight.detach()[:128].t())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    training_step(method, batch)()
    return _status("VmHWM") - before


if __name__ == "__main__":
    name, method = sys.argv[1:]
    if method not in METHODS:
        raise SystemExit(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    print(peak_above_inputs(find(name), method))
