"""What `fake_gpu` must refuse, each tried once: a program of its own, as `cuda_walk.py` is. Exits with 1 on the first
that passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton import clha as ranking
from tests.support.fake_gpu import FakeGPU, LaunchError, WaitError


def waits(a: Any, i: Any) -> dict[str, Callable[[], Any]]:
    return {
        "item": lambda: a.sum().item(),
        "float": lambda: float(a.sum()),
        "if": lambda: bool(a.sum() > 0),
        "tolist": lambda: i.tolist(),
        "cpu": lambda: a.cpu(),
        "to": lambda: a.to("cpu", non_blocking=True),
        "copy to": lambda: torch.empty(8, 8).copy_(a),
        "nonzero": lambda: i.nonzero(),
        "mask": lambda: a[a > 0],
        "mask assigned": lambda: a.__setitem__(a > 0, a[0]),
        "repeat_interleave": lambda: torch.repeat_interleave(i, i),
        "torch.tensor": lambda: torch.tensor([1, 2], device="cuda"),
        "copy from": lambda: torch.ones(3).to("cuda"),
        "index": lambda: a[torch.tensor([1, 2])],
        "equal": lambda: torch.equal(a, a),
    }


def mistakes(a: Any, h: Any) -> dict[str, Callable[[], Any]]:
    empty = torch.empty(8, 7, device="cuda")
    return {
        "two devices": lambda: a + torch.ones(8),
        "inner sizes": lambda: torch.mm(a, torch.empty(4, 4, device="cuda")),
        "two dtypes": lambda: torch.mm(a, h),
        "out's dtype": lambda: torch.mm(a, a, out=h),
        "out's shape": lambda: torch.mm(a, a, out=empty),
        "wide out's dtype": lambda: torch.mm(h, h, out_dtype=torch.float32, out=h),
        "wide out's shape": lambda: torch.mm(h, h, out_dtype=torch.float32, out=empty),
        "wider than float32": lambda: torch.mm(h, h, out_dtype=torch.float64),
        "another addend": lambda: torch.addmm(a.double(), h, h, out_dtype=torch.float32, out=a),
    }


def varying(a: Any, i: Any) -> dict[str, Callable[[], Any]]:
    """Sums whose order a GPU does not promise."""
    return {
        "a running sum": lambda: a.cumsum(0),
        "in a dtype": lambda: i.cumsum(0, dtype=torch.float64),
        "into a tensor": lambda: torch.cumsum(i, 0, out=torch.empty(8, device="cuda", dtype=torch.float64)),
        "in place": lambda: a.cumsum_(0),
        "kthvalue": lambda: a.kthvalue(1),
    }


def launches(a: Any, h: Any) -> dict[str, Callable[[], Any]]:
    def finish(grid: tuple[int, ...], partials: Any) -> Any:
        return ranking.finish_kernel[grid](partials, a, a, 4, BLOCK_P=64, num_warps=4)

    def describe(base: Any, shape: list[int], strides: list[int]) -> Any:
        return finish((1,), TensorDescriptor(base, shape, strides, [8, 8]))

    return {
        "no program": lambda: finish((0,), a),
        "too many programs": lambda: finish((1, 2**16), a),
        "a tensor on the CPU": lambda: finish((1,), torch.ones(8)),
        "a base in between": lambda: describe(h.view(-1)[1:], [4, 8], [8, 1]),
        "more rows than there are": lambda: describe(h, [9, 8], [8, 1]),
    }


def absent(h: Any, b: Any) -> dict[str, Callable[[], Any]]:
    """Products that a T4 has not, while sums in float16 are allowed."""
    return {
        "bfloat16 to float32": lambda: torch.mm(b, b, out_dtype=torch.float32),
        "float16 to float32": lambda: torch.mm(h, h, out_dtype=torch.float32),
    }


def refuses(name: str, call: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
    try:
        call()
    except errors:
        return
    raise SystemExit(f"{name}: passed")


def main() -> None:
    with FakeGPU(90, compiles=False).here():
        a, h = (torch.empty(8, 8, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.float16))
        i = torch.empty(8, device="cuda", dtype=torch.int64)
        for name, call in waits(a, i).items():
            refuses(name, call, (WaitError,))
        for name, call in mistakes(a, h).items():
            refuses(name, call, (AssertionError, RuntimeError))
        for name, call in launches(a, h).items():
            refuses(name, call, (LaunchError,))
        i.cumsum(0)
        a.cumsum(0)
        torch.use_deterministic_algorithms(True)
        i.cumsum(0)
        (i > 0).cumsum(0, dtype=torch.int32)
        for name, call in varying(a, i).items():
            refuses(name, call, (RuntimeError,))
        torch.use_deterministic_algorithms(False)
    with FakeGPU(75, compiles=False).here():
        h, b = (torch.empty(8, 8, device="cuda", dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
        torch.mm(h, h, out_dtype=torch.float32)
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
        for name, call in absent(h, b).items():
            refuses(name, call, (RuntimeError,))


if __name__ == "__main__":
    main()
