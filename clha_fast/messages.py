"""Sentences of error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name that is closest, "" when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_keys(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """ValueError for the first key of `given` that is not `known`; `what` is the option it stands in."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: unknown key {name!r}{nearest(str(name), known)}")
