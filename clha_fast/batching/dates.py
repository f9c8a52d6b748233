"""Chat templates that write the day on which they are rendered: tomorrow their prompts are other ones."""

from __future__ import annotations

import re
from typing import Any

_CLOCK = "strftime_now"  # what transformers gives templates


def date_hint(tokenizer: Any) -> str:
    """What holds the date of the tokenizer's chat template still, for the end of an error; "" where it writes none."""
    given = getattr(tokenizer, "chat_template", None) or ""
    template = "\n".join(given.values()) if isinstance(given, dict) else given
    if _CLOCK not in template:
        return ""
    names = re.findall(rf"set\s+(\w+)\s*=\s*{_CLOCK}", template)
    variable = next((name for name in names if re.search(rf"\b{name}\s+is\s+(not\s+)?defined", template)), None)
    if variable is None:
        return "the chat template writes today's date, and has no variable for it: give prompts as rendered texts"
    way = f'give the same day each time, as chat_template_kwargs {{"{variable}": ...}}'
    return f"the chat template writes today's date: {way}"


def dated(error: ValueError, tokenizer: Any) -> ValueError:
    """The error of a run that is not the one to be resumed, with `date_hint` where the prompts' tokens have changed."""
    hint = date_hint(tokenizer) if "tokenizer or template changed" in str(error) else ""
    return ValueError(f"{error}; {hint}") if hint else error
