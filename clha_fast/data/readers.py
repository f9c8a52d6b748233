"""Files and tables of ranked responses, read into records; nothing is guessed past the first one."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, cast

from clha_fast.data.columns import check_columns, check_unread, template_of
from clha_fast.data.fields import Parser, Reading, Row, columns_of
from clha_fast.data.formats import FORMATS, PARSERS, detect_format
from clha_fast.data.mapping import ColumnMap
from clha_fast.data.notes import Notes
from clha_fast.data.records import RankedRecord, RecordError

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]', re.DOTALL)


def read_records(
    source: Source,
    format: str = "auto",
    rank_by_reward: bool = False,
    errors: list[RecordError] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    notes: Notes | None = None,
) -> list[RankedRecord]:
    """All records of a file or table, in order; arguments and errors as `iter_records`."""
    return list(iter_records(source, format, rank_by_reward, errors, columns=columns, notes=notes))


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
        source: path of a JSON Lines file, of a file with one JSON list (either may be gzipped, ".gz"), or of
            a parquet file (".parquet", needs pyarrow, which `datasets` brings); or an iterable of mappings,
            such as a `datasets.Dataset` or a list of dictionaries. Blank lines are skipped.
        format: one of `FORMATS`; "auto" decides by the first record, for the whole source.
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
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "records"
    counts = Notes(name) if notes is None else notes
    yield from _read(_rows(source), name, None if format == "auto" else format, rank_by_reward, errors, mapping, counts)
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
            format = "canonical" if canonical else detect_format(columns_of(row), place)
        try:
            record = _parse(PARSERS[format], row, place, rank_by_reward, notes)
        except RecordError as error:
            first, bad = first or error, bad + 1
            _collect(error, errors)
        else:
            yield record
    if not found:
        raise RecordError(f"{name}: expected at least one record, found none", source=name)
    if first is not None and bad == found:
        message = f"{name}: expected at least one good record, got {bad:,} bad ones; the first: {first}"
        raise RecordError(message, source=name, field=first.field)


def record_from_row(
    row: Row, source: str = "record", rank_by_reward: bool = False, *, notes: Notes | None = None
) -> RankedRecord:
    """One record from one mapping in any known format; `source` is named in errors, `notes` as for `iter_records`."""
    return _parse(PARSERS[detect_format(row, source)], row, source, rank_by_reward, notes)


def _parse(parser: Parser, row: Row, source: str, rank_by_reward: bool, notes: Notes | None) -> RankedRecord:
    reading = row if isinstance(row, Reading) else Reading(row)
    check_columns(reading, source)
    record = parser(reading, source, rank_by_reward)
    template = template_of(reading, source)
    check_unread(reading, record, source)
    if template:
        record = dataclasses.replace(record, template=template)
    if notes is not None:
        notes.see(record, reading.unread())
    return record


def _collect(error: RecordError, errors: list[RecordError] | None) -> None:
    if errors is None:
        raise error
    errors.append(error)


def _rows(source: Source) -> Iterator[tuple[str, object]]:
    """(place, row) of every row; one that cannot be decoded is a RecordError, so that reading can go on."""
    if not isinstance(source, (str, os.PathLike)):
        yield from ((f"record {number}", row) for number, row in enumerate(source))
        return
    path = os.fspath(source)
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    with cast("IO[bytes]", gzip.open(path) if path.endswith(".gz") else open(path, "rb")) as file:
        lines = _lines(file, path)
        first = next((entry for entry in lines if isinstance(entry[1], RecordError) or entry[1].strip()), None)
        if first is None:
            return
        lines = itertools.chain([first], lines)
        # By content, not by suffix: ".json" is used for both.
        is_list = isinstance(first[1], bytes) and first[1].lstrip().startswith(b"[")
        yield from _list_rows(lines, path, first[0]) if is_list else _line_rows(lines, path)


def _line_rows(lines: Iterator[tuple[int, bytes | RecordError]], path: str) -> Iterator[tuple[str, object]]:
    for line_number, line in lines:
        if isinstance(line, RecordError):
            yield path, line
        elif line.strip():
            yield f"{path}:{line_number}", _decode(line, path, line_number)


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[int, bytes | RecordError]]:
    """Numbered lines, split at newlines only: U+2028 and its like may stand inside a JSON string."""
    number = 0
    try:
        for line in file:
            number += 1
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error) as error:
        yield number, RecordError(f"{path}: after line {number}: damaged gzip data ({error})", source=path)


def _decode(data: bytes, path: str, first_line: int) -> object:
    """The JSON value in `data`, or the RecordError that says where it breaks off."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        why = f"invalid UTF-8 (byte 0x{data[error.start]:02x})"
        return _broken(path, line, column, _field_at(data[: error.start].decode("utf-8")), why)
    # What follows the value is no place to report: a line's own newline would count as the next line.
    text = text.rstrip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # A string that is never closed is reported at its start; what is missing is at the end.
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        at = len(text) if cut else error.pos
        why = "the JSON ends too early" if cut else f"malformed JSON ({error.msg})"
        line = first_line + text.count("\n", 0, at)
        return _broken(path, line, at - text.rfind("\n", 0, at), _field_at(text[: error.pos]), why)
    except RecursionError:
        return _broken(path, first_line, 1, None, "JSON nested too deeply")
    except ValueError as error:  # integers of more digits than Python converts
        return _broken(path, first_line, 1, None, f"malformed JSON ({error})")


def _broken(path: str, line: int, column: int, field: str | None, why: str) -> RecordError:
    place = f'in field "{field}"' if field else "outside any field"
    message = f"{path}:{line}: column {column}, {place}: {why}"
    return RecordError(message, source=f"{path}:{line}", field=field or "")


def _field_at(text: str) -> str | None:
    """The name of the outermost field whose value `text` breaks off in."""
    candidate, name = None, None
    objects: list[bool] = []  # one entry for each bracket that is open: is it an object's?
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if token in "{[":
            objects.append(token == "{")
        elif token in "}]":
            if objects:
                objects.pop()
            if True not in objects:
                name = None
        elif token == ":" and candidate is not None:
            name = candidate
        outermost = objects.count(True) == 1 and objects[-1]
        if token == "," and outermost:
            name = None
        candidate = token[1:-1] if token.startswith('"') and outermost else None
    return name


def _list_rows(lines: Iterator[tuple[int, bytes | RecordError]], path: str, first: int) -> Iterator[tuple[str, object]]:
    """Rows of one JSON list. It is one value: when it breaks off, nothing of it can be read."""
    parts = []
    for _, line in lines:
        if isinstance(line, RecordError):
            raise line
        parts.append(line)
    rows = _decode(b"".join(parts), path, first)
    if isinstance(rows, RecordError):
        raise rows
    yield from ((f"{path}: item {number}", row) for number, row in enumerate(cast("list[object]", rows)))


def _parquet_rows(path: str) -> Iterator[tuple[str, object]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(f"{path}: parquet needs pyarrow; install datasets (the eval extra)") from error
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1
