"""Files of ranked records, as the commands read them whose options are argparse's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from clha_fast.data import RankedRecord
from clha_fast.data.records import RecordError
from clha_fast.experiments.reading import read_file


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
    if skipped:
        first = " ".join(str(skipped[0]).split())
        print(f"skipped       {path}: {len(skipped):,} bad records, the first: {first}", flush=True)
    return records
