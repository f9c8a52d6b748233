"""Columns that other libraries read and this one does not: none of them is left out unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from clha_fast.data.fields import Reading, Row, columns_of, holds
from clha_fast.data.names import mapping_text, scores_of, words
from clha_fast.data.records import RankedRecord, RecordError, check_text, is_sequence, without_none

# Words of a column's name -> what to do instead. Each would change the prompt or the answers.
_SYSTEM = 'the system text as first message of prompt, or columns={"system": column}'
_TEXT_ONLY = "rows of text alone: models are trained on text here, so leave out the rows that need it, or the column"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REFUSED: dict[tuple[str, ...], str] = {
    **dict.fromkeys((("system",), ("system", "prompt"), ("system", "message")), f"no such column (give {_SYSTEM})"),
    **dict.fromkeys((*((name,) for name in _MEDIA), ("pixel", "values")), _TEXT_ONLY),
}
# What rendering decides itself: the place where responses begin depends on it.
_OWN = (
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "messages"),
)
# Keys of a JSON schema that may be null; tables give every object every key that any of them has, as None.
_NULLS = ("default", "const", "example")


def check_columns(row: Mapping[str, Any], source: str) -> None:
    """Refuse columns of a system text or of images, sound and video with something in them; warn of `margin`.

    Raises:
        RecordError: there is one.
    """
    for name, value in columns_of(row).items():
        expected = _REFUSED.get(words(str(name)))
        if expected is not None and holds(value):
            raise RecordError.of(source, str(name), expected, value, has_way=expected != _TEXT_ONLY)
    if row.get("margin") is not None:
        # The same text for every record, so that Python shows it once.
        warnings.warn(
            "margin: this column is not used; the loss's own margin is margin * (j - i), set by the option margin",
            stacklevel=2,
        )


def template_of(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` give the chat template, {} where there are none.

    Raises:
        RecordError: `tools` is no list of mappings; `chat_template_kwargs` is no mapping or sets what rendering does.
    """
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    if tools and not (is_sequence(tools) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RecordError.of(source, "tools", "a list of tools, each a JSON schema", tools)
    if variables and not isinstance(variables, Mapping):
        raise RecordError.of(source, "chat_template_kwargs", "a mapping", variables)
    for name in variables or {}:
        if name in _OWN:
            raise RecordError.of(source, "chat_template_kwargs", "variables of the chat template's own", name)
    found: dict[str, Any] = without_none(dict(variables or {}))
    if tools:
        # One other null, and a table has filled the schemas up: then a default is not told from none.
        filled = any(name not in _NULLS for name in _nulls(tools))
        found["tools"] = without_none(tools, () if filled else _NULLS)
    return found


def subset_of(row: Row, source: str) -> str:
    """The text in the column `subset`, "" where there is none; numbers of another library's are left unread.

    Raises:
        RecordError: a column that is mapped to it holds something else.
    """
    value = columns_of(row).get("subset")
    mapped = isinstance(row, Reading) and "subset" in row.mapped and value is not None
    return check_text(row["subset"], source, "subset") if mapped or isinstance(value, str) else ""


def check_unread(reading: Reading, record: RankedRecord, source: str) -> None:
    """Refuse what was mapped or looks like rewards and was not taken by the row's reader.

    Raises:
        RecordError: a mapped field that the format does not read; a column that is named and shaped as scores or ranks
            of a record without rewards.
    """
    for name in reading.mapped - reading.read:
        if reading.row[name] is not None:
            expected = f"a field that this format reads (map completions as well, or leave {name} out)"
            raise RecordError.of(source, f"columns.{name}", expected, reading.row[name], has_way=True)
    if record.rewards is not None:
        return
    for name in reading.unread():
        field = scores_of(name, reading.row.get(name), len(record.completions))
        if field is not None:
            message = f'{source}: {name}: unknown field, expected "{field}", or {mapping_text(field, name)}'
            raise RecordError(message, source=source, field=name, has_way=True)


def _nulls(value: Any) -> Iterator[str]:
    """Keys of mappings inside a value that hold None."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from [str(name)] if item is None else _nulls(item)
    elif is_sequence(value):
        for item in value:
            yield from _nulls(item)
