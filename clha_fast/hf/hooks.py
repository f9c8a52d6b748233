"""Hooks that wrappers hang on the head itself, and a result that is no logits."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clha_fast.hf.heads import FusedHead

# Whose hooks shard, gather or move what the head reads and returns, and leave its values alone.
_WRAPPERS = ("torch", "deepspeed", "accelerate", "transformers")


def is_wrappers(hook: Any) -> bool:
    """Whether a hook comes from one of the wrapping libraries; any other may change the head's values."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] in _WRAPPERS


@contextlib.contextmanager
def without_wrappers_hooks(head: nn.Module) -> Iterator[None]:
    """Inside, the head has none of the wrappers' hooks, which expect no known values; a user's run as they will."""
    hooks = (head._forward_pre_hooks, head._forward_hooks)
    head._forward_pre_hooks, head._forward_hooks = (
        OrderedDict((key, hook) for key, hook in kind.items() if not is_wrappers(hook)) for kind in hooks
    )
    try:
        yield
    finally:
        head._forward_pre_hooks, head._forward_hooks = hooks


@contextlib.contextmanager
def through_hooks(head: nn.Module, fused: FusedHead) -> Iterator[None]:
    """Inside, the result passes through the wrappers' hooks on the head, which would else see a constant.

    A wrapper that shards the head by itself (`fully_shard(model.lm_head)`, ZeRO-3) gathers its weight again for the
    backward when the gradient reaches what the head returned. So the loss is what the head returns, and the model
    behind it gets the constant. So do hooks of other people's, whatever they do to logits: that was measured.

    Args:
        head: the output embedding. fused: of `heads.fused_head`, whose `compute` returns a tuple that begins with the
            loss; its result is the one that has passed.
    """
    hooks: Any = head._forward_hooks
    order = list(hooks.items())
    others = [key for key, hook in order if not is_wrappers(hook)]
    if len(others) == len(order):
        yield
        return
    constants: list[Tensor] = []

    def first(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        constants.append(output)
        return output if isinstance(output, DTensor) else fused.result[0]

    def last(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if isinstance(constants[0], DTensor):
            return output
        fused.result = (output, *fused.result[1:])
        return constants[0]

    handles = [head.register_forward_hook(first, prepend=True), head.register_forward_hook(last)]
    for key in others:
        hooks.move_to_end(key)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if others:
            for key, _ in order:
                hooks.move_to_end(key)
