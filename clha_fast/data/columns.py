"""Columns that other libraries read and this one does not: none of them is left out unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from clha_fast.data.records import RecordError

_REFUSED = {
    "system": "the system text as first message of prompt",
    "tools": "a prompt text with the tools already rendered",
    "chat_template_kwargs": "a prompt text rendered with them, or a chat template that needs none",
}


def check_columns(row: Mapping[str, Any], source: str) -> None:
    """Refuse `system`, `tools` and `chat_template_kwargs` with a value in them; warn of `margin`.

    Raises:
        RecordError: one of the three, each of which would change the prompt.
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
