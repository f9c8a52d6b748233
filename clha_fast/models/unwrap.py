"""The model inside whatever wraps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from clha_fast.models.adapters import base_model

DATA_PARALLEL = (
    "model: expected one process a device, got nn.DataParallel (its copies share one head); start the loop with "
    "torchrun or accelerate launch and wrap with DistributedDataParallel or fully_shard"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile's wrapper, a DeepSpeed engine or a PeftModel.

    A PeftModel that adds virtual tokens is taken as the model: only there the tokens' positions are known.
    """
    inner: Any = model
    while True:
        if isinstance(inner, nn.DataParallel):
            raise ValueError(DATA_PARALLEL)
        if isinstance(inner, FullyShardedDataParallel):
            raise ValueError(
                "model: expected one not yet in FullyShardedDataParallel, whose flat parameters cannot be measured; "
                "attach first, or use fully_shard"
            )
        if isinstance(inner, torch._dynamo.OptimizedModule):
            inner = inner._orig_mod
        elif isinstance(inner, DistributedDataParallel) or type(inner).__name__ == "DeepSpeedEngine":
            inner = inner.module
        elif (base := base_model(inner)) is not inner:
            inner = base
        else:
            return inner
