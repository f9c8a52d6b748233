"""Before any speed is reported: every path of the library against float64, in every dtype the device has.

The bar is the contract's: no more than 1.05 times the error of the same loss done eagerly in that dtype. A routed
backward is held to its dtype's own rounding besides what it was allowed to drop. A CPU times each method that agrees
with the eager loss (`check`); how far a GPU's peers are from it is recorded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import TINY, Batch, Shape, Workload, make_batch, shrink, workload_batch
from benchmarks.measure import FAILURES, Step, describe
from benchmarks.methods import CPU_METHODS, DROPPED, GPU_METHODS, LOGPS, clha_arguments, methods_of, routed
from clha_fast import HeadOptions, linear_clha_loss, reference, token_logps

BAR = 1.05
# A float32 error over a few hundred tokens is noisy by itself.
SEEDS = (0, 1, 2)
FLAT = "flat softmax"
NAMES = ("value", "dhidden", "dweight", "dbias")
ROOT = Path(__file__).resolve().parent.parent
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
        leaves = {name: one[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")}
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


def _cases(device: str, tiny: bool) -> Iterator[tuple[str, torch.dtype, Inputs, HeadOptions]]:
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16)
    tokens, width, vocabulary = (48, 32, 205) if tiny else (700, 256, 5003)
    shape = Shape(tokens, width, vocabulary, mean_response=max(2, tokens // 12), dtype=torch.float32)
    for dtype in dtypes:
        for name, nats, head in (
            (FLAT, None, HeadOptions()),
            ("peaked, softcap, chunks", 2.0, HeadOptions(softcap=20.0, workspace_bytes=vocabulary * tokens)),
        ):
            inputs = []
            for seed in SEEDS:
                batch = make_batch(shape, device, padded=True, nats=nats, seed=seed, on_device=seed != SEEDS[1])
                inputs.append(
                    clha_arguments(batch, "reference")
                    | {
                        "hidden": batch.hidden.detach().to(dtype),
                        "weight": batch.weight.detach().to(dtype),
                        "bias": (torch.arange(vocabulary, device=device) % 7 / 10).to(dtype),
                    }
                )
            yield name, dtype, inputs, head


class _Bar:
    """Errors of the eager loss in a dtype, and the rows of what was compared with them."""

    def __init__(self, case: str, dtype: torch.dtype, inputs: Inputs, head: HeadOptions) -> None:
        self.case, self.dtype = case, dtype
        self.of_loss = case != FLAT
        self.exact = _run(inputs, torch.float64, "reference", head, self.of_loss)
        self.eager = _run(inputs, dtype, "reference", head, self.of_loss)
        self.rows: list[dict[str, Any]] = []
        self.floor = 0.0
        if dtype == torch.float32:
            # A float32 logit of size z is off by z * 2^-24 whoever forms it, and a probability by a few roundings more:
            # below that, neither of two orders of operations is the better one.
            one = inputs[0]
            logits = reference.logits(one["hidden"].double(), one["weight"].double(), one["bias"].double(), head)
            self.floor = max(8.0, float(logits.abs().max())) * 2.0**-24

    def compare(self, path: str, found: Result, names: tuple[str, ...], extra: float = 0.0) -> None:
        for place, name in enumerate(NAMES):
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
    device: str, paths: tuple[str, ...] = ("triton", "workspace", "torch"), tiny: bool = False
) -> list[Any]:
    """One row a path, dtype and case; raises IncorrectError at the first that is over the bar or not repeatable."""
    rows: list[Any] = []
    for name, dtype, inputs, head in _cases(device, tiny):
        bar = _Bar(name, dtype, inputs, head)
        for path in paths:
            found = _run(inputs, dtype, path, head, bar.of_loss)
            again = _run(inputs[:1], dtype, path, head, bar.of_loss)
            if not all(torch.equal(a[0], b[0]) for a, b in zip(found, again, strict=True)):
                raise IncorrectError(f"{path}, {dtype}, {name}: two runs differ")
            # A few hundred bias gradients are too few for a ratio of two roundings to mean anything.
            bar.compare(path, found, NAMES[:3] if tiny else NAMES)
        rows += bar.rows
    return rows


def check_routed(device: str, tiny: bool = False) -> list[Any]:
    """Nothing is lost at d = 0; at d = 1e-2 no more than that, beside the dtype's own error."""
    rows: list[Any] = []
    for name, dtype, inputs, head in _cases(device, tiny):
        bar = _Bar(name, dtype, inputs, head)
        for mass in (0.0, 1e-2):
            found = _run(inputs, dtype, "triton", head.replace(max_dropped_mass=mass), bar.of_loss)
            bar.compare(f"routed {mass}", found, ("dhidden", "dweight"), mass)
        rows += bar.rows
    return rows


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


def check_peers(device: str, tiny: bool = False) -> dict[str, Any]:
    """How far each peer's gradients of the CLHA loss are from eager's on a small shape: recorded, not judged."""
    shape = TINY[0] if tiny else Shape(1024, 1024, 32000)
    wanted = make_batch(shape, device)
    eager = GPU_METHODS["eager_hf"].build(wanted)()
    found: dict[str, Any] = {}
    for name in methods_of("scored"):
        method = GPU_METHODS[name]
        if method.own or method.compiles or method.computes != LOGPS or name == "eager_hf":
            continue
        batch = make_batch(shape, device)
        try:
            off = errors(method.build(batch), batch, eager, wanted)
            found[name] = {of: off[of] for of in ("dhidden", "dweight")}
        except FAILURES as failure:
            found[name] = {"failed": describe(failure)}
    return found


def run_tests(seconds: float) -> str:
    """The tests that are marked for a GPU; raises IncorrectError when one fails or the time is over."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise IncorrectError(f"pytest -m gpu did not end within {seconds:.0f} s") from None
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    # 5: nothing was collected.
    if done.returncode not in (0, 5):
        raise IncorrectError(f"pytest -m gpu: {last}")
    return last
