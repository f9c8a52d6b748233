"""Where and with which backend something runs, in words; without transformers."""

from __future__ import annotations

import torch

from clha_fast.errors import BackendError
from clha_fast.ops.dispatch import choose, resolve


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def backend_text(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which backend will train, and for "auto" why."""
    name = resolve(backend, str(device), dtype, gradients=True)
    if backend != "auto":
        return f"{name} (asked for)"
    if name != "torch":
        return f"{name} (auto: {choose(device.type, True, True, True).why})"
    try:
        resolve("triton", str(device), dtype)
    except BackendError as error:
        return f"{name} (auto; triton cannot run: {str(error).partition(': ')[2]})"
    return f"{name} (auto)"
