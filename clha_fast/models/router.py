"""The coefficient of a mixture of experts' auxiliary loss, which its model adds to a loss of its own making only."""

from __future__ import annotations

from typing import Any

from torch import nn

# What the models of transformers multiply it by: an attribute of theirs, or of the text's configuration.
_NAMES = ("router_aux_loss_coef", "aux_loss_coef")


def auxiliary_coefficient(model: nn.Module) -> float:
    """What `model` multiplies its ``aux_loss`` by when it is given labels.

    Raises:
        ValueError: it is under none of the names that transformers' models have for it.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for owner in (model, config, text):
        for name in _NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, (int, float)):
                return float(value)
    raise ValueError(
        f"aux_loss: expected its coefficient as {' or '.join(_NAMES)} of the model or its configuration, got none in "
        f"{type(model).__name__}; call it with output_router_logits=False"
    )
