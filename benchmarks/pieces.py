"""What the GPU benchmark does in processes of its own: `python -m benchmarks.pieces DEVICE PIECE`, JSON on stdin.

Each piece says what it knows as lines of JSON, the last of which counts (`processes.run_piece`). A process whose GPU
context is broken says by what method, and ends: its parent starts another without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__" and sys.argv[1] == "cpu":
    # Read once, when triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import correct, extras
from benchmarks.inputs import TINY, Batch, Shape, make_batch
from benchmarks.measure import (
    FAILURES,
    BrokenDeviceError,
    Clock,
    Deadline,
    describe,
    interleaved,
    is_broken,
    peak_bytes,
)
from benchmarks.methods import DROPPED, GPU_METHODS, clha, routed
from benchmarks.processes import end_with_parent
from benchmarks.roofline import ceilings_of, cost, counted_bytes
from clha_fast import HeadOptions

Found = Callable[[dict[str, Any]], None]
PEAK_NATS = 2.0
# Paths and their names in the cost model, which counts their memory.
MODELS = {"triton": "fused", "workspace": "workspace"}


def first_look(device: str, deadline: Deadline, found: Found, path: str, tiny: bool = False) -> None:
    """What is here, one small loss by a path with its error beside eager's, and its peak beside what was counted."""
    found({"device": _device(device)})
    dtype = "float32" if device == "cpu" else "bfloat16"
    start = time.perf_counter()
    result = correct.check_paths(device, (path,), dtype, tiny, cases=tuple(correct.CASES)[:1])
    found({"one_loss": {"seconds": round(time.perf_counter() - start, 1), **result}})
    shape = TINY[0] if tiny else Shape(4096, 2048, 32000)
    batch = make_batch(shape, device, on_device=False)
    step = clha(batch, path)
    step()
    batch.clear()
    counted = counted_bytes(MODELS[path], shape)[1]
    found({"memory": {"peak_bytes": peak_bytes(step, device), "counted_bytes": counted}})


def _device(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"name": "CPU", "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "l2_bytes": getattr(about, "L2_cache_size", None),
    }


def warm(device: str, deadline: Deadline, found: Found, shape: dict[str, Any], padded: bool, path: str) -> None:
    """Compiles what the library launches at a shape, by running few of its tokens."""
    batch = make_batch(dataclasses.replace(_shape(shape), tokens=1024), device, padded=padded)
    # A small workspace has several chunks of tokens, whose sums are a variant of their own.
    heads = (HeadOptions(), HeadOptions(workspace_bytes=2**18))
    start = time.perf_counter()
    if path == "routed":
        routed(batch, "triton")()
    else:
        for head in heads if path == "triton" else heads[:1]:
            clha(batch, path, head)()
    found({"seconds": round(time.perf_counter() - start, 1)})


def check(device: str, deadline: Deadline, found: Found, paths: list[str], dtype: str, tiny: bool = False) -> None:
    """Errors of paths in a dtype, see `correct.check_paths`."""
    result = correct.check_paths(device, paths, dtype, tiny, found)
    found(result)


def peers(device: str, deadline: Deadline, found: Found, tiny: bool = False) -> None:
    found(correct.check_peers(device, tiny, deadline))


def speed(
    device: str,
    deadline: Deadline,
    found: Found,
    shape: dict[str, Any],
    mode: str,
    methods: list[str],
    rounds: int,
) -> None:
    """One shape in one mode: times of its methods, interleaved.

    Until each has run once, "at" is the one that does now: what is killed then is known by name.
    """
    wanted = _shape(shape)
    batch = make_batch(wanted, device, padded=mode in ("padded", "pairs"), nats=PEAK_NATS if mode == "peaked" else None)
    entry: dict[str, Any] = {"entropy": batch.entropy, "rows": batch.rows, "methods": {}}
    steps: dict[str, Callable[[], Any]] = {}

    def starting(name: str) -> None:
        entry["at"] = name
        found(entry)

    for name in methods:
        if GPU_METHODS[name].compiles and not deadline.allows(60):
            entry["methods"][name] = {"failed": "out of time"}
            continue
        starting(name)
        try:
            steps[name] = GPU_METHODS[name].build(batch)
        except FAILURES as failure:
            entry["methods"][name] = {"failed": describe(failure)}
            _stop_if_broken(name, describe(failure))

    def keep(rows: dict[str, dict[str, Any]]) -> None:
        entry["at"] = None
        for name, row in rows.items():
            entry["methods"][name] = row | _known(name, wanted, batch, row)
        found(entry)

    rows = interleaved(steps, Clock(device), rounds, deadline, first=starting, after=keep)
    keep(rows)
    if "seconds" in rows.get("routed", {}) and deadline.allows(0):
        entry.update(extras.kept(batch, HeadOptions(max_dropped_mass=DROPPED)))
        found(entry)


def _known(name: str, shape: Shape, batch: Batch, row: dict[str, Any]) -> dict[str, Any]:
    """Operations and bytes beside a time: of the cost model where there is one."""
    method = GPU_METHODS[name]
    rows = batch.rows if name in ("eager_hf", "published", "torch_compile") else shape.tokens
    shape = dataclasses.replace(shape, tokens=rows)
    flops = 2.0 * method.gemms * rows * shape.width * shape.vocabulary
    result: dict[str, Any] = {"computes": method.computes, "flops": flops}
    if method.model is None:
        elements = (rows + shape.vocabulary) * shape.width
        result |= {"bytes": 2 * elements * shape.dtype.itemsize, "bytes_are": "inputs and gradients, once"}
    else:
        model = cost(method.model, shape, ceilings_of(None, "NVIDIA H200"))
        result |= {"bytes": model.bytes, "bytes_are": "the cost model's"}
    if "seconds" in row:
        result["tflops_per_second"] = flops / row["seconds"] / 1e12
    return result


EXTRAS: dict[str, Callable[[str, bool, Deadline], Any]] = {
    "synchronisation": lambda device, tiny, deadline: extras.synchronisation(device, tiny),
    "graph_capture": lambda device, tiny, deadline: extras.graph_capture(device, tiny),
    "ranking_share": lambda device, tiny, deadline: extras.ranking_share(device, tiny),
    "over_candidates": extras.over_candidates,
    "over_kept_share": extras.over_kept_share,
    "long_input": extras.long_input,
    "first_call": lambda device, tiny, deadline: extras.first_call(device, deadline.left() - 5),
}


def extra(device: str, deadline: Deadline, found: Found, name: str, tiny: bool = False) -> None:
    try:
        found({"result": EXTRAS[name](device, tiny, deadline)})
    except FAILURES as failure:
        found({"failed": describe(failure)})


def _shape(fields: dict[str, Any]) -> Shape:
    return Shape(**fields | {"dtype": getattr(torch, fields["dtype"])})


def shape_fields(shape: Shape) -> dict[str, Any]:
    """A shape on its way to another process."""
    return vars(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")}


def _stop_if_broken(name: str, reason: str) -> None:
    if is_broken():
        raise BrokenDeviceError(name, reason)


PIECES: dict[str, Callable[..., None]] = {
    piece.__name__: piece for piece in (first_look, warm, check, peers, speed, extra)
}


def main() -> int:
    device, name = sys.argv[1:]
    end_with_parent()
    arguments = json.load(sys.stdin)
    last: dict[str, Any] = {}

    def found(sofar: dict[str, Any]) -> None:
        last.update(sofar)
        print(json.dumps(last), flush=True)

    try:
        PIECES[name](device, Deadline(arguments.pop("seconds")), found, **arguments)
    except BrokenDeviceError as broken:
        found({"broken": broken.method, "why": broken.reason})
    except FAILURES as failure:
        found({"failed": describe(failure)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
