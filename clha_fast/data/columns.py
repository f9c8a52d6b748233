"""Columns that other libraries read and this one does not: none of them is left out unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from clha_fast.data.records import RecordError, is_sequence

_REFUSED = {
    "system": "the system text as first message of prompt",
}
# What rendering decides itself: the place where responses begin depends on it.
_OWN = (
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "messages"),
)


def check_columns(row: Mapping[str, Any], source: str) -> None:
    """Refuse a `system` column with a value in it, which would change the prompt; warn of `margin`.

    Raises:
        RecordError: there is one.
    """
    for name, instead in _REFUSED.items():
        if row.get(name):  # tables hold None, and empty texts and lists change nothing
            raise RecordError.of(source, name, f"no such column (give {instead})", row[name])
    if row.get("margin") is not None:
        # The same text for every record, so that Python shows it once.
        warnings.warn(
            "margin: this column is not used; the loss's own margin is margin * (j - i), set by the option margin",
            stacklevel=2,
        )


def template_of(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` give the chat template, {} where there are none.

    Raises:
        RecordError: `tools` is no list of mappings; `chat_template_kwargs` is no mapping or sets what rendering does.
    """
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    if tools and not (is_sequence(tools) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RecordError.of(source, "tools", "a list of tools, each a JSON schema", tools)
    if variables and not isinstance(variables, Mapping):
        raise RecordError.of(source, "chat_template_kwargs", "a mapping", variables)
    for name in variables or {}:
        if name in _OWN:
            raise RecordError.of(source, "chat_template_kwargs", "variables of the chat template's own", name)
    found = _without_none(dict(variables or {}))
    return {**found, "tools": _without_none(list(tools))} if tools else found


def _without_none(value: Any) -> Any:
    """Tables give every object every key that any of them has, as None."""
    if isinstance(value, Mapping):
        return {str(name): _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if is_sequence(value) else value
