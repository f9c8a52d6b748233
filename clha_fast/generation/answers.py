"""Files of answers: written so that an interrupted run loses nothing, read from whatever wrote them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from clha_fast.batching.dates import dated
from clha_fast.data.bars import reading
from clha_fast.data.columns import template_of
from clha_fast.data.containers import rows_of
from clha_fast.data.prompts import Prompted, PromptRecord, prompt_hash, subset_of
from clha_fast.data.records import Prompt, RecordError, check_text
from clha_fast.files import Journal, RunIdentity, check_destination, write_lines
from clha_fast.generation.backend import EncodedPrompt, Generated, GenerationBackend, GenerationSettings
from clha_fast.generation.prompts import EncodedPrompts, encode_prompts
from clha_fast.options import count
from clha_fast.processes import ALONE, ProcessError, Processes

FINISHES = ("stop", "length")
_FIELDS = ("prompt", "answer", "finish", "prompt_hash", "subset", "tools", "chat_template_kwargs")


class GenerationError(RuntimeError):
    """Generation could not go on; the message says why and what is kept."""


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C while answers were made; the message says what is kept."""


@dataclass(frozen=True)
class Answer:
    """One line of a file of answers.

    Attributes:
        answer: without outer blanks, which are taken off as generation takes them off; may be empty.
        finish: "stop", "length" where nothing ended it, "" where that is not known.
        source: where it was read, named in errors.
    """

    prompt: Prompt
    answer: str
    finish: str = ""
    subset: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(default="answer", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", self.answer.strip())

    @property
    def prompt_hash(self) -> str:
        """As `clha_fast.data.prompts.prompt_hash`."""
        return prompt_hash(PromptRecord(self.prompt, self.source, self.template))

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of the line."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(message) for message in self.prompt]
        variables = dict(self.template)
        tools = variables.pop("tools", None)
        found = {"subset": self.subset, "tools": tools, "chat_template_kwargs": variables}
        line = {"prompt": prompt, "answer": self.answer, "finish": self.finish, "prompt_hash": self.prompt_hash}
        return {**line, **{name: value for name, value in found.items() if value}}


@dataclass(frozen=True)
class Generation:
    """What a run gave.

    Attributes:
        answers: in the order of the records. settings: with the lengths that were in force.
        resumed: prompts (the same ones count once) that an earlier run had answered. cut: prompts that lost tokens.
        said: as `EncodedPrompts.said`.
    """

    answers: list[Answer]
    settings: GenerationSettings
    resumed: int
    cut: int
    said: str = ""

    @property
    def empty(self) -> int:
        """Answers without any text."""
        return sum(not answer.answer for answer in self.answers)

    @property
    def unfinished(self) -> int:
        """Answers that nothing ended before `max_new_tokens`."""
        return sum(answer.finish == "length" for answer in self.answers)


def generate_answers(
    records: Sequence[Prompted],
    backend: GenerationBackend,
    destination: str | os.PathLike[str] | None,
    settings: GenerationSettings | None = None,
    *,
    batch_size: int = 8,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Generation:
    """Answer every record's prompt and write `destination`: JSON Lines, in the order of the records.

    A line is `{"prompt", "answer", "finish", "prompt_hash"}`, with `subset` where the record has one. Prompts are those
    of training (`encode_prompts`); equal prompts are answered once. Every batch is added to `destination`.partial as
    soon as it is answered, and `destination` appears complete or not at all. Which prompts share a batch depends on
    the records alone, so a resumed run gives the very file of one that was never interrupted. The longest prompts
    come first: memory fails at once or never.

    Args:
        destination: None, for a process alone, writes and keeps nothing.
        settings: None is greedy, with the lengths of `GenerationSettings`.
        batch_size: prompts in a batch.
        resume: continue what an earlier run with the same settings has left; nothing left is a new run.
        overwrite: replace `destination`; without `resume` also what an earlier run has left.
        progress: show a bar, in the first process.
        processes: those that share the batches (`processes.join`). All call with the same arguments, but for the
            number of the model's device, and return the same; the first one writes the very file that one alone writes.

    Raises:
        RecordError, ValueError: bad records or settings, before anything is answered; what is to be resumed is another
            run or is damaged; a model that reads padding as text, with a batch size above 1; processes with other
            arguments.
        OSError: as `clha_fast.files.check_destination`.
        GenerationError: the file cannot be written, memory does not suffice, or another process has ended.
            GenerationInterrupted: Ctrl-C. In both cases the message says what is kept.
    """
    settings = settings or GenerationSettings()
    batch_size = count("batch_size", batch_size, "a positive whole number")
    if not records:
        raise RecordError("prompts: expected at least one, got none")
    path = None if destination is None else os.fspath(destination)
    if path is not None:
        check_destination(path, resume=resume, overwrite=overwrite)
    elif processes.world > 1 or resume:
        what = "to resume" if resume else f"in which {processes.world} processes read each other's answers"
        raise ValueError(f"destination: expected a file {what}, got None")
    shown = progress and not processes.rank
    encoded = encode_prompts(records, backend.tokenizer, settings, backend.max_positions, progress=shown)
    rows = list(dict.fromkeys(encoded.prompts))
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    try:
        journal = Journal(
            None if path is None else f"{path}.partial",
            _identity(records, encoded, settings, backend, batch_size),
            batches,
            resume,
            key="answers",
            valid=_is_generated,
            items="prompts",
            done="answered",
            part=processes.rank,
        )
    except ValueError as error:
        raise dated(error, backend.tokenizer) from None
    resumed = len(journal.values)
    try:
        share = processes.share(journal)
        with journal:
            _answer(rows, backend, encoded.settings, journal, share, shown)
        processes.collect(journal)
        place = {row: number for number, row in enumerate(rows)}
        answers = []
        for record, row in zip(records, encoded.prompts, strict=True):
            text, finish = journal.values[place[row]]
            answers.append(Answer(record.prompt, text, finish, subset_of(record), record.template))
        if path is not None and not processes.rank:
            write_answers(path, answers, overwrite=overwrite)
            journal.remove()
        processes.gather("written")
    except ProcessError as error:
        raise GenerationError(f"{error}; {journal.kept()}") from error
    except OSError as error:
        raise GenerationError(f"{path}: could not be written ({error.strerror or error}); {journal.kept()}") from error
    except KeyboardInterrupt:
        raise GenerationInterrupted(f"interrupted; {journal.kept()}") from None
    return Generation(answers, encoded.settings, resumed, encoded.cut, encoded.said)


def _answer(
    rows: Sequence[EncodedPrompt],
    backend: GenerationBackend,
    settings: GenerationSettings,
    journal: Journal,
    share: Sequence[int],
    progress: bool,
) -> None:
    done, left = len(journal.values), sum(len(journal.batches[number]) for number in share)
    bar = logging.tqdm(total=done + left, initial=done, desc="Answering", unit=" prompts", disable=not progress)
    with bar:
        for number in share:
            batch = journal.batches[number]
            try:
                found = backend.answer([rows[index] for index in batch], settings)
            except torch.OutOfMemoryError as error:
                size = f"{len(batch)} prompts of up to {len(rows[batch[0]].ids):,} tokens and their answers"
                raise GenerationError(f"batch_size: {size} do not fit in memory; {journal.kept()}") from error
            journal.add(number, [list(answer) for answer in found])
            bar.update(len(batch))


def _identity(
    records: Sequence[Prompted],
    encoded: EncodedPrompts,
    asked: GenerationSettings,
    backend: GenerationBackend,
    batch_size: int,
) -> RunIdentity:
    """What decides the answers, down to the last bit, and the file."""
    source, tokens = hashlib.sha256(), hashlib.sha256()
    for record in records:
        source.update(f"{prompt_hash(record)} {subset_of(record)}\n".encode())
    for prompt in encoded.prompts:
        tokens.update(f"{prompt.ids} {prompt.stops} {prompt.ends}\n".encode())
    settings = dataclasses.asdict(asked)
    for name in ("lead", "chat_template_kwargs"):  # the tokens say it: a template's date may be given afterwards
        del settings[name]
    if not settings["temperature"]:
        del settings["seed"]  # nothing is drawn
    data = {
        "prompts": source.hexdigest(),
        "tokenizer or template": tokens.hexdigest(),
        "model": backend.fingerprint(),
    }
    return RunIdentity({**settings, **backend.describe(), "batch_size": batch_size}, data)


def _is_generated(value: Any) -> bool:
    return isinstance(value, list) and len(value) == len(Generated._fields) and all(isinstance(v, str) for v in value)


def write_answers(destination: str | os.PathLike[str], answers: Sequence[Answer], *, overwrite: bool = False) -> None:
    """Write a file of answers, complete or not at all.

    Raises:
        FileExistsError: `destination` exists and `overwrite` is not set. OSError: it cannot be written.
    """
    write_lines(destination, (answer.as_dict() for answer in answers), overwrite=overwrite)


def read_answers(source: str | os.PathLike[str]) -> list[Answer]:
    """The answers of a file, in order: rows with `prompt` and `answer`, and what else `Answer` has.

    Raises:
        RecordError: a row that is none, or with fields of other names; no row at all. OSError: no such file.
    """
    found = []
    for place, row in reading(rows_of(source)):
        if isinstance(row, RecordError):
            raise row
        if not isinstance(row, Mapping):
            raise RecordError.of(place, "", "a JSON object", row)
        unknown = [str(name) for name, value in row.items() if name not in _FIELDS and value is not None]
        if "answer" not in row or "prompt" not in row or unknown:
            expected = f"fields {', '.join(_FIELDS)} (the last five may be missing)"
            raise RecordError.of(place, unknown[0] if unknown else "", expected, sorted(map(str, row)))
        found.append(_answer_of(row, place))
    if not found:
        raise RecordError(f"{os.fspath(source)}: expected at least one answer, found none")
    return found


def _answer_of(row: Mapping[str, Any], place: str) -> Answer:
    finish = row.get("finish") or ""
    if finish not in ("", *FINISHES):
        raise RecordError.of(place, "finish", f"one of {', '.join(FINISHES)}", finish)
    record = PromptRecord(row["prompt"], place, template_of(row, place), str(row.get("subset") or ""))
    answer = check_text(row["answer"], place, "answer")
    found = Answer(record.prompt, answer, finish, record.subset, record.template, place)
    given = row.get("prompt_hash")
    if given is not None and given != found.prompt_hash:
        raise RecordError.of(place, "prompt_hash", f"{found.prompt_hash}, of this prompt, or none", given)
    return found


def occurrences(hashes: Sequence[str]) -> list[tuple[str, int]]:
    """(hash, how many equal ones stand before it): a name for each line of a file with the same prompt twice."""
    seen: Counter[str] = Counter()
    found = []
    for value in hashes:
        found.append((value, seen[value]))
        seen[value] += 1
    return found
