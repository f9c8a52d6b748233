"""Where and with which backend something runs, in words; without transformers."""

from __future__ import annotations

from typing import Any

import torch

from clha_fast.errors import BackendError
from clha_fast.ops.dispatch import RULES, limit_text, resolve, token_limit


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def loss_dtype(run: Any) -> torch.dtype:
    """Of hidden states where the loss takes them, in a run of a trainer's."""
    half = torch.bfloat16 if run.args.bf16 else torch.float16 if run.args.fp16 else None
    return half or run.model.dtype


def head_of_run(run: Any) -> dict[str, Any]:
    """What the choice of a backend depends on beside device and dtype; nothing of a head with a forward of its own."""
    trainer = run.trainer
    weight = getattr(trainer.head_info.module, "weight", None)
    if trainer.head_info.own_forward is not None or weight is None:
        return {}
    size = trainer.head_options.workspace_bytes
    routed = trainer.head_options.max_dropped_mass is not None
    vocabulary, width = weight.shape
    known = {"vocabulary": vocabulary, "width": width, "trains": weight.requires_grad, "workspace_bytes": size}
    return {**known, "routed": routed}


def backend_text(
    backend: str, device: torch.device, dtype: torch.dtype, *, routed: bool = False, spread: bool = False, **head: Any
) -> str:
    """Which backend will train, and for "auto" why.

    routed: gradients leave out what has little softmax mass. spread: the tokens of rows are, over processes. head: what
    `token_limit` takes of the head, nothing for one whose size says nothing.
    """
    limit = token_limit(str(device), dtype, **head) if head and not routed and not spread else 0
    name = resolve(backend, str(device), dtype, gradients=not spread, routed=routed, limit=limit, fits=limit > 0)
    if backend != "auto":
        return f"{name} (asked for)"
    if name != "torch":
        said = limit_text(limit) if name == "workspace" else name
        return f"{said} (auto: {next(rule.why for rule in RULES if rule.backend == name)})"
    try:
        resolve("triton", str(device), dtype)
    except BackendError as error:
        return f"{name} (auto; triton cannot run: {str(error).partition(': ')[2]})"
    return f"{name} (auto)"
