"""Files of ranked records, read alike by all that a run's options reach: training, reward models, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clha_fast.data.readers import read_records
from clha_fast.data.records import SKIPS, RankedRecord, RecordError

# Fields of RunOptions that say how its files are read, and what they are by default.
READING: dict[str, Any] = {"format": "auto", "columns": None, "rank_by_reward": False, "skip_bad_records": False}


def reading_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's options that say how files are read, and are not the defaults."""
    return {name: options[name] for name, none in READING.items() if options.get(name, none) != none}


def read_file(
    path: str, options: Mapping[str, Any], skipped: list[RecordError] | None = None, advice: str = SKIPS
) -> list[RankedRecord]:
    """All records of a file, as the options of a run (`READING`; others play no part) have it.

    Args:
        skipped: gets the errors of records that `skip_bad_records` leaves out.
        advice: what the error of a record says of leaving it out.

    Raises:
        RecordError, ValueError, OSError: as `read_records`.
    """
    given = {**READING, **reading_of(options)}
    errors = ([] if skipped is None else skipped) if given.pop("skip_bad_records") else None
    try:
        return read_records(path, errors=errors, **given)
    except RecordError as error:
        raise error if errors is not None else error.advised(advice) from None


def rewarded_alike(records: list[RankedRecord], options: Mapping[str, Any]) -> list[RankedRecord]:
    """Those with rewards, or without where most have none, where `skip_bad_records` trains on no mixture."""
    if not options.get("skip_bad_records"):
        return records
    rewarded = [record for record in records if record.rewards is not None]
    if 2 * len(rewarded) >= len(records):
        return rewarded
    return [record for record in records if record.rewards is None]


def leave_out(records: list[RankedRecord], errors: Sequence[RecordError]) -> Sequence[RecordError]:
    """Takes those out of `records` that these errors are of; the errors."""
    bad = {error.source for error in errors}
    records[:] = [record for record in records if record.source not in bad]
    return errors
