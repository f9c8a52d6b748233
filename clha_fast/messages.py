"""Sentences of error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# Likenesses: above the first a name is another one with a letter wrong; from the second, one begins the other.
_MISSPELLED, _BEGUN = 0.8, 0.5


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name that is closest, "" when none is close.

    Of names that share no more than letters, one that begins the other goes first: "evaluate" means "eval".
    """
    found = list(known)
    close = difflib.get_close_matches(name, found, n=1)
    if not close or difflib.SequenceMatcher(None, close[0], name).ratio() <= _MISSPELLED:
        begun = [other for other in found if name.startswith(other) or other.startswith(name)]
        close = difflib.get_close_matches(name, begun, n=1, cutoff=_BEGUN) or close
    return f"; did you mean {close[0]!r}?" if close else ""


def check_keys(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """ValueError for the first key of `given` that is not `known`; `what` is the option it stands in."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: unknown key {name!r}{nearest(str(name), known)}")
