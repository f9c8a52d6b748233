"""Turning a model's dropout off."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

_NAMES = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_prob")


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout of the model to 0: an adapter's, attention's, whole layers' too.

    The model's configuration, and what is saved of it, stays as it is.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in _drawing(module):
            setattr(module, name, 0.0)
        config = vars(module).get("config")  # a layer's own: wrappers pass on their model's
        if not isinstance(module, PreTrainedModel) and _drawing(config):
            vars(module)["config"] = _Quiet(config)


def _drawing(owner: Any) -> list[str]:
    """Numbers of a module or configuration that are no 0 and named as dropout is."""
    found = getattr(owner, "__dict__", {}).items()
    return [name for name, value in found if isinstance(value, float) and value and _is_dropout(name)]


def _is_dropout(name: str) -> bool:
    return any(part in name for part in _NAMES)


class _Quiet:
    """A layer's configuration, but for dropout, which Falcon's layers and some others read there at each call."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_of"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_of":  # of copies that are being made
            raise AttributeError(name)
        value = getattr(self._of, name)
        return 0.0 if isinstance(value, float) and _is_dropout(name) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._of, name, value)
