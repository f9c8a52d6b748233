"""JSON Lines, and one JSON list or object around the rows, with the place where a line breaks off."""

from __future__ import annotations

import functools
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, cast

from clha_fast.data.encodings import not_utf8
from clha_fast.data.records import RecordError

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]', re.DOTALL)
# Names under which a file of one object has its rows, unless it is a record itself.
AROUND = ("data", "rows", "records", "examples", "instances")
_MOST_NAMES = 3  # of those that an error names
_FIELDS = {"prompt", "completions", "chosen", "messages", "instruction", "query", "question", "prefix"}


def json_rows(file: IO[bytes], path: str, compression: str = "") -> Iterator[tuple[str, object]]:
    """(place, row) of every row; one that cannot be decoded is a RecordError, so that reading can go on.

    Args:
        file: what `path` holds, decompressed; `compression` is named where that fails.
    """
    lines = _lines(file, path, compression)
    first = next((entry for entry in lines if isinstance(entry[1], RecordError) or entry[1].strip()), None)
    if first is None:
        return
    lines = itertools.chain([first], lines)
    # By content, not by suffix: ".json" is used for both.
    start = first[1].lstrip()[:1] if isinstance(first[1], bytes) else b""
    if start == b"[":
        yield from _list_rows(lines, path, first[0])
    elif start == b"{":
        yield from _object_rows(lines, path, first[0])
    else:
        yield from _line_rows(lines, path, first[0])


def _line_rows(lines: Iterable[tuple[int, bytes | RecordError]], path: str, first: int) -> Iterator[tuple[str, object]]:
    for line_number, line in lines:
        if isinstance(line, RecordError):
            yield path, line
        elif line.strip():
            row = _decode(line, path, line_number)
            if isinstance(row, RecordError) and line_number == first and not line.lstrip().startswith(b"{"):
                why = "JSON Lines begin with {, and csv and tsv files are known by their names"
                row = RecordError(f"{row}; {why}", source=row.source, field=row.field, has_way=row.has_way)
            yield f"{path}:{line_number}", row


def _lines(file: IO[bytes], path: str, compression: str) -> Iterator[tuple[int, bytes | RecordError]]:
    """Numbered lines, split at newlines only: U+2028 and its like may stand inside a JSON string."""
    number = 0
    try:
        for line in file:
            number += 1
            yield number, line.removeprefix(b"\xef\xbb\xbf")  # a mark stands wherever files were put one behind another
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        if not compression:
            raise
        yield number, RecordError(f"{path}: after line {number}: damaged {compression} data ({error})", source=path)


def _decode(data: bytes, path: str, first_line: int) -> object:
    """The JSON value in `data`, or the RecordError that says where it breaks off."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        cut = error.reason == "unexpected end of data"
        why = f"invalid UTF-8 (byte 0x{data[error.start]:02x})" if cut else not_utf8(data[error.start], path)
        return _broken(path, line, column, _field_at(data[: error.start].decode("utf-8")), why)
    # What follows the value is no place to report: a line's own newline would count as the next line.
    text = text.rstrip()
    try:
        return _parsed(text, f"{path}:{first_line}", path)
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


def _parsed(text: str, place: str, path: str) -> object:
    """The JSON value; rows in it that have a name twice are errors, each of its own (`_refused`)."""
    try:
        return _ONCE.decode(text)
    except _Twice:
        repeats: dict[int, str] = {}
    value = json.loads(text, object_pairs_hook=functools.partial(_noted, repeats))
    return _refused(value, repeats, place, path) if repeats else value


class _Repeats(RecordError):
    """A row that is whole, and has a name twice."""


class _Twice(Exception):
    """An object has a name twice."""


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice
    return found


# One for all lines: with a hook `json.loads` would make a decoder for each, which costs a good part of decoding it.
_ONCE = json.JSONDecoder(object_pairs_hook=_once_each)


def _noted(repeats: dict[int, str], pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object; one that has a name twice is noted in `repeats`, by its identity, with the name."""
    found = dict(pairs)
    repeats.pop(id(found), None)  # of one that is gone: the value of a name that is given twice
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeats[id(found)] = next(name for name in names if names.count(name) > 1)
    return found


def _refused(value: object, repeats: Mapping[int, str], place: str, path: str) -> object:
    """The value, each of whose rows with a name given twice is an error: the row itself, or one of those it holds."""
    around = isinstance(value, dict) and id(value) not in repeats
    rows = value if isinstance(value, list) else _inside(cast("dict[str, object]", value)) if around else None
    if rows is not None:
        rows[:] = [_refused_row(row, repeats, f"{path}: item {number}") for number, row in enumerate(rows)]
        return value
    return _refused_row(value, repeats, place)


def _refused_row(row: object, repeats: Mapping[int, str], place: str) -> object:
    waiting = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and id(value) in repeats:
            name = repeats[id(value)]
            message = f"{place}: {name}: the same name twice in one object, of which the last would win"
            return _Repeats(message, source=place, field=name)
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return row


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


def _list_rows(lines: Iterable[tuple[int, bytes | RecordError]], path: str, first: int) -> Iterator[tuple[str, object]]:
    """Rows of one JSON list. It is one value: when it breaks off, nothing of it can be read."""
    rows = _whole(lines, path, first)
    if isinstance(rows, RecordError):
        raise rows
    yield from ((f"{path}: item {number}", row) for number, row in enumerate(cast("list[object]", rows)))


def _whole(lines: Iterable[tuple[int, bytes | RecordError]], path: str, first: int) -> object:
    parts = []
    for _, line in lines:
        if isinstance(line, RecordError):
            raise line
        parts.append(line)
    return _decode(b"".join(parts), path, first)


def _object_rows(
    lines: Iterator[tuple[int, bytes | RecordError]], path: str, first: int
) -> Iterator[tuple[str, object]]:
    """Rows of JSON Lines; or of the one object that a file is, which may hold them: `{"data": [...]}`."""
    held = [next(lines)]
    if isinstance(held[0][1], bytes) and held[0][1].rstrip().endswith(b"}"):
        second = next((entry for entry in lines if isinstance(entry[1], RecordError) or entry[1].strip()), None)
        if second is not None:
            yield from _line_rows(itertools.chain([*held, second], lines), path, first)
            return
    else:  # written over several lines, or cut
        held += lines
    damaged = any(isinstance(line, RecordError) for _, line in held)
    value = None if damaged else _whole(held, path, first)
    if isinstance(value, _Repeats):
        yield value.source, value
        return
    if not isinstance(value, dict):
        yield from _line_rows(held, path, first)
        return
    rows = _inside(value)
    if rows is None:
        yield f"{path}:{first}", Alone(value)
    else:
        yield from ((f"{path}: item {number}", row) for number, row in enumerate(rows))


class Alone(dict[str, object]):
    """The one object that a file is, in which no rows were found."""

    def elsewhere(self, error: RecordError) -> RecordError:
        """The error of one that is no record either, with where rows would have been found if it seems to hold some."""
        held = [name for name, value in self.items() if _holds_rows(value)]
        if not held and all(isinstance(value, Mapping) for value in self.values()):
            held = list(self)
        if not held:
            return error
        names = ", ".join(held[:_MOST_NAMES]) + (", ..." if len(held) > _MOST_NAMES else "")
        where = f"Rows in one JSON object lie under {', '.join(AROUND)}, not under {names}"
        where += "" if any(isinstance(self[name], list) for name in held) else ", and in a list"
        return RecordError(f"{error}. {where}", source=error.source, field=error.field, has_way=error.has_way)


def _holds_rows(value: object) -> bool:
    """Whether it is a list of objects, or an object of objects or of such lists, by the first of each."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], Mapping)
    first = next(iter(value.values()), None) if isinstance(value, Mapping) else None
    return isinstance(first, Mapping) or (isinstance(first, list) and _holds_rows(first))


def _inside(value: Mapping[str, object]) -> list[object] | None:
    """The rows in an object that is no record itself."""
    rows = [value[name] for name in AROUND if name in value]
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) and not _FIELDS & set(value) else None
