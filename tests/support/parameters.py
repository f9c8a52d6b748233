"""Which combinations of parameters are run by default; the others wait for `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def _parameter(values: Sequence[Any], name: str | None, default: bool) -> Any:
    flat = itertools.chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in values)
    return pytest.param(*flat, id=name, marks=() if default else pytest.mark.slow)


def covered(first: Mapping[str, Any], *others: Mapping[str, Any]) -> list[Any]:
    """Every combination of named values, a tuple of which is several parameters; some stand for the rest by default.

    Each combination of `others` is one of those, with the values of `first` in turn, and so is each value of `first`.
    """
    product = list(itertools.product(*(axis.items() for axis in others)))
    count, names = len(first), list(first)
    default = {
        (names[(turn + turn // count) % count], *(name for name, _ in product[turn % len(product)]))
        for turn in range(max(count, len(product)))
    }
    found = []
    for combination in itertools.product(first.items(), *(axis.items() for axis in others)):
        key = tuple(name for name, _ in combination)
        found.append(_parameter([value for _, value in combination], "-".join(key), key in default))
    return found


def firsts(values: Iterable[Any], kind: Callable[[Any], Hashable], names: Sequence[str] = ()) -> list[Any]:
    """One parameter a value; the first of each kind is run by default."""
    seen: set[Hashable] = set()
    found = []
    for number, value in enumerate(values):
        found.append(_parameter([value], names[number] if names else None, kind(value) not in seen))
        seen.add(kind(value))
    return found
