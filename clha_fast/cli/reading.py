"""Files of ranked records, as the commands read them whose options are argparse's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from clha_fast.data import RankedRecord
from clha_fast.data.prompts import Prompted, read_prompts
from clha_fast.data.readers import apart, none_good
from clha_fast.data.records import SKIPS, RecordError
from clha_fast.experiments.reading import read_file

_T = TypeVar("_T")
_Result = TypeVar("_Result")


def add_skip_argument(parser: argparse.ArgumentParser) -> None:
    """The option that leaves bad records out."""
    parser.add_argument(
        "--skip-bad-records", action="store_true", help="leave bad records out, ties among them, and count them"
    )


def read(
    args: argparse.Namespace, path: str, format: str = "auto", columns: Mapping[str, Any] | None = None
) -> list[RankedRecord]:
    """All records of a file but the bad ones that `--skip-bad-records` leaves out, which are said.

    Raises:
        RecordError, ValueError, OSError: as `read_records`.
    """
    skipped: list[RecordError] = []
    how = {"format": format, "columns": columns, "skip_bad_records": args.skip_bad_records}
    records = read_file(path, how, skipped)
    _say(path, skipped)
    return records


def read_asked(args: argparse.Namespace, path: str, columns: Mapping[str, Any] | None) -> list[Prompted]:
    """As `read`, of prompts that wait for an answer.

    Raises:
        RecordError, ValueError, OSError: as `read_prompts`.
    """
    errors: list[RecordError] | None = [] if args.skip_bad_records else None
    try:
        records = read_prompts(path, args.format, errors, columns=columns)
    except RecordError as error:
        raise error if errors is not None else error.advised(SKIPS) from None
    _say(path, errors or [])
    return records


def use(
    args: argparse.Namespace,
    path: str,
    records: Sequence[_T],
    work: Callable[[Sequence[_T]], _Result],
    read: Callable[[_T], object],
) -> _Result:
    """`work(records)`; where it refuses one, without those that `--skip-bad-records` leaves out, which are said.

    Args:
        work: reads all records before it does anything. read: what it does first to one.

    Raises:
        RecordError: one that is refused, or all are.
    """
    try:
        return work(records)
    except RecordError as error:
        if not args.skip_bad_records:
            raise error.advised(SKIPS) from None
        good = readable(args, path, records, read)
        if len(good) == len(records):
            raise
    return work(good)


def readable(args: argparse.Namespace, path: str, records: Sequence[_T], read: Callable[[_T], object]) -> Sequence[_T]:
    """The records but those that `read` refuses, which `--skip-bad-records` leaves out, and which are said.

    Raises:
        RecordError: one that is refused and may not be left out, or all are.
    """
    good, bad = apart(records, read)
    if bad and not args.skip_bad_records:
        raise bad[0].advised(SKIPS)
    if bad and not good:
        raise none_good(path, bad[0], len(bad))
    _say(path, bad)
    return good


def _say(path: str, skipped: Sequence[RecordError]) -> None:
    if skipped:
        first = " ".join(str(skipped[0]).split())
        print(f"skipped       {path}: {len(skipped):,} bad records, the first: {first}", flush=True)
