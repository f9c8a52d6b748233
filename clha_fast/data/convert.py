"""Any known format, rewritten once as the canonical JSON Lines."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from clha_fast.data.bars import reading
from clha_fast.data.notes import Notes
from clha_fast.data.readers import Source, iter_records
from clha_fast.data.records import RecordError
from clha_fast.files import naming_full


@dataclass(frozen=True)
class ConvertCounts:
    """What `convert` wrote, and what it left out (`skipped`, only when errors are collected).

    `pairs` counts those of responses with different rewards, `reversed_pairs` those whose worse-ranked one has the
    higher reward.
    """

    records: int
    completions: int
    with_rewards: int
    skipped: int
    pairs: int = 0
    reversed_pairs: int = 0


def convert(
    source: Source,
    destination: str | os.PathLike[str],
    format: str = "auto",
    rank_by_reward: bool = False,
    *,
    overwrite: bool = False,
    errors: list[RecordError] | None = None,
    columns: Mapping[str, Any] | None = None,
    notes: Notes | None = None,
) -> ConvertCounts:
    """Write every record of `source` to `destination`, one canonical JSON object a line, UTF-8.

    The file appears complete or not at all: it is written beside `destination` and then renamed, so a failure
    (a bad record, a full disk) leaves whatever was there before.

    Args:
        source, format, rank_by_reward, errors, columns, notes: as `iter_records`.
        overwrite: replace an existing `destination`. It may be `source` itself where nothing of that is lost.

    Raises:
        FileExistsError: `destination` exists and `overwrite` is not set.
        FileNotFoundError: the folder of `destination` does not exist.
        RecordError, ValueError, OSError: as `iter_records`; ValueError also where `destination` is `source`, which has
            columns that nobody reads, or bad records; OSError also when writing fails.
    """
    path = os.path.expanduser(os.fspath(destination))
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists already; expected a new file, or overwrite=True")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: expected a file in a folder that exists, there is no {folder}")
    counts = (
        Notes(os.fspath(source) if isinstance(source, (str, os.PathLike)) else "records") if notes is None else notes
    )
    in_place, bad_before = _is_among(path, source), len(errors or ())
    records = completions = with_rewards = 0
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with naming_full(path), open(partial, "x", encoding="utf-8", newline="\n") as file:
            for record in reading(iter_records(source, format, rank_by_reward, errors, columns=columns, notes=counts)):
                file.write(json.dumps(record.as_dict(), ensure_ascii=False, allow_nan=False) + "\n")
                records += 1
                completions += len(record.completions)
                with_rewards += record.rewards is not None
            file.flush()
            os.fsync(file.fileno())
        if in_place:
            _check_nothing_lost(path, counts.unread, len(errors or ()) - bad_before)
        os.replace(partial, path)
    finally:
        # Still there only when something above failed.
        if os.path.exists(partial):
            os.unlink(partial)
    if notes is None:
        counts.say()
    return ConvertCounts(records, completions, with_rewards, len(errors or ()), counts.pairs, counts.reversed)


def _is_among(path: str, source: Source) -> bool:
    """Whether the file is the source, or one of those that its pattern stands for."""
    if not isinstance(source, (str, os.PathLike)) or not os.path.exists(path):
        return False
    name = os.path.expanduser(os.fspath(source))
    return any(os.path.exists(one) and os.path.samefile(one, path) for one in (name, *glob.glob(name)))


def _check_nothing_lost(path: str, unread: Collection[str], bad: int) -> None:
    lost = [f"the columns {', '.join(unread)}, which nobody reads"] if unread else []
    lost += [f"{bad:,} bad records"] if bad else []
    if lost:
        raise ValueError(
            f"destination: expected another file than the source, which has {' and '.join(lost)}, and would lose them, "
            f"got {path} itself; convert to a new file"
        )
