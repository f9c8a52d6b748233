"""Before any speed is reported: every path of the library against float64, in every dtype the device has.

A path that is wrong is not timed.

The bar is the contract's: no more than 1.05 times the error of the same loss done eagerly in that dtype. A routed
backward is held to its dtype's own rounding besides what it was allowed to drop. A CPU times each method that agrees
with the eager loss (`check`); how far a GPU's peers are from it is recorded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import TINY, Batch, Shape, Workload, make_batch, shrink, workload_batch
from benchmarks.measure import FAILURES, BrokenDeviceError, Deadline, Step, describe, is_broken
from benchmarks.methods import CPU_METHODS, DROPPED, GPU_METHODS, LOGPS, clha_arguments, methods_of, routed
from benchmarks.processes import OUT_OF_TIME, output_within
from clha_fast import HeadOptions, linear_clha_loss, reference, token_logps

BAR = 1.05
# A float32 error over a few hundred tokens is noisy by itself.
SEEDS = (0, 1, 2)
FLAT = "flat softmax"
NAMES = ("value", "dhidden", "dweight", "dbias")
LEAVES = ("hidden", "weight", "bias")
# All tests that are marked for a GPU. They import nothing but torch, triton, pytest and the library's loss.
OWN_TESTS = ("tests/kernels/test_gpu_triton.py", "tests/backends/test_no_waiting.py")
Inputs = list[dict[str, Any]]
Result = list[list[Tensor]]


class IncorrectError(RuntimeError):
    """A path is wrong; no speed is reported."""


def _error(values: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of the differences over norm of the exact values, both over all seeds together."""
    off = sum(float((v.double() - e).square().sum()) for v, e in zip(values, exact, strict=True))
    return (off / sum(float(e.square().sum()) for e in exact)) ** 0.5


def _run(inputs: Inputs, dtype: torch.dtype, backend: Any, head: HeadOptions, of_loss: bool) -> Result:
    """(value, dhidden, dweight, dbias) of every seed: of the CLHA loss, or of token log-probabilities.

    The loss is asked where the softmax is peaked. Where it is flat, every token of a candidate has the same p - 1, a
    batch has few different coefficients, and whether one of them happens to be a 16-bit number decides the eager
    error: there each token gets an upstream gradient of its own.
    """
    results = []
    for one in inputs:
        leaves = {name: one[name].to(dtype).requires_grad_() for name in LEAVES if name in one}
        if of_loss:
            value, _ = linear_clha_loss(**(one | leaves | {"head": head, "backend": backend}))
            upstream = torch.tensor(0.5, dtype=value.dtype, device=value.device)
        else:
            names = ("targets", "row_index")
            value = token_logps(**leaves, **{n: one[n] for n in names}, head=head, backend=backend)
            draw = torch.Generator().manual_seed(len(results))
            upstream = torch.randn(value.shape, generator=draw).to(value.device, value.dtype)
        results.append((value.detach(), *torch.autograd.grad(value, list(leaves.values()), upstream)))
    return [list(part) for part in zip(*results, strict=True)]


DTYPES = ("float32", "float16", "bfloat16")
SOFTCAP = HeadOptions(softcap=20.0)
# Name: entropy in nats (None: random weights), bias, and the head. What is timed has neither bias nor softcap.
CASES: dict[str, tuple[float | None, bool, HeadOptions]] = {
    FLAT: (None, False, HeadOptions()),
    f"{FLAT}, bias": (None, True, HeadOptions()),
    "peaked": (2.0, False, HeadOptions()),
    "peaked, softcap, chunks, bias": (2.0, True, SOFTCAP),
}
# Name: backend, and what a routed backward drops.
PATHS: dict[str, tuple[str, float | None]] = {
    "triton": ("triton", None),
    "workspace": ("workspace", None),
    "torch": ("torch", None),
    "routed 0": ("triton", 0.0),
    "routed 0.01": ("triton", 1e-2),
}


def _inputs(case: str, dtype: torch.dtype, device: str, tiny: bool) -> tuple[Inputs, HeadOptions]:
    nats, has_bias, head = CASES[case]
    tokens, width, vocabulary = (24, 16, 141) if tiny else (700, 256, 5003)
    if "chunks" in case:
        head = head.replace(workspace_bytes=vocabulary * tokens)
    shape = Shape(tokens, width, vocabulary, mean_response=max(2, tokens // 12), dtype=torch.float32)
    inputs = []
    for seed in SEEDS[: 1 if tiny else None]:
        batch = make_batch(shape, device, padded=True, nats=nats, seed=seed, on_device=seed != SEEDS[1])
        own = {"hidden": batch.hidden.detach().to(dtype), "weight": batch.weight.detach().to(dtype)}
        if has_bias:
            own["bias"] = (torch.arange(vocabulary, device=device) % 7 / 10).to(dtype)
        inputs.append(clha_arguments(batch, "reference") | own)
    return inputs, head


class _Bar:
    """Errors of the eager loss in a dtype, and the rows of what was compared with them."""

    def __init__(self, case: str, dtype: torch.dtype, inputs: Inputs, head: HeadOptions) -> None:
        self.case, self.dtype = case, dtype
        self.of_loss = not case.startswith(FLAT)
        self.exact = _run(inputs, torch.float64, "reference", head, self.of_loss)
        self.eager = _run(inputs, dtype, "reference", head, self.of_loss)
        self.rows: list[dict[str, Any]] = []
        self.floor = 0.0
        if dtype == torch.float32:
            # A float32 logit of size z is off by z * 2^-24 whoever forms it, and a probability by a few roundings more:
            # below that, neither of two orders of operations is the better one.
            one = {name: inputs[0][name].detach().double() for name in LEAVES if name in inputs[0]}
            logits = reference.logits(one["hidden"], one["weight"], one.get("bias"), head)
            self.floor = max(8.0, float(logits.abs().max())) * 2.0**-24

    def compare(self, path: str, found: Result, names: tuple[str, ...], extra: float = 0.0) -> None:
        for place, name in enumerate(NAMES[: len(self.exact)]):
            if name not in names:
                continue
            error = _error(found[place], self.exact[place])
            bar = max(BAR * _error(self.eager[place], self.exact[place]), self.floor) + extra
            # Values are float32 sums of few numbers: their rounding is as good as any.
            bar = max(bar, 1e-5) if name == "value" else bar
            dtype = str(self.dtype).removeprefix("torch.")
            self.rows.append({"path": path, "dtype": dtype, "case": self.case, "of": name, "error": error, "bar": bar})
            if not error <= bar:
                raise IncorrectError(
                    f"{path}, {dtype}, {self.case}: error of {name} is {error:.3g}, expected <= {bar:.3g}"
                )


def check_paths(
    device: str,
    paths: Sequence[str] = tuple(PATHS),
    dtype: str = "float32",
    tiny: bool = False,
    found: Callable[[dict[str, Any]], None] = lambda sofar: None,
    cases: Sequence[str] = tuple(CASES),
) -> dict[str, Any]:
    """{"rows": a row a path, case and gradient, "wrong": {path: why}} in a dtype.

    Wrong is a path whose error is over the bar, whose two runs differ, or which fails. found: gets what is known after
    every case.
    """
    rows: list[Any] = []
    wrong: dict[str, str] = {}
    kind = getattr(torch, dtype)
    for case in cases:
        inputs, head = _inputs(case, kind, device, tiny)
        bar = _Bar(case, kind, inputs, head)
        for path in paths:
            if path in wrong:
                continue
            try:
                _check(bar, path, inputs, head, tiny)
            except IncorrectError as reason:
                wrong[path] = str(reason)
            except FAILURES as failure:
                wrong[path] = f"{path}, {dtype}, {case}: {describe(failure)}"
            if path in wrong and is_broken():
                raise BrokenDeviceError(path, wrong[path])
        rows += bar.rows
        found({"rows": rows, "wrong": wrong})
    return {"rows": rows, "wrong": wrong}


def _check(bar: _Bar, path: str, inputs: Inputs, head: HeadOptions, tiny: bool) -> None:
    """Nothing is lost at a dropped mass of 0; else no more than that, beside the dtype's own error."""
    backend, mass = PATHS[path]
    result = _run(inputs, bar.dtype, backend, head.replace(max_dropped_mass=mass), bar.of_loss)
    if mass is not None:
        bar.compare(path, result, ("dhidden", "dweight"), mass)
        return
    again = _run(inputs[:1], bar.dtype, backend, head, bar.of_loss)
    if not all(torch.equal(a[0], b[0]) for a, b in zip(result, again, strict=True)):
        raise IncorrectError(f"{path}, {bar.dtype}, {bar.case}: two runs differ")
    # A few hundred bias gradients are too few for a ratio of two roundings to mean anything.
    bar.compare(path, result, NAMES[:3] if tiny else NAMES)


def errors(step: Step, batch: Batch, loss: Tensor, wanted: Batch) -> dict[str, float]:
    """Norm over norm, how far a step's loss and gradients are from the wanted loss and the gradients in `wanted`."""
    found = (step(), *batch.gradients())
    pairs = zip(("loss", "dhidden", "dweight"), found, (loss, *wanted.gradients()), strict=True)
    return {of: _error([value], [right.double()]) for of, value, right in pairs}


def check(name: str, workload: Workload) -> None:
    """Raises IncorrectError when loss or gradients differ from eager's in float32 by over 1e-4 in norm.

    Routed gradients may differ by `DROPPED` in norm; with nothing dropped they must pass as the others do.
    """
    small = shrink(workload, 8)
    wanted = workload_batch(small)
    loss = CPU_METHODS["eager"].build(wanted)()
    build = CPU_METHODS[name].build
    runs = [(build, 1e-4)]
    if name == "clha_fast_routed":
        runs = [(build, DROPPED), (lambda batch: routed(batch, "torch", 0.0), 1e-4)]
    for build, tolerance in runs:
        batch = workload_batch(small)
        for of, error in errors(build(batch), batch, loss, wanted).items():
            if not error < (1e-4 if of == "loss" else tolerance):
                raise IncorrectError(f"{name} on {workload.name}: {of} is off by {error:.2e}; no speed is reported")


def check_peers(device: str, tiny: bool, deadline: Deadline) -> dict[str, Any]:
    """How far each peer's gradients of the CLHA loss are from eager's on a small shape: recorded, not judged."""
    shape = TINY[0] if tiny else Shape(1024, 1024, 32000)
    wanted = make_batch(shape, device)
    eager = GPU_METHODS["eager_hf"].build(wanted)()
    found: dict[str, Any] = {}
    for name in methods_of("scored"):
        method = GPU_METHODS[name]
        if method.own or method.compiles or method.computes != LOGPS or name == "eager_hf":
            continue
        if not deadline.allows(0):
            found[name] = {"failed": OUT_OF_TIME}
            continue
        batch = make_batch(shape, device)
        try:
            off = errors(method.build(batch), batch, eager, wanted)
            found[name] = {of: off[of] for of in ("dhidden", "dweight")}
        except FAILURES as failure:
            found[name] = {"failed": describe(failure)}
            if is_broken():
                break
    return found


def run_tests(seconds: float, collect: bool = False) -> dict[str, Any]:
    """{"passed": pytest's last line}, {"wrong": ...} or {"failed": why it could not be told}.

    collect: only find them, as far as a machine without a GPU can go.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"failed": "not installed: pytest"}
    # Without conftest.py, which needs hypothesis and serves machines without a GPU.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider"]
    if collect:
        command += ["--collect-only"]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]  # they compile most of the time
    out, _, status = output_within([*command, *OWN_TESTS], seconds, merge=True)
    lines = out.strip().splitlines() or [""]
    if status is None:
        return {"failed": OUT_OF_TIME}
    if status == 0:
        return {"passed": lines[-1]}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    # 1: tests failed. Others: pytest itself could not go on.
    return {"wrong" if status == 1 else "failed": lines[-1], "tests": failed[:20]}
