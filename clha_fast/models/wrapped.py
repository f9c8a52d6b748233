"""The model inside the wrappers that a training loop puts around it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from clha_fast.models.adapters import base_model
from clha_fast.models.embedding import output_embedding

# On an attached model, what it was attached with; on the forward that was put there, that it is ours.
STATE = "_clha_attached"
_OWN = "_clha_own"
# By name, for neither package may be there: DeepSpeed's, and Lightning Fabric's.
_WITH_MODULE = ("DeepSpeedEngine", "_FabricModule")

DATA_PARALLEL = (
    "model: expected one process a device, got nn.DataParallel (its copies share one head); start the loop with "
    "torchrun or accelerate launch and wrap with DistributedDataParallel or fully_shard"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile's wrapper, a DeepSpeed engine, Lightning Fabric or a PeftModel.

    A PeftModel that adds virtual tokens is taken as the model: only there the tokens' positions are known.

    Raises:
        ValueError: nn.DataParallel, FullyShardedDataParallel, or a wrapper that hands its attributes on to what it
            wraps, so that a forward put on the one would stay on the other.
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
        elif isinstance(inner, DistributedDataParallel) or type(inner).__name__ in _WITH_MODULE:
            inner = inner.module
        elif (base := base_model(inner)) is not inner:
            inner = base
        else:
            _check_keeps_attributes(inner)
            return inner


def _check_keeps_attributes(model: nn.Module) -> None:
    if type(model).__setattr__ is nn.Module.__setattr__:
        return
    setattr(model, _OWN, True)
    holders = [module for module in model.modules() if vars(module).pop(_OWN, False)]
    if holders != [model]:
        inside = type(holders[0] if holders[0] is not model else holders[1]).__name__ if holders else "another object"
        raise ValueError(
            f"model: expected one that keeps its attributes, got {type(model).__name__}, which hands them on to "
            f"{inside}; give that one, before or after it is wrapped"
        )


def is_attached(forward: Any) -> bool:
    """Whether a model's forward is the one that `attach` puts there."""
    return getattr(getattr(forward, "__func__", None), STATE, False)


def check_calls_what_it_wraps(model: nn.Module, inner: nn.Module) -> None:
    """ValueError for a wrapper that has kept the forward which `inner` had before it is attached, and would call it."""
    for module in model.modules():
        kept: Any = vars(module).get("forward")
        while isinstance(kept, functools.partial):
            kept = kept.func
        if module is not inner and getattr(kept, "__self__", None) is inner and not is_attached(kept):
            raise ValueError(
                f"model: expected a wrapper that calls the model's forward as it is at the time, got "
                f"{type(module).__name__}, which keeps the one from when it was made; attach the model before it is "
                "wrapped (with peft: attach first, then get_peft_model)"
            )


def check_whole(model: nn.Module) -> None:
    """ValueError for a head that cannot be measured because ZeRO-3 holds its weight in parts."""
    head: Any = output_embedding(model)
    if hasattr(getattr(head, "weight", None), "ds_id") and head.weight.numel() == 0:
        raise ValueError(
            "model: expected whole weights, got those that DeepSpeed's ZeRO-3 has taken apart; attach before "
            "deepspeed.initialize, and build the model outside deepspeed.zero.Init"
        )
