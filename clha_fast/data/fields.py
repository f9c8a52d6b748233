"""Fields of a row, each checked where it is taken, so that an error speaks of the file's own column."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from clha_fast.data.records import (
    SAID,
    RankedRecord,
    RecordError,
    check_messages,
    check_only_content,
    is_sequence,
    make_record,
)

Row = Mapping[str, Any]
Parser = Callable[[Row, str, bool], RankedRecord]


class Reading(Mapping[str, Any]):
    """A row that remembers which of its columns were taken, so that none is left out unsaid.

    Attributes:
        row: the columns; looking at it counts as reading nothing.
        mapped: fields that a column mapping has put there, `None` for one that it says is nowhere.
        read: columns taken so far. left: paths inside them that were not ("completions.model").
    """

    def __init__(self, row: Row, mapped: Collection[str] = ()) -> None:
        self.row = row
        self.mapped = frozenset(mapped)
        self.read: set[str] = set()
        self.left: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        value = self.row[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.row

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)

    def unread(self) -> list[str]:
        """Columns, and paths inside columns, that hold something and were not taken."""
        names = [str(name) for name, value in self.row.items() if name not in self.read and holds(value)]
        return [*names, *self.left]


def columns_of(row: Row) -> Row:
    """The row's columns, to look at without taking them."""
    return row.row if isinstance(row, Reading) else row


def holds(value: object) -> bool:
    """Whether there is something in a cell; tables hold None, and empty texts and lists, where there is nothing."""
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not value)


def get(row: Row, name: str, source: str) -> Any:
    if name not in row:
        raise RecordError(f"{source}: {name}: expected a value, got nothing", source=source, field=name)
    if row[name] is None:
        raise RecordError.of(source, name, "a value", None)
    return row[name]


def items(row: Row, name: str, source: str) -> list[Any]:
    value = get(row, name, source)
    if not is_sequence(value):
        raise RecordError.of(source, name, "a list", value)
    return list(value)


def objects(row: Row, name: str, keys: tuple[str, str], source: str) -> tuple[list[Any], list[Any]]:
    """The two columns `keys` of the list of objects `row[name]`."""
    found = items(row, name, source)
    for number, item in enumerate(found):
        if not isinstance(item, Mapping):
            raise RecordError.of(source, f"{name}[{number}]", f"an object with {' and '.join(keys)}", item)
        for key in keys:
            if item.get(key) is None:
                raise RecordError.of(source, f"{name}[{number}].{key}", "a value", item.get(key))
        if isinstance(row, Reading):
            row.left.update({f"{name}.{key}": None for key, value in item.items() if key not in keys and holds(value)})
    return [item[keys[0]] for item in found], [item[keys[1]] for item in found]


def response(row: Row, value: object, source: str, field: str) -> object:
    """A response's text: itself, or the content of the one assistant message that holds it."""
    if isinstance(value, str) or not is_sequence(value):
        return value
    messages = check_messages(value, source, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RecordError.of(source, field, "a text or one assistant message", value)
    note_message(row, messages[0], field)
    return check_only_content(messages[0], source, f"{field}[0]")


def note_message(row: Row, message: Mapping[str, Any], field: str) -> None:
    """Count the keys of a response's message that nobody takes: models, dates and the like."""
    if isinstance(row, Reading):
        more = (key for key, value in message.items() if key not in ("role", "content", *SAID) and holds(value))
        row.left.update(dict.fromkeys(f"{field}.{key}" for key in more))


def make_named(names: Mapping[str, str], *args: Any, **kwargs: Any) -> RankedRecord:
    """`make_record`, whose errors speak of the file's own fields: `names` by field, "{}" the place."""
    try:
        return make_record(*args, **kwargs)
    except RecordError as error:
        base, bracket, rest = error.field.partition("[")
        name = (names.get(error.field) or names.get(base, base + "{}")).format(bracket + rest)
        message = str(error).replace(f"{error.source}: {error.field}:", f"{error.source}: {name}:", 1)
        raise RecordError(message, source=error.source, field=name, has_way=error.has_way) from error


class TextRow(dict[str, Any]):
    """A row of a table whose cells are texts (csv): numbers and lists are read where a field asks for them.

    Attributes:
        texts: cells as they stand, of columns whose names have them read as numbers or lists already.
    """

    def __init__(self, cells: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        super().__init__(cells)
        self.texts = texts or {}


def as_said(row: Row, name: str, value: Any) -> Any:
    """What a field of texts finds in a column: no number, where the cell of a csv file has been read as one."""
    if isinstance(row, TextRow) and isinstance(value, (int, float)):
        return row.texts.get(name, value)
    return value


def as_list(value: Any) -> Any:
    """A list that stands in a text cell; anything else as it is."""
    found = literal(value) if isinstance(value, str) and value.startswith("[") else None
    return value if found is None else found


def literal(text: str) -> Any:
    """A list or mapping in the text of a cell, as JSON or as Python prints it; None for any other text."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return None


def as_number(value: Any) -> Any:
    """A number, True or False, or a list of them, that stands in a text cell; anything else as it is."""
    if is_sequence(value):
        return [as_number(item) for item in value]
    if isinstance(value, str):
        if value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        with contextlib.suppress(ValueError):
            return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return value
