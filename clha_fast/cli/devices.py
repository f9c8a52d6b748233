"""Where and with which backend something runs, in words; without transformers."""

from __future__ import annotations

from typing import Any

import torch

from clha_fast.errors import BackendError
from clha_fast.ops.dispatch import RULES, resolve


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def backend_text(backend: str, device: torch.device, dtype: torch.dtype, **head: Any) -> str:
    """Which backend will train, and for "auto" why. head: what `resolve` takes beside, of the model's."""
    name = resolve(backend, str(device), dtype, gradients=True, **head)
    if backend != "auto":
        return f"{name} (asked for)"
    if name != "torch":
        return f"{name} (auto: {next(rule.why for rule in RULES if rule.backend == name)})"
    try:
        resolve("triton", str(device), dtype)
    except BackendError as error:
        return f"{name} (auto; triton cannot run: {str(error).partition(': ')[2]})"
    return f"{name} (auto)"
