"""bfloat16 in Triton's interpreter, as a GPU has it: tests alone may ask for it.

The interpreter keeps bfloat16 as its 16 bits in an integer. It multiplies those bits in dots, truncates where a GPU
rounds to nearest even, and has no constants of the type. What the kernels do with bfloat16 is mended here: loads,
stores, casts from and to float32, selections, dots summed in float32. What they do not do (arithmetic in bfloat16
itself) is refused, so that no kernel can come to it unseen. Not there, as for float16: the order in which tensor cores
sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from clha_fast.ops import dispatch


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """The bfloat16 bits (uint16) nearest to float32 numbers, even ones where two are as near; a NaN stays one."""
    bits = np.array(numbers, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def _is_narrow(*handles: TensorHandle) -> bool:
    # By name, without a call: every operator asks it.
    return "bf16" in [handle.dtype.scalar.name for handle in handles]


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_narrow(handle) else handle


def _refuse(*handles: TensorHandle) -> None:
    if _is_narrow(*handles):
        raise NotImplementedError("arithmetic in bfloat16: cast to float32 in the kernel, or mend it here first")


def _patches() -> dict[str, Any]:
    """The builder's methods that meet bfloat16; its casts and its elementwise operators all end in these."""
    names = ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op", "create_fma")
    old = {name: getattr(InterpreterBuilder, name) for name in names}

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        kinds = (source.dtype.scalar, target.scalar)
        if tl.bfloat16 not in kinds or kinds[0] == kinds[1]:
            return old["cast_impl"](self, source, target)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        if kinds[0] == tl.bfloat16:
            return old["cast_impl"](self, _wide(source), target)
        raise NotImplementedError(f"a cast from {kinds[0]} to bfloat16: by way of float32 it would round twice")

    def convert(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return old["create_fp_to_fp"](self, source, target, rounding)

    def dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *others: Any) -> TensorHandle:
        return old["create_dot"](self, _wide(a), _wide(b), d, *others)

    def constant(self: Any, value: float) -> TensorHandle:
        return TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)

    def binary(self: Any, a: TensorHandle, b: TensorHandle, operator: Any) -> TensorHandle:
        _refuse(a, b)
        return old["binary_op"](self, a, b, operator)

    def unary(self: Any, a: TensorHandle, operator: Any) -> TensorHandle:
        _refuse(a)
        return old["unary_op"](self, a, operator)

    def fma(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle) -> TensorHandle:
        _refuse(a, b, c)
        return old["create_fma"](self, a, b, c)

    return {
        "cast_impl": cast,
        "create_fp_to_fp": convert,
        "create_dot": dot,
        "get_bf16": constant,
        "binary_op": binary,
        "unary_op": unary,
        "create_fma": fma,
    }


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends the interpreter and lifts the library's refusal of bfloat16 in it, until the test ends."""
    for name, method in _patches().items():
        monkeypatch.setattr(InterpreterBuilder, name, method, raising=name != "get_bf16")
    monkeypatch.setattr(dispatch, "INTERPRETED", (*dispatch.INTERPRETED, torch.bfloat16))
