"""The powers of two that the kernels write in PTX for NVIDIA's GPUs, computed in the interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from clha_fast.backends.triton.head import Head


class _Result(NamedTuple):
    handle: TensorHandle

    def get_result(self, index: int) -> TensorHandle:
        return self.handle


def powers(builder: Any, asm: str, constraints: str, values: list[TensorHandle], *others: Any) -> _Result:
    """`tiles.power` and `tiles.power_near`: a product and a sum rounded once, 2 to the power of it, no subnormals."""
    assert "fma.rn.f32 t, $1, $2, $3;" in asm
    assert "ex2.approx.ftz.f32 $0, t;" in asm
    assert ("add.f32 t, t, $4;" in asm) == (len(values) == 4)
    z, unit, shift, *low = (value.data for value in values)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        # A product of two float32 is exact in float64.
        exponent = (z.astype(np.float64) * unit.astype(np.float64) + shift.astype(np.float64)).astype(np.float32)
        for rest in low:
            exponent = exponent + rest
        power = np.exp2(exponent)
    return _Result(TensorHandle(np.where(power < np.float32(2.0**-126), np.float32(0), power), tl.float32))


def as_on_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take their PTX path in the interpreter."""
    make = Head.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Head], *arguments: Any) -> Head:
        head: Head = make(cls, *arguments)
        head.flags["PTX"] = True
        return head

    monkeypatch.setattr(Head, "of", classmethod(of))
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", powers)
