"""Turning a model's dropout off."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

_NAMES = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_prob")


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout of the model to 0: an adapter's, attention's, whole layers' too.

    The model's configuration, and what is saved of it, stays as it is; so what models of transformers read there
    themselves, not their layers, does too (BLT's, the encoder of ProphetNet).
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd) or "Dropout" in type(module).__name__:  # peft has some of its own
            vars(module)["p"] = 0.0
        for name in _drawing(module):
            setattr(module, name, 0.0)
        for name, rates in vars(module).items():
            if isinstance(rates, dict) and _is_dropout(name):  # by adapter
                rates.update({key: 0.0 for key, rate in rates.items() if isinstance(rate, float)})
        config = vars(module).get("config")
        # A layer's: neither a model's nor that of something around one.
        layer = module is not model and not any(isinstance(part, PreTrainedModel) for part in module.modules())
        if layer and isinstance(config, PreTrainedConfig) and _drawing(config):
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
