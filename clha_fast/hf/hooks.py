"""Hooks that wrappers hang on the head itself, and a result that is no logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clha_fast.hf.heads import FusedHead


@contextlib.contextmanager
def through_hooks(head: nn.Module, fused: FusedHead) -> Iterator[None]:
    """Inside, the result passes through the head's own forward hooks, which would else see a constant.

    A wrapper that shards the head by itself (`fully_shard(model.lm_head)`, ZeRO-3) gathers its weight again for the
    backward when the gradient reaches what the head returned. So the loss is what the head returns, and the model
    behind it gets the constant.

    Args:
        head: the output embedding. fused: of `heads.fused_head`, whose `compute` returns a tuple that begins with the
            loss; its result is the one that has passed.
    """
    if not head._forward_hooks:
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
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
