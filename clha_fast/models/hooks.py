"""Hooks that wrappers hang on the head itself, and a result that is no logits."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clha_fast.models.embedding import WRAPPERS, UnsupportedHeadError, is_wrappers, library_of
from clha_fast.models.heads import FusedHead, HeadInfo


def other_hooks(head: nn.Module) -> tuple[int, ...]:
    """Keys of the head's forward hooks and pre-hooks that come from nobody that wraps.

    peft's do not count: for the time of a call they hand the head an argument, which the head itself takes or refuses.
    """
    kinds: tuple[Any, ...] = (head._forward_pre_hooks, head._forward_hooks)
    return tuple(k for kind in kinds for k, hook in kind.items() if library_of(hook) not in (*WRAPPERS, "peft"))


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
def through_hooks(info: HeadInfo, fused: FusedHead) -> Iterator[None]:
    """Inside, the result passes through the wrappers' hooks on the head, which would else see a constant.

    A wrapper that shards the head by itself (`fully_shard(model.lm_head)`, ZeRO-3) gathers its weight again for the
    backward when the gradient reaches what the head returned. So the loss is what the head returns, and the model
    behind it gets the constant. So do hooks of other people's, whatever they do to logits: that was measured.

    Args:
        info: the head as measured. fused: of `heads.fused_head`, whose `compute` returns a tuple that begins with the
            loss; its result is the one that has passed.

    Raises:
        UnsupportedHeadError: other people's hooks on the head have come or gone since it was measured.
    """
    head = info.module
    if other_hooks(head) != info.hooks:
        raise UnsupportedHeadError(
            f"model: expected the {len(info.hooks)} forward hook(s) on its output embedding that were there when it "
            f"was measured, got {len(other_hooks(head))} or others (one may change the logits); detach and attach "
            "again, or make the trainer after them"
        )
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
