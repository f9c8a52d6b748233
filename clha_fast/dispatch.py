"""Which backend runs: the one asked for, or, for "auto", the one that suits the device."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

from clha_fast.errors import BackendError

Backend = Literal["auto", "triton", "workspace", "torch", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "workspace", "torch", "reference")
# Loss and gradients in one sweep: what they return beside the loss are finished gradients.
SWEEPING = ("torch", "workspace")
# Those that take `HeadOptions.max_dropped_mass`.
ROUTING: tuple[str, ...] = ()

logger = logging.getLogger("clha_fast")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why the Triton backend cannot take these tensors, None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda" and not _interpreting():
        return f"the tensors are on {device_type!r}: it needs a CUDA or ROCm device (or TRITON_INTERPRET=1)"
    return None


@functools.lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    logger.info(message)


def resolve(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend to run: "triton", "torch" or "reference".

    Raises:
        ValueError: the name is unknown.
        BackendError: "triton" or "workspace" was asked for and cannot run. A named backend never falls back.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        reason = _why_not_triton(device_type, dtype) if device_type == "cuda" else f"the device is {device_type}"
        chosen = "triton" if reason is None else "torch"
        _say_once(f"backend auto: {chosen} ({reason or 'a GPU and triton are there'})")
        return chosen
    if backend in ("triton", "workspace"):
        reason = _why_not_triton(device_type, dtype)
        if reason is not None:
            hint = " (backend 'torch' is that path without kernels)" if backend == "workspace" else ""
            raise BackendError(f"backend {backend!r} cannot run: {reason}{hint}")
    return backend


# The answer depends on nothing but its arguments and the installation: a compiled graph may bake it in. This is all
# that torch.compiler.assume_constant_result does, except that it imports torch._dynamo first: seconds, and triton.
vars(resolve)["_dynamo_marked_constant"] = True
