"""A mapping of columns: which column of a file, or path into one, holds which field of a record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clha_fast.data.fields import Reading, Row, TextRow, as_list, as_number, as_said
from clha_fast.data.names import near
from clha_fast.data.records import SIGNALS, RecordError, check_messages, is_number, is_sequence

# Fields that hold several values, one a response; each may be given as a list of columns.
_NUMBERS = ("rewards", "ranks", *SIGNALS)
_MANY = ("completions", *_NUMBERS)
# Fields that hold texts, whatever the column is called.
_TEXTS = ("prompt", "completions", "chosen", "rejected", "system", "subset", "group_by")
# What the rows of a group have in common.
_OF_GROUP = ("prompt", "tools", "chat_template_kwargs", "subset", "sft_index")
FIELDS = (
    *("prompt", "completions", "rewards", "ranks", "sft_index", "chosen", "rejected", "system"),
    *("tools", "chat_template_kwargs", *SIGNALS, "subset", "group_by"),
)


class ColumnMap:
    """Rows with their fields under the names that the readers know; the other columns stay as they are.

    Args:
        columns: column, or path into one, by field:

            - A path is the column's name, or names and positions joined by dots; through a list it takes what every
              item has (`answers.text`), and `answers.0.text` the first one's. A name with a dot in it is found first.
            - `completions`, `rewards`, `ranks` and the signals of a record (`reference_logps`, ...) take one path, to a
              list, or a list of paths, one a response; responses that a row lacks (None, reward included) are left out.
            - `prompt` takes a list of paths, too: their texts joined by newlines, empty ones left out; and None, for
              rows whose answers begin with the prompt and whose other columns do not hold it.
            - `system` becomes the first message of the prompt.
            - `group_by`: rows with the same value there are one prompt, their responses in the order of the rows; a
              cell of csv is one response, whatever its text looks like, and a list anywhere else is several.

    Raises:
        ValueError: an unknown field; a value that is no path; `group_by` without `completions`.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        if not isinstance(columns, Mapping):
            raise ValueError(f"columns: expected a mapping of fields to columns, got {columns!r}")
        for name, path in columns.items():
            if name not in FIELDS:
                raise ValueError(
                    f"columns: unknown field {name!r}{near(str(name), FIELDS)} (fields are {', '.join(FIELDS)})"
                )
            several = name in (*_MANY, "prompt")
            good = isinstance(path, str) or (path is None and name in ("prompt", "subset"))
            if several and isinstance(path, (list, tuple)):
                good = bool(path) and all(isinstance(item, str) for item in path)
            if not good:
                expected = "a column or a list of columns" if several else "a column"
                raise ValueError(f"columns: {name}: expected {expected}, got {path!r}")
        self.group_by: str | None = columns.get("group_by")
        self.columns: dict[str, str | list[str] | None] = {
            name: list(path) if isinstance(path, (list, tuple)) else path
            for name, path in columns.items()
            if name != "group_by"
        }
        self.canonical = "completions" in self.columns
        if self.group_by is not None and not self.canonical:
            raise ValueError(
                "columns: group_by: expected completions beside it, the column with the response of each row, got none"
            )

    def apply(self, row: Row, source: str) -> Reading:
        """The row with its fields in place.

        Raises:
            RecordError: a column that is not there, with the nearest name.
        """
        reading, kept = self._read(row, source)
        if kept is None or "sft_index" not in reading.row:
            return reading
        moved = {**reading.row, "sft_index": _moved(reading.row["sft_index"], kept, source)}
        return Reading(TextRow(moved) if isinstance(reading.row, TextRow) else moved, reading.mapped)

    def _read(self, row: Row, source: str) -> tuple[Reading, list[int | None] | None]:
        """The row, its `sft_index` as it is, and where its responses went, if some are left out."""
        # A row of a group is one response: in a cell of csv a text, one that looks like a list too.
        as_texts = self.group_by is not None
        taken = {self._head(row, self.group_by)} - set(FIELDS) if self.group_by is not None else set()
        found: dict[str, Any] = {}
        for field, path in self.columns.items():
            if path is None:
                found[field] = None
                continue
            paths = path if isinstance(path, list) else [path]
            taken |= {self._head(row, item) for item in paths}
            values = [self._value(row, item, field, source) for item in paths]
            if as_texts and field == "completions":
                values = [_as_written(row, *pair) for pair in zip(paths, values, strict=True)]
            if field == "prompt" and isinstance(path, list):
                found[field] = _joined(values, path, source)
            else:
                found[field] = values if isinstance(path, list) else values[0]
        kept = _drop_missing(found, self.columns) if self.canonical else None
        if isinstance(row, TextRow):
            for field in {*_MANY} & set(found) - ({"completions"} if as_texts else set()):
                found[field] = as_list(found[field])
            for field in {*_NUMBERS, "sft_index"} & set(found):
                found[field] = as_number(found[field])
        if isinstance(found.get("rewards"), bool):  # a label of good and bad
            found["rewards"] = int(found["rewards"])
        rest = {name: value for name, value in row.items() if name not in taken}
        if "system" in found:
            found["prompt"] = _with_system(found.pop("system"), found.get("prompt", rest.get("prompt")), source)
        kind = TextRow if isinstance(row, TextRow) else dict
        return Reading(kind({**rest, **found}), mapped=found), kept

    def grouped(self, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """One row for each value of `group_by`, in order of first appearance; what is no row comes as it is."""
        assert self.group_by is not None
        groups: dict[str, list[tuple[str, Row]]] = {}
        for place, row in rows:
            if not isinstance(row, Mapping):
                yield place, row
                continue
            try:
                key = self._value(row, self.group_by, "group_by", place)
                if key is None:
                    raise RecordError.of(place, self.group_by, "a value to group by", None)
            except RecordError as error:
                yield place, error
                continue
            groups.setdefault(repr(key), []).append((place, row))
        for members in groups.values():
            yield members[0][0], self._merged(members)

    def _merged(self, members: list[tuple[str, Row]]) -> Reading | RecordError:
        try:
            read = [(place, *self._read(row, place)) for place, row in members]
        except RecordError as error:
            return error
        rows = [(place, row) for place, row, _ in read]
        first = rows[0][1]
        merged = dict(first.row)
        for _, row in rows[1:]:
            said = {name: value for name, value in row.row.items() if _missing(merged.get(name)) and name != "prompt"}
            merged.update(said)
        places: list[int | None] = []
        for _, row, kept in read:
            size = len(_as_list(row.row["completions"]))
            start = sum(place is not None for place in places)
            places += [None if k is None else start + k for k in (range(size) if kept is None else kept)]
        for field in _MANY:
            if field in first.mapped:
                merged[field] = [item for _, row in rows for item in _as_list(row.row[field])]
        for place, row in rows[1:]:
            for field in _OF_GROUP:
                value = row.row.get(field)
                # One row may say it for all, but for the prompt; a subset that is no text is somebody else's column.
                missing = _missing(value)
                if (missing and field != "prompt") or (field == "subset" and not isinstance(value, str)):
                    continue
                if value != merged.get(field):
                    expected = f"the {field} of {members[0][0]}, with the same {self.group_by}"
                    bad = RecordError.of(place, field, expected, value)
                    return bad.advised("columns.subset: null leaves that column out") if field == "subset" else bad
        if None in places and "sft_index" in merged:
            try:
                merged["sft_index"] = _moved(merged["sft_index"], places, members[0][0])
            except RecordError as error:
                return error
        return Reading(merged, mapped=first.mapped)

    @staticmethod
    def _head(row: Row, path: str) -> str:
        """The column that a path goes into."""
        cuts = [len(path), *(at for at in range(len(path) - 1, 0, -1) if path[at] == ".")]
        return next((path[:cut] for cut in cuts if path[:cut] in row), path)

    @staticmethod
    def _value(row: Row, path: str, field: str, source: str) -> Any:
        try:
            value = find(row, path)
            return as_said(row, path, value) if field in _TEXTS else value
        except KeyError as error:
            names = error.args[1]
            seen = f"there are {', '.join(map(str, names))}" if names else "there is none"
            message = f"{source}: {path}: expected a column for {field}, got none of that name ({seen})"
            message += near(str(error.args[0]), names)
            raise RecordError(message, source=source, field=path, has_way=True) from None


def _as_written(row: Row, path: str, value: Any) -> Any:
    """The text of a cell that has been read as a list or an object, but for messages."""
    items = value if isinstance(value, list) else [value]
    said = not isinstance(value, (list, dict)) or any(isinstance(item, dict) and "role" in item for item in items)
    return row.texts.get(path, value) if not said and isinstance(row, TextRow) else value


def find(value: Any, path: str) -> Any:
    """What stands at a dotted path; KeyError(the name that is missing, the names that are there)."""
    if isinstance(value, Mapping):
        cuts = [len(path), *(at for at in range(len(path) - 1, 0, -1) if path[at] == ".")]
        for cut in cuts:
            if path[:cut] in value:
                return find(value[path[:cut]], path[cut + 1 :]) if cut < len(path) else value[path]
        raise KeyError(path, list(value))
    if is_sequence(value):
        head, _, rest = path.partition(".")
        if head.removeprefix("-").isdigit():
            if not -len(value) <= int(head) < len(value):
                raise KeyError(head, list(range(len(value))))
            item = value[int(head)]
            return find(item, rest) if rest else item
        return [find(item, path) for item in value]
    if value is None:
        return None
    raise KeyError(path, [])


def _joined(values: list[Any], paths: list[str], source: str) -> str:
    for value, path in zip(values, paths, strict=True):
        if value is not None and not isinstance(value, str):
            raise RecordError.of(source, path, "a text, to be joined to a prompt", value)
    text = "\n".join(value for value in values if value)
    if not text:
        raise RecordError.of(source, ", ".join(paths), "a text in one of them for prompt", None)
    return text


def _drop_missing(found: dict[str, Any], columns: Mapping[str, Any]) -> list[int | None] | None:
    """Leave out the places where every field that is a list of columns has None; says where each place went, if any."""
    lists = [field for field in _MANY if field in found and isinstance(columns[field], list)]
    if "completions" not in lists or len({len(found[field]) for field in lists}) > 1:
        return None
    count = len(found["completions"])
    kept = [k for k in range(count) if any(found[field][k] is not None for field in lists)]
    for field in lists:
        found[field] = [found[field][k] for k in kept]
    if "rewards" in lists and all(value is None for value in found["rewards"]):
        found["rewards"] = None
    return None if len(kept) == count else [kept.index(k) if k in kept else None for k in range(count)]


def _moved(sft_index: Any, places: list[int | None], source: str) -> Any:
    """Where the response of `sft_index` went; what is no place of the row's is refused with others, later."""
    if not is_number(sft_index) or sft_index not in range(len(places)):
        return sft_index
    if places[int(sft_index)] is None:
        raise RecordError.of(source, "sft_index", "the place of a response that is there", sft_index)
    return places[int(sft_index)]


def _missing(value: Any) -> bool:
    """Whether a cell says nothing; an empty list says that there are none."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _with_system(system: Any, prompt: Any, source: str) -> Any:
    if not system:
        return prompt
    if not isinstance(system, str):
        raise RecordError.of(source, "system", "a text", system)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not is_sequence(prompt):
        raise RecordError.of(source, "prompt", "a text or a list of messages, for a system text before it", prompt)
    # Looked at as they stand in the column: a table gives them like keys, which this message has not.
    return [{"role": "system", "content": system}, *(check_messages(prompt, source, "prompt") if prompt else ())]


def _as_list(value: Any) -> list[Any]:
    """The values of one row of a group: one response, which may be a list of messages, or several."""
    if not is_sequence(value) or (value and all(isinstance(item, Mapping) and "role" in item for item in value)):
        return [value]
    return list(value)
