"""The library's messages in the words of the command line."""

from __future__ import annotations

import re


def as_flags(text: str) -> str:
    """A message of the library in the words of the command line: `overwrite=True` is ``--overwrite`` there."""
    return re.sub(r"\b(resume|overwrite)=True\b", r"--\1", text)
