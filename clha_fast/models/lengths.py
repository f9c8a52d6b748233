"""Which lengths of texts and rows a model may treat unlike shorter ones, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# Rotary tables that depend on the longest position that a forward sees, whatever row it is in.
_BY_LENGTH = ("dynamic", "longrope")
# The names that they have had in files of remote code.
_KIND = ("rope_type", "type")
_OLD_NAMES = ("su",)


def numbers_of(model: nn.Module) -> tuple[int, ...]:
    """All whole numbers of a model's text configuration, from the smallest: windows, blocks, scales, sizes.

    Which of them is a number of tokens no list of names would tell.
    """
    return tuple(sorted({number for number in _whole(_text_config(model)) if number > 0}))


def tells_more(seen: int, now: int, numbers: tuple[int, ...]) -> bool:
    """Whether `now` tokens may show of a model what `seen` did not: twice as many, or one of its numbers is passed.

    A number counts until an eighth more than it has been seen: what begins there changes few tokens at first.
    """
    if now >= 2 * max(seen, 1):
        return True
    return now > seen and any(seen < number + number // 8 and number < now for number in numbers)


def rope_by_length(model: nn.Module) -> str | None:
    """The kind of a model's rotary positions where they depend on the longest text of a forward, else None."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, Mapping) else (kinds,):
            if isinstance(kind, str) and any(name in kind for name in _BY_LENGTH):
                return kind
    told = _text_config(model)
    for name in ("rope_parameters", "rope_scaling"):
        for kind in _kinds(getattr(told, name, None)):
            if any(known in kind for known in _BY_LENGTH) or kind in _OLD_NAMES:
                return kind
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _whole(value: Any) -> Iterator[int]:
    if isinstance(value, PreTrainedConfig) or (hasattr(value, "__dict__") and not isinstance(value, type)):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _whole(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        yield int(value)


def _kinds(told: Any) -> Iterator[str]:
    if isinstance(told, Mapping):
        for name, value in told.items():
            if name in _KIND and isinstance(value, str):
                yield value
            yield from _kinds(value)
