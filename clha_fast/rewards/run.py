"""The responses of a file, cut into batches that a model scores one after another, each kept as soon as it is done."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from transformers.utils import logging

from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.dates import dated
from clha_fast.batching.workers import compact
from clha_fast.data.bars import LARGE
from clha_fast.data.readers import Source, read_records
from clha_fast.data.records import RankedRecord
from clha_fast.files import Journal, RunIdentity, write_lines
from clha_fast.options import count
from clha_fast.processes import ProcessError, Processes
from clha_fast.rewards.rows import read_as_text

_SHARING = ("shared", "auto")  # layouts in which responses may stand behind one prompt


class ScoringError(RuntimeError):
    """Scoring could not go on; the message says why and what is kept."""


class ScoringInterrupted(KeyboardInterrupt):
    """Ctrl-C while scoring; the message says what is kept."""


class Row(NamedTuple):
    """The tokens of one response behind its prompt."""

    prompt: Sequence[int]
    response: Sequence[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.response]


class ScoringRun:
    """The token rows of all responses, cut into batches of like length.

    Args:
        model: the one that scores. collator: what tokenises the records, and cuts them. layout: of the rows that run;
            where responses share a prompt, those of a record stand side by side.

    Attributes:
        truncated: records of which something was cut.

    Raises:
        ValueError: a bad batch size. RecordError: as `RankedCollator.tokenize_record`.
    """

    key: ClassVar[str]  # what a response's score is called in the journal
    scorer: ClassVar[str]  # what the model is called
    answer_prefix = ""  # what stands before every response, read and not scored

    def __init__(
        self,
        records: list[RankedRecord],
        model: Any,
        collator: RankedCollator,
        batch_size: int,
        progress: bool,
        layout: str,
    ) -> None:
        self.records = records
        self.model = model
        self.batch_size, self.layout = count("batch_size", batch_size, "a positive integer"), layout
        self.rows: list[Row] = []
        self.places: list[tuple[str, int]] = []  # the record and response that a row is from
        self.rows_of: list[list[int]] = []  # positions of the rows of each record
        self.truncated = 0
        self.collator = collator
        self._tokenise(collator, progress and len(records) > LARGE)
        lengths = [len(row.tokens) for row in self.rows]
        rows_of = self.rows_of if layout in _SHARING else [[row] for row in range(len(self.rows))]
        self.batches = whole_records(rows_of, lengths, batch_size)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers beside model, data and batches."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the model."""
        raise NotImplementedError

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """The scores of some rows, float32 [len(rows)], on the CPU."""
        raise NotImplementedError

    def _tokenise(self, collator: RankedCollator, progress: bool) -> None:
        for record in logging.tqdm(self.records, desc="Tokenising", unit=" prompts", disable=not progress):
            feature, prompt_cut, cut = collator.tokenize_behind(record, self.answer_prefix)
            self.truncated += bool(prompt_cut or cut)
            feature = compact(feature)  # rows of all records are held, and those of one share its prompt
            found: dict[tuple[int, ...], int] = {}
            for number, ids in enumerate(feature["completion_ids"]):
                # The same response twice is scored once: apart, padding could part their scores by a last bit.
                if tuple(ids) not in found:
                    found[tuple(ids)] = len(self.rows)
                    self.rows.append(Row(feature["prompt_ids"], ids))
                    self.places.append((record.source, number))
            self.rows_of.append([found[tuple(ids)] for ids in feature["completion_ids"]])

    def identity(self) -> RunIdentity:
        """What decides the numbers, down to the last bit."""
        source, tokens = hashlib.sha256(), hashlib.sha256()
        for record in self.records:
            source.update(json.dumps(record.as_dict(), sort_keys=True).encode() + b"\n")
        for row in self.rows:
            tokens.update(f"{row.tokens}\n".encode())
        settings = {
            "batch_size": self.batch_size,
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **({} if self.layout == "padded" else {"layout": self.layout}),
            **self.settings(),
        }
        data = {
            "source": source.hexdigest(),
            "tokenizer or template": tokens.hexdigest(),
            self.scorer: self.fingerprint(),
        }
        return RunIdentity(settings, data)

    def journal(self, path: str | None, resume: bool = False, part: int = 0) -> Journal:
        """What keeps the scores, in the file `path` where there is one; `part` is the number of the process."""
        words = {"key": self.key, "items": "responses", "done": "scored"}
        try:
            return Journal(path, self.identity(), self.batches, resume, valid=_is_score, part=part, **words)
        except ValueError as error:
            raise dated(error, self.collator.tokenizer) from None

    def score(self, journal: Journal, share: Sequence[int], progress: bool) -> None:
        """Score the batches of these numbers."""
        if share:
            self._check_padding(journal)
        done, left = len(journal.values), sum(len(self.batches[number]) for number in share)
        bar = logging.tqdm(total=done + left, initial=done, desc="Scoring", unit=" responses", disable=not progress)
        with bar:
            for number in share:
                batch = self.batches[number]
                scores = self._forward([self.rows[index] for index in batch], journal)
                self._check_finite(batch, scores, journal)
                # Nine digits are enough to read the same float32 again.
                journal.add(number, [float(f"{score:.9g}") for score in scores.tolist()])
                bar.update(len(batch))

    def write(
        self,
        path: str,
        finish: Callable[[dict[int, float]], Sequence[Mapping[str, Any]]],
        *,
        resume: bool,
        overwrite: bool,
        progress: bool,
        processes: Processes,
    ) -> int:
        """Score what is not yet scored, and write the lines that `finish` makes of the scores by position of the row.

        Of several processes each scores its share; the first one writes.

        Returns:
            how many responses an earlier run had left.

        Raises:
            ScoringError, ScoringInterrupted: as `scoring.score_file`.
        """
        journal = self.journal(f"{path}.partial", resume, processes.rank)
        resumed = len(journal.values)
        try:
            share = processes.share(journal)
            with journal:
                self.score(journal, share, progress and not processes.rank)
            processes.collect(journal)
            lines = finish(journal.values)
            if not processes.rank:
                write_lines(path, lines, overwrite=overwrite)
                journal.remove()
            processes.gather("written")
        except ProcessError as error:
            raise ScoringError(f"{error}; {journal.kept()}") from error
        except OSError as error:
            raise ScoringError(f"{path}: could not be written ({error.strerror or error}); {journal.kept()}") from error
        except KeyboardInterrupt:
            raise ScoringInterrupted(f"interrupted; {journal.kept()}") from None
        return resumed

    def _forward(self, rows: Sequence[Row], journal: Journal) -> Tensor:
        try:
            return self.forward(rows)
        except torch.OutOfMemoryError as error:
            size = f"{len(rows)} responses of up to {len(rows[0].tokens):,} tokens"
            raise ScoringError(f"batch_size: {size} do not fit in memory; {journal.kept()}") from error

    def _check_padding(self, journal: Journal) -> None:
        """Some models read padding as text whatever the mask says; their scores must not be written."""
        lengths = [len(row.tokens) for row in self.rows]
        ragged = next((batch for batch in self.batches if lengths[batch[-1]] < lengths[batch[0]]), None)
        if ragged is None:
            return
        longer, shorter = self.rows[ragged[0]], self.rows[ragged[-1]]
        shown = read_as_text(lambda rows: self._forward(rows, journal), self.model, longer, shorter)
        if shown:
            raise ScoringError(
                f"batch_size: expected 1 for {type(self.model).__name__}, which reads padding as text ({shown}), got "
                f"{self.batch_size}"
            )

    def _check_finite(self, batch: Sequence[int], scores: Tensor, journal: Journal) -> None:
        for index, score in zip(batch, scores.tolist(), strict=True):
            if not math.isfinite(score):
                source, number = self.places[index]
                raise ScoringError(
                    f"{source}: completions[{number}]: expected a finite score, got {score}; {journal.kept()}"
                )


def families(rows: Sequence[Row], layout: str) -> list[list[Row]]:
    """Neighbours with one prompt, which share it where `layout` does; else each row alone."""
    if layout not in _SHARING:
        return [[row] for row in rows]
    return [list(same) for _, same in itertools.groupby(rows, key=lambda row: row.prompt)]


def whole_records(rows_of: Sequence[Sequence[int]], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions of rows in batches of at most `size`, the longest records first, the rows of a record side by side."""
    records = sorted(({*rows} for rows in rows_of), key=lambda rows: -max((lengths[row] for row in rows), default=0))
    order = [row for rows in records for row in sorted(rows)]
    return [order[start : start + size] for start in range(0, len(order), size)]


def as_records(
    source: Source | Sequence[RankedRecord], format: str, columns: Mapping[str, Any] | None
) -> list[RankedRecord]:
    """Records as they are, or those of a file or table."""
    if not isinstance(source, (str, os.PathLike)):
        rows = list(cast("Iterable[Any]", source))
        if rows and all(isinstance(row, RankedRecord) for row in rows):
            return rows
        source = rows
    return read_records(source, format, columns=columns)


def _is_score(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
