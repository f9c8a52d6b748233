"""Rows of csv and tsv files: cells parted by commas, semicolons or tabs, below a line of names."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

from clha_fast.data.encodings import escaped_byte, not_utf8
from clha_fast.data.fields import TextRow, as_number, literal
from clha_fast.data.names import names_scores
from clha_fast.data.records import SIGNALS, RecordError

# Cells that hold lists where they begin with a bracket.
_LISTS = {"completions", "responses", "answers", "prefix", "suffix", "tools", "chat_template_kwargs", *SIGNALS}
# Cells that hold numbers, or True and False, beside those of columns named as scores: what says which of two responses
# was preferred.
_NUMBERS = {
    *("sft_index", "margin", "label", "labels", "choice", "better_response_id", "overall_preference"),
    *("preference_strength", "winner_model_a", "winner_model_b", "winner_tie"),
}
_QUOTES = "a cell that holds a comma, or whatever else parts the cells, stands in quotes"
_BEHIND = (
    "expected the cell to end with the quote that closes it, got more behind; a cell that begins with a quote stands "
    'in quotes, in which each one is written twice ("""Yes,"" he said")'
)
_ROWS = 256  # among which row numbers are looked for, at a time
_LONGEST = 2**31 - 1  # characters of a cell: the most that a long holds everywhere


def delimited_rows(file: IO[bytes], path: str, kind: str) -> Iterator[TextRow | RecordError]:
    """Rows of a "csv" or "tsv" file in UTF-8; one that is none is an error, named by its line, and so is one with more
    cells than the header has names.

    Texts are as they stand: "NA", "null" and "1.0" may be responses. Row numbers without a name are left out, whether
    the header has an empty name for them (`DataFrame.to_csv`) or none (R's `write.table`).

    Raises:
        RecordError: a quote that is never closed, a header that is no UTF-8.
    """
    found = _cells(file, path, "\t" if kind == "tsv" else _separator(file))
    header = next(found, None)
    if header is None:
        return
    if isinstance(header[1], RecordError):
        raise header[1]
    names = _names(header[1])
    first: int | None = None  # of numbers in front of the cells
    start = 0
    while block := list(itertools.islice(found, _ROWS)):
        rows: list[list[str] | RecordError] = []
        first = _first_number(block, len(names)) if start == 0 else first
        for number, (line, cells) in enumerate(block, start):
            if isinstance(cells, RecordError):
                rows.append(cells)
                continue
            counted = first is None or cells[0] == str(number + first)
            cells = cells if first is None else cells[1:]
            if counted and len(cells) <= len(names):
                rows.append(cells + [""] * (len(names) - len(cells)))
                continue
            place = f"{path}: line {line}"
            expected = f"{len(names)} cells, one a name of the header" if counted else "its number in front, as before"
            got = f"got {len(cells)}; {_QUOTES}" if counted else "got none"
            rows.append(RecordError(f"{place}: expected {expected}, {got}", source=place))
        numbers = {
            column
            for column, name in enumerate(names)
            if name.startswith("Unnamed: ")
            and all(isinstance(row, RecordError) or row[column] == str(k) for k, row in enumerate(rows, start))
        }
        start += len(rows)
        for row in rows:
            yield row if isinstance(row, RecordError) else _text_row(names, row, numbers)


def _text_row(names: Sequence[str], cells: Sequence[str], without: set[int]) -> TextRow:
    row = {name: cell for number, (name, cell) in enumerate(zip(names, cells, strict=True)) if number not in without}
    read = {name: _cell(name, cell) for name, cell in row.items()}
    return TextRow(read, {name: row[name] for name, value in read.items() if value not in (None, row[name])})


def _cells(file: IO[bytes], path: str, separator: str) -> Iterator[tuple[int, list[str] | RecordError]]:
    """(line that it begins on, from 1; cells) of each row; blank lines are none."""
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _numbered(_Lines(text), path, separator)
    finally:
        with contextlib.suppress(ValueError):  # the file is closed already
            text.detach()


def _numbered(lines: _Lines, path: str, separator: str) -> Iterator[tuple[int, list[str] | RecordError]]:
    # Strict, or `"Yes," he said` in a file without quoting would lose its quotes in silence.
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        lines.escaped = None
        limit = csv.field_size_limit(_LONGEST)  # of the whole process: 131,072 characters, unless told
        try:
            cells = next(reader, None)
        except csv.Error as error:
            place = f"{path}: line {line}"
            if lines.ended:
                message = f"{path}: damaged csv file (a quote that opens in the row of line {line} is never closed)"
                raise RecordError(message, source=path) from error
            if "expected after" not in str(error):
                raise RecordError(f"{place}: damaged file ({error})", source=path) from error
            yield line, RecordError(f"{place}: {_BEHIND}", source=place, has_way=True)
            continue
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if lines.escaped is not None:
            place = f"{path}: line {line}"
            yield line, RecordError(f"{place}: {not_utf8(lines.escaped, path)}", source=place, has_way=True)
        elif len(cells) > 1 or (cells and not cells[0].isspace()):  # "" in quotes is a row
            yield line, cells


class _Lines:
    """Lines of a file.

    Attributes:
        ended: the reader has asked for one behind the last. escaped: a byte of the lines since it was None that is no
            UTF-8.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.ended = False
        self.escaped: int | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        for line in self.file:
            if self.escaped is None:
                self.escaped = escaped_byte(line)
            return line
        self.ended = True
        raise StopIteration


def _names(header: Sequence[str]) -> list[str]:
    """Names of the columns: "prompt, chosen" without the blank, which is no part of a name; no two are the same."""
    names = []
    for number, cell in enumerate(header):
        again = header[:number].count(cell)
        names.append(f"Unnamed: {number}" if not cell.strip() else f"{cell}.{again}" if again else cell)
    bare = [name.strip() for name in names]
    return bare if len(set(bare)) == len(bare) else names


def _first_number(block: Sequence[tuple[int, list[str] | RecordError]], width: int) -> int | None:
    """The number in front of the first of these rows, where most have one there that no name of the header is above."""
    for first in (0, 1):
        counted = sum(
            not isinstance(cells, RecordError) and len(cells) == width + 1 and cells[0] == str(k)
            for k, (_, cells) in enumerate(block, first)
        )
        if 2 * counted > len(block):
            return first
    return None


def _separator(file: IO[bytes]) -> str:
    """The comma, but for a header that has none: what spreadsheets of other countries write, or tabs."""
    header = cast("Any", file).peek(1 << 16).partition(b"\n")[0]
    return next((mark for mark in ",;\t" if mark.encode() in header), ",")


def _cell(name: str, cell: str) -> Any:
    """None where it is empty, a number in a column of scores, lists and messages from their JSON or from what Python
    prints of them (as `DataFrame.to_csv` does)."""
    if not cell:
        return None
    if cell[0] in "[{":
        value = literal(cell)
        messages = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
        if messages or (value is not None and (name in _LISTS or names_scores(name))):
            return value
    return as_number(cell) if names_scores(name) or name in _NUMBERS else cell
