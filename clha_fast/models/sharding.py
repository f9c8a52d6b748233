"""Models whose weights are spread over processes, where they are needed whole or must be spread again."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def reshard(model: nn.Module) -> None:
    """Have every FSDP2 module hold its shards again; nothing happens to others.

    The outermost module keeps its gathered weights after a forward until a backward has passed. An optimizer made in
    between would take those for its parameters, step them, and leave the shards as they were.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _partitioned(module: nn.Module) -> list[nn.Parameter]:
    """Its own parameters (not its children's) that ZeRO-3 has taken apart."""
    return [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]


@contextlib.contextmanager
def whole_weights(model: nn.Module, *looked_at: nn.Module) -> Iterator[None]:
    """Inside, a forward works on a model that ``deepspeed.zero.Init`` has taken apart and no engine holds yet.

    transformers loads so once there are TrainingArguments with ZeRO-3 in them. What is looked at by hand (the
    embeddings) is whole all the time, any other module during its own forward; every process must come here, and run
    the same forwards. Other models are left alone.
    """
    own = [parameter for module in looked_at for parameter in _partitioned(module)]
    own = list({id(parameter): parameter for parameter in own}.values())  # tied ones once
    parts = [module for module in model.modules() if module not in looked_at and _partitioned(module)]
    if not parts and not own:
        yield
        return
    zero: Any = importlib.import_module("deepspeed").zero
    held = {id(parameter) for parameter in own}
    open_contexts: dict[int, Any] = {}

    def gather(module: nn.Module, args: Any) -> None:
        mine = [parameter for parameter in _partitioned(module) if id(parameter) not in held]
        open_contexts[id(module)] = zero.GatheredParameters(mine)
        open_contexts[id(module)].__enter__()

    def release(module: nn.Module, args: Any, output: Any) -> None:
        open_contexts.pop(id(module)).__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(gather) for module in parts]
    handles += [module.register_forward_hook(release) for module in parts]
    try:
        with zero.GatheredParameters(own):
            yield
    finally:
        for context in open_contexts.values():  # of modules whose forward failed
            context.__exit__(None, None, None)
        for handle in handles:
            handle.remove()
