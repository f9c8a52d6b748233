"""Rewards for ranked responses, kept in a journal so that an interrupted run loses nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import logging

from clha_fast.data.convert import convert
from clha_fast.data.notes import Notes
from clha_fast.data.readers import Source, read_records
from clha_fast.data.records import RankedRecord, make_record
from clha_fast.files import Journal, RunIdentity, check_destination
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.rewards.rows import read_as_text, reward_collator, token_rows

__all__ = [
    "RewardModel",
    "ScoreResult",
    "ScoringError",
    "ScoringInterrupted",
    "check_destination",
    "load_reward_model",
    "score_file",
    "score_records",
]

_LARGE = 2000  # records; tokenising fewer is over before a bar could be read


class ScoringError(RuntimeError):
    """Scoring could not go on; the message says why and what is kept."""


class ScoringInterrupted(KeyboardInterrupt):
    """Ctrl-C while scoring; the message says what is kept."""


@dataclass(frozen=True)
class ScoreResult:
    """What a run of scoring gave.

    Attributes:
        records: the source's records in its order, with the new rewards.
        written: the records as written: the same, or each best first.
        candidates: responses in all. resumed: responses (the same ones of a record count once) whose rewards an
            earlier run had left.
        truncated: records of which something was cut to max_length tokens.
        replaced: records that had rewards before.
    """

    records: list[RankedRecord]
    written: list[RankedRecord]
    candidates: int
    resumed: int
    truncated: int
    replaced: int
    max_length: int | None


def score_file(
    source: Source | Sequence[RankedRecord],
    destination: str | os.PathLike[str],
    reward_model: RewardModel,
    *,
    format: str = "auto",
    columns: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    rank_by_reward: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ScoreResult:
    """Write every record of `source` to `destination` with the rewards of `reward_model`, as canonical JSON Lines.

    A response is scored on the tokens that training gives it (`RankedCollator`): the prompt, through the chat
    template where it is a list of messages and the tokenizer has one, then the response and what closes it. Rewards
    that a record had are replaced.

    Every batch is added to `destination`.partial as soon as it is scored, and `destination` appears complete or not
    at all. Which responses share a batch depends on the source alone, so a resumed run gives the very numbers, and
    the very file, of one that was never interrupted. The longest responses come first: memory fails at once or never.

    Args:
        source: records, or as `clha_fast.data.iter_records`, with `format` and `columns`.
        batch_size: responses in a forward pass.
        max_length: tokens of prompt and response together, cut as in training; None takes the model's limit.
        rank_by_reward: write each record best first, equal rewards in the order given. The SFT target becomes the
            best response, unless the record has named another than the first: then it follows that one.
        resume: continue what an earlier run with the same settings has left; nothing left is a new run.
        overwrite: replace `destination`; without `resume` also what an earlier run has left.
        progress: show a bar.

    Raises:
        RecordError: a bad record, as `iter_records` and `RankedCollator.tokenize_record`; nothing is scored then.
        ValueError: a bad option; what is to be resumed is another run or is damaged.
        OSError: as `check_destination`; the source cannot be read.
        ScoringError: a file cannot be written, a score is not finite, memory does not suffice, or the model gives a
            response another score when others are batched with it.
        ScoringInterrupted: Ctrl-C. In both cases the message says what is kept.
    """
    check_destination(destination, resume=resume, overwrite=overwrite)
    records = _as_records(source, format, columns)
    run = _Run(records, reward_model, batch_size, max_length, progress)
    path = os.fspath(destination)
    journal = run.journal(f"{path}.partial", resume)
    resumed = len(journal.values)
    try:
        with journal:
            run.score(journal, progress)
        scored = run.with_rewards(journal.values)
        written = [_best_first(record) for record in scored] if rank_by_reward else scored
        convert((record.as_dict() for record in written), path, "canonical", overwrite=overwrite, notes=Notes())
    except OSError as error:
        raise ScoringError(f"{path}: could not be written ({error.strerror or error}); {journal.kept()}") from error
    except KeyboardInterrupt:
        raise ScoringInterrupted(f"interrupted; {journal.kept()}") from None
    os.unlink(f"{path}.partial")
    replaced = sum(record.rewards is not None for record in records)
    return ScoreResult(scored, written, sum(map(len, run.rows_of)), resumed, run.truncated, replaced, run.max_length)


def score_records(
    records: Sequence[RankedRecord],
    reward_model: RewardModel,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = True,
) -> list[RankedRecord]:
    """The records with the rewards of `reward_model`, nothing written; arguments and errors as `score_file`."""
    run = _Run(list(records), reward_model, batch_size, max_length, progress)
    journal = run.journal(None)
    try:
        run.score(journal, progress)
    except KeyboardInterrupt:
        raise ScoringInterrupted("interrupted while scoring; nothing of it is kept") from None
    return run.with_rewards(journal.values)


def _as_records(
    source: Source | Sequence[RankedRecord], format: str, columns: Mapping[str, Any] | None
) -> list[RankedRecord]:
    if not isinstance(source, (str, os.PathLike)):
        rows = list(cast("Iterable[Any]", source))
        if rows and all(isinstance(row, RankedRecord) for row in rows):
            return rows
        source = rows
    return read_records(source, format, columns=columns)


def _best_first(record: RankedRecord) -> RankedRecord:
    ranked = make_record(
        record.prompt,
        record.completions,
        rewards=record.rewards,
        sft_index=record.sft_index or None,
        rank_by_reward=True,
        source=record.source,
        subset=record.subset,
    )
    return dataclasses.replace(ranked, template=record.template)


class _Run:
    """The token rows of all responses, cut into batches of like length."""

    def __init__(
        self,
        records: list[RankedRecord],
        reward_model: RewardModel,
        batch_size: int,
        max_length: int | None,
        progress: bool,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
        limit = reward_model.max_positions
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length: expected at most the reward model's {limit} positions, got {max_length}")
        self.records = records
        self.reward_model = reward_model
        self.batch_size = batch_size
        self.max_length = reward_model.default_max_length if max_length is None else max_length
        self.rows: list[list[int]] = []
        self.places: list[tuple[str, int]] = []  # the record and response that a row is from
        self.rows_of: list[list[int]] = []  # positions of the rows of each record
        self.truncated = 0
        self._tokenise(progress and len(records) > _LARGE)
        order = sorted(range(len(self.rows)), key=lambda index: -len(self.rows[index]))
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def _tokenise(self, progress: bool) -> None:
        collator = reward_collator(self.reward_model.tokenizer, self.max_length)
        for record in logging.tqdm(self.records, desc="Tokenising", unit=" prompts", disable=not progress):
            feature, prompt_cut, cut = collator.tokenize_counted(record)
            self.truncated += bool(prompt_cut or cut)
            found: dict[tuple[int, ...], int] = {}
            rows = [tuple(row) for row in token_rows(feature)]
            for number, row in enumerate(rows):
                # The same response twice is scored once: apart, padding could part their rewards by a last bit.
                if row not in found:
                    found[row] = len(self.rows)
                    self.rows.append(list(row))
                    self.places.append((record.source, number))
            self.rows_of.append([found[row] for row in rows])

    def identity(self) -> RunIdentity:
        """What decides the numbers, down to the last bit."""
        model = self.reward_model.model
        source, tokens = hashlib.sha256(), hashlib.sha256()
        for record in self.records:
            source.update(json.dumps(record.as_dict(), sort_keys=True).encode() + b"\n")
        for row in self.rows:
            tokens.update(f"{row}\n".encode())
        settings = {
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "label": self.reward_model.label or 0,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        data = {
            "source": source.hexdigest(),
            "tokenizer or template": tokens.hexdigest(),
            "reward_model": self.reward_model.fingerprint(),
        }
        return RunIdentity(settings, data)

    def journal(self, path: str | None, resume: bool = False) -> Journal:
        words = {"key": "rewards", "items": "responses", "done": "scored"}
        return Journal(path, self.identity(), self.batches, resume, valid=_is_score, **words)

    def score(self, journal: Journal, progress: bool) -> None:
        """Score the batches that the journal lacks."""
        if len(journal.finished) < len(self.batches):
            self._check_padding(journal)
        bar = logging.tqdm(
            total=len(self.rows),
            initial=len(journal.values),
            desc="Scoring",
            unit=" responses",
            disable=not progress,
        )
        with bar:
            for number, batch in enumerate(self.batches):
                if number in journal.finished:
                    continue
                scores = self._forward([self.rows[index] for index in batch], journal)
                self._check_finite(batch, scores, journal)
                # Nine digits are enough to read the same float32 again.
                journal.add(number, [float(f"{score:.9g}") for score in scores.tolist()])
                bar.update(len(batch))

    def _forward(self, rows: Sequence[Sequence[int]], journal: Journal) -> Tensor:
        try:
            return self.reward_model.score_tokens(rows)
        except torch.OutOfMemoryError as error:
            size = f"{len(rows)} responses of up to {len(rows[0]):,} tokens"
            raise ScoringError(f"batch_size: {size} do not fit in memory; {journal.kept()}") from error

    def _check_padding(self, journal: Journal) -> None:
        """Some models read padding as text whatever the mask says; their scores must not be written."""
        ragged = next((batch for batch in self.batches if len(self.rows[batch[-1]]) < len(self.rows[batch[0]])), None)
        if ragged is None:
            return
        model, score = self.reward_model.model, lambda rows: self._forward(rows, journal)
        shown = read_as_text(score, model.dtype, self.rows[ragged[0]], self.rows[ragged[-1]])
        if shown:
            raise ScoringError(
                f"batch_size: expected 1 for {type(model).__name__}, which reads padding as text ({shown}), got "
                f"{self.batch_size}"
            )

    def _check_finite(self, batch: Sequence[int], scores: Tensor, journal: Journal) -> None:
        for index, score in zip(batch, scores.tolist(), strict=True):
            if not math.isfinite(score):
                source, number = self.places[index]
                raise ScoringError(
                    f"{source}: completions[{number}]: expected a finite score, got {score}; {journal.kept()}"
                )

    def with_rewards(self, rewards: dict[int, float]) -> list[RankedRecord]:
        """The records, with rewards by position of the row."""
        out = []
        for record, indices in zip(self.records, self.rows_of, strict=True):
            values = tuple(rewards[index] for index in indices)
            out.append(dataclasses.replace(record, rewards=values))
        return out


def _is_score(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
