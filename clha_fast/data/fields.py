"""Fields of a row, each checked where it is taken, so that an error speaks of the file's own column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clha_fast.data.records import RankedRecord, RecordError, check_messages, is_sequence, make_record

Row = Mapping[str, Any]
Parser = Callable[[Row, str, bool], RankedRecord]


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
    return [item[keys[0]] for item in found], [item[keys[1]] for item in found]


def response(value: object, source: str, field: str) -> object:
    """A response's text: itself, or the content of the one assistant message that holds it."""
    if isinstance(value, str) or not is_sequence(value):
        return value
    messages = check_messages(value, source, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RecordError.of(source, field, "a text or one assistant message", value)
    return messages[0]["content"]


def make_named(names: Mapping[str, str], *args: Any, **kwargs: Any) -> RankedRecord:
    """`make_record`, whose errors speak of the file's own fields: `names` by field, "{}" the place."""
    try:
        return make_record(*args, **kwargs)
    except RecordError as error:
        base, bracket, rest = error.field.partition("[")
        name = (names.get(error.field) or names.get(base, base + "{}")).format(bracket + rest)
        message = str(error).replace(f"{error.source}: {error.field}:", f"{error.source}: {name}:", 1)
        raise RecordError(message, source=error.source, field=name) from error
