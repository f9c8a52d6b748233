"""Every backend's CUDA branches compute what the reference says, with tensors that only say they are on a GPU.

Triton's kernels run in the interpreter, with the tiles of the GPU's architecture.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import HeadOptions, reference, token_logps
from clha_fast.backends import products
from clha_fast.objectives.clha import PUBLISHED
from tests.support.helpers import Case, make_case
from tests.support.value_gpu import OnGPU, ValueGPU

pytestmark = pytest.mark.usefixtures("bfloat16_kernels")

CHUNKS = HeadOptions(workspace_bytes=2**15)
RICH = HeadOptions(scale=0.9, softcap=8.0, temperature=0.7)
# Nothing has a mass of exactly 0 here: every pair is kept, and the routed kernels' result is exact.
ROUTED = HeadOptions(max_dropped_mass=0.0, workspace_bytes=2**15)
HEADS = {"chunks": CHUNKS, "rich": RICH, "routed": ROUTED}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUICK = [
    ("torch", "fp32", "chunks", 90, "cpu"),
    ("torch", "fp16", "rich", 90, "cuda"),
    ("torch", "fp16", "routed", 90, "cuda"),
    ("workspace", "fp32", "rich", 80, "cuda"),
    ("workspace", "fp16", "chunks", 90, "cpu"),
    ("triton", "fp32", "chunks", 90, "cpu"),
    ("triton", "fp16", "rich", 90, "cuda"),
    ("triton", "fp16", "routed", 90, "cpu"),
    ("workspace", "bf16", "chunks", 90, "cpu"),
    # In one chunk, whose weight's gradient is a kernel's product where that was measured to be faster.
    ("workspace", "bf16", "rich", 90, "cuda"),
    ("workspace", "fp16", "rich", 90, "cpu"),
    ("workspace", "fp16", "rich", 80, "cpu"),
    ("triton", "bf16", "chunks", 90, "cuda"),
]
EVERY = [
    row
    for row in itertools.product(("torch", "workspace", "triton"), KINDS, HEADS, (80, 90, 100), ("cpu", "cuda"))
    if row not in QUICK and (row[0], row[2]) != ("workspace", "routed") and (row[0] != "torch" or row[3] == 90)
]
# Norm of the error over norm of the exact value: a few roundings of float32, one of 16 bits.
LIMITS = {dtype: torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1) for dtype in KINDS.values()}


class Interpreted(ValueGPU):
    """Triton's own interpreter, which has no PTX, asked for by a user on a machine with a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = False


class OldROCm(ValueGPU):
    """A release without products of 16 bits with a float32 result."""

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.float32 in args and "dtype" in func._overloadname:
            raise RuntimeError("gemm input type at::Half and output type float is not supported for ROCm")
        return super()._compute(func, args, kwargs)


def build(dtype: torch.dtype, rows: int | None) -> Case:
    lengths, sizes = [5, 3, 0, 7, 2, 4, 6, 1, 3], [3, 1, 2, 3]
    return make_case(
        lengths,
        sizes,
        hidden_size=64,
        vocab_size=300,
        rows=rows,
        bias=True,
        rewards=True,
        sft_index=True,
        ignored=0.1,
        dtype=dtype,
        weight_scale=0.2,
    )


def exact(case: Case, head: HeadOptions, upstream: Tensor, entry: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(value, gradients of sum(upstream * value)) in float64."""
    leaves = case.to(torch.float64).leaves()
    value = reference.token_logps(leaves[0], leaves[1], leaves[2], case.targets, case.row_index, head)
    if entry == "loss":
        value = reference.clha_loss(value, case.targets, *case.ranking[:6], head, PUBLISHED)[0]
    return value.detach(), torch.autograd.grad(value, leaves, upstream.double())


def moved(case: Case, sizes: str) -> Case:
    names = (*case.head._fields, *(case.ranking._fields if sizes == "cuda" else ()))
    return case.replace(**{name: OnGPU(t) for name in names if (t := getattr(case, name, None)) is not None})


def check(value: Any, found: tuple[Any, ...], wanted: tuple[Tensor, tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    for got, want in zip((value, *found), (wanted[0], *wanted[1]), strict=True):
        assert got.is_cuda
        assert (got.value.double() - want).norm() <= LIMITS[dtype] * want.norm()
    assert all(got.dtype == dtype for got in found)


def run(
    entry: str, backend: str, kind: str, name: str, capability: int, sizes: str, device: type[ValueGPU] = ValueGPU
) -> None:
    dtype, head = KINDS[kind], HEADS[name]
    case = build(dtype, rows=9 if sizes == "cpu" else None)
    upstream = torch.tensor(0.5) if entry == "loss" else torch.linspace(-1, 1, case.targets.numel())
    gpu = device()
    with gpu.here(capability):
        there = moved(case, sizes)
        there.leaves()
        if entry == "loss":
            value, _ = there.loss(backend, head=head)
        else:
            value = token_logps(
                *there.head[:2], there.targets, bias=there.bias, row_index=there.row_index, head=head, backend=backend
            )
        node = value.grad_fn
        # The one node that the operator left: torch's engine itself asks for an accelerator.
        with torch.no_grad():
            found = node.apply(OnGPU(upstream), *[None] * (11 if entry == "loss" else 2))[:3]
        check(value, found, exact(case, head, upstream, entry), dtype)
    # The torch backend takes whole prompts at a time: it must know their sizes.
    sizes_are_read = entry == "loss" and sizes == "cuda"
    assert bool(gpu.reads) == (backend == "torch" and (sizes_are_read or name == "routed")), gpu.reads


@pytest.mark.parametrize("entry", ["loss", "logps"])
@pytest.mark.parametrize(("backend", "kind", "name", "capability", "sizes"), QUICK)
def test_values_and_gradients(entry: str, backend: str, kind: str, name: str, capability: int, sizes: str) -> None:
    run(entry, backend, kind, name, capability, sizes)


@pytest.mark.parametrize("entry", ["loss", "logps"])
@pytest.mark.parametrize(("name", "sizes"), [("chunks", "cpu"), ("rich", "cuda"), ("routed", "cpu")])
@pytest.mark.parametrize(("kind", "capability", "device"), [("bf16", 75, ValueGPU), ("fp16", 942, OldROCm)])
def test_blocks_widen_where_no_product_does(
    entry: str, name: str, sizes: str, kind: str, capability: int, device: type[ValueGPU]
) -> None:
    products._tried.cache_clear()
    run(entry, "torch", kind, name, capability, sizes, device)
    products._tried.cache_clear()


@pytest.mark.parametrize("entry", ["loss", "logps"])
@pytest.mark.parametrize(
    ("backend", "kind", "name", "capability"),
    [("auto", "fp16", "rich", 90), ("triton", "fp32", "routed", 80), ("workspace", "fp16", "chunks", 100)],
)
def test_the_interpreter_has_no_ptx(entry: str, backend: str, kind: str, name: str, capability: int) -> None:
    run(entry, backend, kind, name, capability, "cpu", Interpreted)


@pytest.mark.parametrize("entry", ["loss", "logps"])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_float16_while_its_sums_are_allowed(entry: str, backend: str) -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        run(entry, backend, "fp16", "rich", 90, "cpu")
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["loss", "logps"])
@pytest.mark.parametrize(("backend", "kind", "name", "capability", "sizes"), EVERY)
def test_every_combination(entry: str, backend: str, kind: str, name: str, capability: int, sizes: str) -> None:
    run(entry, backend, kind, name, capability, sizes)
