"""When records are so many that a bar shows how far they are, and the bar of those that are read."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")
LARGE = 2000  # records; reading or tokenising fewer is over before a bar could be read


def reading(records: Iterable[_T]) -> Iterator[_T]:
    """The records, with a bar for more than `LARGE`: on a terminal alone, of one process of a machine."""
    bar: Any = None
    quiet = True if os.environ.get("LOCAL_RANK", "0") != "0" else None  # None: where there is no terminal
    try:
        for number, record in enumerate(records):
            if number == LARGE:
                tqdm = importlib.import_module("tqdm").tqdm  # it ships no types
                bar = tqdm(desc="Reading", unit=" records", initial=LARGE, disable=quiet)
            if bar is not None:
                bar.update(1)
            yield record
    finally:
        if bar is not None:
            bar.close()
