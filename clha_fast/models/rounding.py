"""How coarse the numbers are that a model multiplies, which tells rounding from another answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What torch may round the operands of float32 products to, by its own names; a sum of them is float32.
_NARROWED = {"tf32": 2.0**-10, "bf16": torch.finfo(torch.bfloat16).eps}


def rounding_of(model: Any) -> float:
    """The eps of the coarsest numbers among those that `model` multiplies as torch is set now, autocast included.

    float32 is TF32 (or bfloat16, on some CPUs) where torch's switches for matrix products say so, and by torch's own
    default for convolutions on GPUs. Of quantised weights, whose dtype is not what they are multiplied in, it is
    bfloat16's, which is also about that of activations in 8 bits.

    Args:
        model: one with transformers' `config`, `dtype` and `device`.
    """
    dtype, device = model.dtype, model.device.type
    found = torch.finfo(dtype).eps
    if getattr(model.config, "quantization_config", None) is not None:
        found = max(found, torch.finfo(torch.bfloat16).eps)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        found = max(found, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if dtype == torch.float32:
        convolves = any(isinstance(module, _CONVOLUTIONS) for module in model.modules())
        found = max([found, *(_NARROWED.get(name, 0.0) for name in _float32_products(device, convolves))])
    return found


def _float32_products(device: str, convolves: bool) -> list[str]:
    """What torch's switches say of matrix products, and of convolutions where there are any."""
    backends: Any = torch.backends
    if device == "cuda":
        places = [
            backends.cuda.matmul,
            *([backends.cudnn.conv] if hasattr(backends.cudnn, "conv") and convolves else []),
        ]
        if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
            narrow = backends.cuda.matmul.allow_tf32 or (convolves and backends.cudnn.allow_tf32)
            return ["tf32"] if narrow else []
    else:
        places = [backends.mkldnn.matmul] if device == "cpu" and hasattr(backends.mkldnn, "matmul") else []
    return [getattr(place, "fp32_precision", "ieee") for place in places]
