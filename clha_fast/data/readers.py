"""Files and tables of ranked responses, read into records; nothing is guessed past the first one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from clha_fast.data.answers import is_tree, tree_rows
from clha_fast.data.bars import reading
from clha_fast.data.columns import check_columns, check_unread, subset_of, template_of
from clha_fast.data.containers import Source, rows_of
from clha_fast.data.fields import Parser, Reading, Row, columns_of
from clha_fast.data.formats import FORMATS, PARSERS, detect_format
from clha_fast.data.jsonlines import Alone
from clha_fast.data.mapping import ColumnMap
from clha_fast.data.notes import Notes
from clha_fast.data.records import RankedRecord, RecordError, without_repeated_prompt

_T = TypeVar("_T")
MOST_UNKNOWN = 100  # records of no known format, before the source is called one


def read_records(
    source: Source,
    format: str = "auto",
    rank_by_reward: bool = False,
    errors: list[RecordError] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    notes: Notes | None = None,
) -> list[RankedRecord]:
    """All records of a file or table, in order; arguments and errors as `iter_records`. More than 2000 show a bar."""
    counts = Notes(_name(source)) if notes is None else notes
    found = list(reading(iter_records(source, format, rank_by_reward, errors, columns=columns, notes=counts)))
    if notes is None:
        counts.say()
    return found


def _name(source: Source) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "records"


def iter_records(
    source: Source,
    format: str = "auto",
    rank_by_reward: bool = False,
    errors: list[RecordError] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    notes: Notes | None = None,
) -> Iterator[RankedRecord]:
    """Records of a file or table, one at a time.

    Args:
        source: path of a file, or of several as a glob, or of a folder written by `save_to_disk`; or a table:
            rows in a list or any iterable, a mapping of columns, a `datasets.Dataset`, a pandas, polars or pyarrow
            table (`clha_fast.data.containers` has the kinds). JSON and csv need nothing but Python, other files and
            tables what `datasets` brings.
        format: one of `FORMATS`; "auto" decides by the first record, for the whole source; with `errors` by the first
            that has a format, of 100.
        rank_by_reward: order by decreasing reward, whatever order the file gives (RRHF and UltraFeedback
            always are).
        errors: None raises the first `RecordError`; a list collects them, and their records are left out.
        columns: which columns hold the fields, where they have other names: `clha_fast.data.mapping.ColumnMap`.
            With `group_by` the source is read to its end before the first record comes.
        notes: counts what else there is to know (columns that nobody reads, records with one response, pairs ranked
            against their rewards). None logs it at the end, as warnings.

    Raises:
        RecordError: a malformed line (file, line, column, field), a bad record, an unknown format, or no
            (good) record at all.
        ValueError: `format` is none of the known ones; bad `columns`.
        OSError: the file cannot be read.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format: expected auto or one of {', '.join(FORMATS)}, got {format!r}")
    mapping = None if columns is None else ColumnMap(columns)
    if mapping is not None and mapping.canonical and format not in ("auto", "canonical"):
        raise ValueError(f"format: expected auto with a mapping of completions in columns, got {format!r}")
    name = _name(source)
    counts = Notes(name) if notes is None else notes
    yield from _read(
        rows_of(source), name, None if format == "auto" else format, rank_by_reward, errors, mapping, counts
    )
    if notes is None:
        counts.say()


def _read(
    rows: Iterator[tuple[str, object]],
    name: str,
    format: str | None,
    rank_by_reward: bool,
    errors: list[RecordError] | None,
    mapping: ColumnMap | None,
    notes: Notes,
) -> Iterator[RankedRecord]:
    if mapping is not None and mapping.group_by is not None:
        rows = mapping.grouped(rows)
    first: RecordError | None = None
    found = bad = 0
    unknown: list[RecordError] = []  # of no format, before one that has
    if mapping is None:
        rows = _without_trees(rows, notes)
    for place, row in rows:
        found += 1
        try:
            if not isinstance(row, Mapping):
                raise row if isinstance(row, RecordError) else RecordError.of(place, "", "a JSON object", row)
            if mapping is not None and not isinstance(row, Reading):
                row = mapping.apply(row, place)
        except RecordError as error:
            first, bad = first or error, bad + 1
            _collect(error, errors)
            continue
        if format is None:
            canonical = mapping is not None and mapping.canonical
            try:
                format = "canonical" if canonical else detect_format(columns_of(row), place)
            except RecordError as error:
                unknown.append(row.elsewhere(error) if isinstance(row, Alone) else error)
                if errors is None or len(unknown) == MOST_UNKNOWN:
                    raise unknown[0] from None
                continue
            if unknown:
                assert errors is not None
                errors += unknown
                first, bad = first or unknown[0], bad + len(unknown)
        try:
            record = _parse(PARSERS[format], row, place, rank_by_reward, notes)
        except RecordError as error:
            first, bad = first or error, bad + 1
            _collect(error, errors)
        else:
            yield record
    if format is None and unknown:
        raise unknown[0]
    if not found:
        raise RecordError(f"{name}: expected at least one record, found none", source=name)
    if first is not None and bad == found:
        raise none_good(name, first, bad)


def none_good(name: str, first: RecordError, count: int) -> RecordError:
    """The error of a source all of whose records are bad, that many."""
    message = f"{name}: expected at least one good record, got {count:,} bad ones; the first: {first}"
    return RecordError(message, source=name, field=first.field, has_way=first.has_way)


def apart(records: Iterable[_T], read: Callable[[_T], object]) -> tuple[list[_T], list[RecordError]]:
    """(records that `read` takes, the errors of the others), each in order; a chat template refuses some, say."""
    good: list[_T] = []
    errors: list[RecordError] = []
    for record in records:
        try:
            read(record)
        except RecordError as error:
            errors.append(error)
        else:
            good.append(record)
    return good, errors


def _without_trees(rows: Iterator[tuple[str, object]], notes: Notes) -> Iterator[tuple[str, object]]:
    """Rows; a tree of messages becomes one for each of its places with ranked replies."""
    for place, row in rows:
        if not is_tree(row):
            yield place, row
            continue
        try:
            found = list(tree_rows(cast("Row", row), place))
        except RecordError as error:
            yield place, error
            continue
        notes.bare += not found
        yield from found


def record_from_row(
    row: Row, source: str = "record", rank_by_reward: bool = False, *, notes: Notes | None = None
) -> RankedRecord:
    """One record from one mapping in any known format; `source` is named in errors, `notes` as for `iter_records`."""
    if not isinstance(row, Mapping):
        raise RecordError.of(source, "", "a row, a mapping of fields", row)
    return _parse(PARSERS[detect_format(row, source)], row, source, rank_by_reward, notes)


def _parse(parser: Parser, row: Row, source: str, rank_by_reward: bool, notes: Notes | None) -> RankedRecord:
    reading = row if isinstance(row, Reading) else Reading(row)
    check_columns(reading, source)
    record = parser(reading, source, rank_by_reward)
    template, subset = template_of(reading, source), subset_of(reading, source)
    check_unread(reading, record, source)
    if template or subset:
        record = dataclasses.replace(record, template=template, subset=subset)
    record, repeated = without_repeated_prompt(record)
    if notes is not None:
        notes.see(record, reading.unread(), repeated)
    return record


def _collect(error: RecordError, errors: list[RecordError] | None) -> None:
    if errors is None:
        raise error
    errors.append(error)
