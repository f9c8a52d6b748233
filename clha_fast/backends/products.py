"""Products of 16 bits with a float32 result: where a device's library has them, and operands that keep their digits.

They are torch's `mm(..., out_dtype=torch.float32)`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def why_not_wide(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why products of `dtype`, 16 bits, with a float32 result cannot be had there, None when they can.

    A switch of torch's is read at every call, for it may change between them. On ROCm releases differ, and the first
    call tries one.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return f"on {device.type!r} torch has no product of {name} with a float32 result"
    if torch.version.hip is not None:
        return _tried(device, dtype)
    # As torch's ATen/cuda/CUDABlas.cpp has them.
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return (
            "torch has no product of float16 with a float32 result while "
            "torch.backends.cuda.matmul.allow_fp16_accumulation is set"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if dtype == torch.bfloat16 and major < 8:
        return (
            "torch has no product of bfloat16 with a float32 result below compute capability 8.0, "
            f"and the device's is {major}.{minor}"
        )
    return None


def lift(rows: Tensor) -> Tensor:
    """A power of two [] in float32, from 1 to 2^15, that brings the largest number of `rows` towards 1.

    float16's numbers below 2^-14 have fewer digits, and lose them to any factor below 1: what is to be multiplied by
    one comes lifted.
    """
    largest = torch.linalg.vector_norm(rows, torch.inf).to(torch.float32)
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent).clamp(1.0, 2.0**15)


@functools.lru_cache(maxsize=64)
def _tried(device: torch.device, dtype: torch.dtype) -> str | None:
    """The first line of what torch says of such a product."""
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


# A compiled graph takes the answer of its trace: see `ops.dispatch`.
vars(why_not_wide)["_dynamo_marked_constant"] = True
