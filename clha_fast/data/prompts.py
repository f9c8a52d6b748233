"""Prompts that wait for an answer: those of ranked records, or a file of prompts alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clha_fast.data.answers import is_tree
from clha_fast.data.bars import reading
from clha_fast.data.columns import template_of
from clha_fast.data.containers import Source, rows_of
from clha_fast.data.fields import as_said, columns_of
from clha_fast.data.formats import detect_format
from clha_fast.data.names import names_scores
from clha_fast.data.notes import Notes, logger, says
from clha_fast.data.readers import MOST_UNKNOWN, none_good, read_records
from clha_fast.data.records import Prompt, RankedRecord, RecordError, check_text
from clha_fast.data.split import prompt_key

# What may stand beside a prompt in a file of prompts alone.
_BESIDE = ("subset", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class PromptRecord:
    """A prompt without any response: the fields of `RankedRecord`, and its errors.

    Attributes:
        extra: what its row has beside, under the columns' names, for a reward function (a solution, say).
    """

    prompt: Prompt
    source: str = field(default="prompt", compare=False)
    template: Mapping[str, Any] = field(default_factory=dict)
    subset: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", self.ranked("response").prompt)

    def ranked(self, response: str) -> RankedRecord:
        """The prompt with one response."""
        return RankedRecord(self.prompt, (response,), source=self.source, template=self.template)


Prompted = RankedRecord | PromptRecord


def subset_of(record: Prompted) -> str:
    """The part of its data set that a record is from, "" where there are no parts."""
    return str(getattr(record, "subset", ""))


def _is_open(prompt: Prompt) -> bool:
    return isinstance(prompt, str) and bool(prompt[-1:].strip())


def begin_with_blank(records: Iterable[RankedRecord]) -> bool | None:
    """Whether most responses behind texts that do not end in a blank begin with one; None without such a text."""
    begun = [text[:1].isspace() for record in records if _is_open(record.prompt) for text in record.completions]
    return 2 * sum(begun) > len(begun) if begun else None


def answered(record: Prompted, answers: Sequence[str], blank: bool = True) -> RankedRecord:
    """The prompt with answers as generation gives them, without outer blanks, in the form that responses of data have.

    Behind a text that does not end in a blank ("Assistant:", "TL;DR:") an answer begins with one, its own or one that
    is put there, where the record's responses do: what reads the record has learnt from such responses. Where the
    record's responses begin without ("What is it?" and "A cat", "<|assistant|>"), and behind messages, answers stay as
    they are.

    Args:
        blank: whether they begin with one behind such a prompt alone, which has no response to show it.
    """
    if isinstance(record, RankedRecord):
        blank = all(text[:1].isspace() for text in record.completions)
    blank = blank and _is_open(record.prompt)
    texts = tuple(f" {text}" if blank and text[:1].strip() else text for text in answers)
    return RankedRecord(record.prompt, texts, source=record.source, template=record.template)


def prompt_hash(record: Prompted) -> str:
    """What stands for a prompt in files of answers: 16 hexadecimal digits, the same with or without outer blanks."""
    key = prompt_key(record)
    if record.template:
        key += json.dumps(dict(record.template), sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def read_prompts(
    source: Source,
    format: str = "auto",
    errors: list[RecordError] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    beside: bool = False,
) -> list[Prompted]:
    """All prompts of a source in order: what `read_records` reads, or rows with a `prompt` and no response.

    Rows of prompts alone may have `subset`, `tools` and `chat_template_kwargs` beside; columns of other names become
    `PromptRecord.extra` where `columns` maps `prompt` alone.

    Args:
        errors: as `read_records`.
        beside: take any columns beside a `prompt` for `extra`, in rows of no known format.

    Raises:
        RecordError, ValueError, OSError: as `read_records`; a row of another kind among prompts alone.
    """
    rows = source if isinstance(source, (str, os.PathLike)) else list(source)
    if format != "auto" or not _alone(rows, columns, beside, errors is not None):
        notes = Notes(os.fspath(rows) if isinstance(rows, (str, os.PathLike)) else "records")
        ranked = read_records(rows, format, errors=errors, columns=columns, notes=notes)
        # What is to be said of responses is none of a prompt's.
        Notes(notes.name, notes.records, bare=notes.bare, unread=notes.unread).say()
        _say_silent(ranked)
        return list(ranked)
    found: list[Prompted] = []
    bad: list[RecordError] = []
    for place, row in reading(rows_of(rows)):
        try:
            found.append(_prompt(row, place, None if columns is None else columns["prompt"], beside))
        except RecordError as error:
            if errors is None:
                raise
            bad.append(error)
    if bad and not found:
        raise none_good(os.fspath(rows) if isinstance(rows, (str, os.PathLike)) else "prompts", bad[0], len(bad))
    if errors is not None:
        errors += bad
    _say_silent(found)
    return found


def _say_silent(found: Sequence[Prompted]) -> None:
    silent = [record for record in found if not says(record.prompt)]
    if silent:
        logger.warning(
            f"{len(silent):,} of {len(found):,} prompts have no text, and are answered nevertheless (first: "
            f"{silent[0].source})"
        )


def _alone(source: Source, columns: Mapping[str, Any] | None, beside: bool, good: bool) -> bool:
    """Whether the first row holds a prompt alone; with `good` the first of some that has a prompt and a known form."""
    if columns is not None:
        return set(columns) == {"prompt"} and isinstance(columns["prompt"], str)
    first: RecordError | None = None
    for place, row in itertools.islice(rows_of(source), MOST_UNKNOWN if good else 1):
        if good and not (isinstance(row, Mapping) and columns_of(row).get("prompt")):
            continue
        try:
            return _holds_alone(row, place, beside)
        except RecordError as error:
            first = first or error
    if first is not None:
        raise first
    return False


def _holds_alone(row: object, place: str, beside: bool) -> bool:
    if not isinstance(row, Mapping) or is_tree(row):
        return False
    given = columns_of(row)
    found = {name: value for name, value in given.items() if value is not None}
    if "prompt" not in found:  # one that is null is a prompt that is missing, and no other format
        return "prompt" in given and not set(found) - set(_BESIDE)
    others = [name for name in found if name not in ("prompt", *_BESIDE)]
    if others:
        try:
            detect_format(given, place)
        except RecordError as error:
            if not beside:
                raise RecordError(
                    f"{place}: expected a prompt alone, or responses in a known format, got beside prompt "
                    f"{', '.join(others)}; columns={{'prompt': 'prompt'}} (--columns.prompt prompt) reads the prompt "
                    "alone, and docs/data.md shows the formats",
                    source=place,
                    field=others[0],
                    has_way=True,
                ) from error
        else:
            return False
    return True


def _prompt(row: Any, place: str, mapped: str | None, beside: bool) -> PromptRecord:
    column = "prompt" if mapped is None else mapped
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, Mapping):
        raise RecordError.of(place, "", "a JSON object", row)
    others = {
        name: value if names_scores(name) else as_said(row, name, value)
        for name, value in row.items()
        if value is not None and name not in (column, *_BESIDE)
    }
    if mapped is None and not beside:
        for name, value in others.items():
            raise RecordError.of(place, name, "a prompt alone, as in other rows", value)
    if row.get(column) is None:
        raise RecordError.of(place, column, "a prompt", row.get(column))
    subset = check_text(row.get("subset") or "", place, "subset")
    return PromptRecord(as_said(row, column, row[column]), place, template_of(row, place), subset, others)
