"""Whether a device's library multiplies 16 bits into float32, torch's `mm(..., out_dtype=torch.float32)`."""

from __future__ import annotations

import functools

import torch


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
