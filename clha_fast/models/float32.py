"""A model of 16 bits computed in float32 as it stands: no second copy of it, a weight is widened where it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NARROW = (torch.bfloat16, torch.float16)
# What takes a few rows of a large weight (an expert's, a word's): they alone are widened.
_PICK = ("__getitem__", "embedding")


@contextlib.contextmanager
def in_float32(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, tensors in bfloat16 and float16 are read as float32, none is made, and autocast is off.

    What `model` then keeps of them (a table moved to its inputs' device) is gone afterwards: it holds what it held.
    It takes the memory of the largest weight, in float32. Kernels that take 16 bits alone (flash attention) raise
    errors of their own; what is compiled runs as it is written.
    """
    places = [place for module in model.modules() for place in (vars(module), module._parameters, module._buffers)]
    before = [dict(place) for place in places]
    try:
        with torch.compiler.set_stance("force_eager"), _Widened(device.type):
            yield
    finally:
        for place, held in zip(places, before, strict=True):
            for name in place.keys() - held.keys():
                del place[name]
            place.update(held)


class _Widened(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return _widened(func(*args, **(kwargs or {})), lambda tensor: tensor)
        if name in _PICK:
            return _widened(func(*args, **(kwargs or {})), Tensor.float)
        # What is written to stays itself.
        written = 1 if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else 0
        inputs = [*args[:written], *(_widened(value, Tensor.float) for value in args[written:])]
        named = {key: _widened(value, Tensor.float) for key, value in (kwargs or {}).items()}
        with torch.autocast(self._device, enabled=False):
            return func(*inputs, **named)


def _widened(value: Any, widen: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _NARROW else value
    if isinstance(value, Tensor):
        return widen(value) if value.dtype in _NARROW else value
    if type(value) in (list, tuple):
        return type(value)(_widened(each, widen) for each in value)
    if isinstance(value, Mapping):
        return {key: _widened(each, widen) for key, each in value.items()}
    return value
