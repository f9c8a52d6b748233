"""Rewards for ranked responses, kept in a journal so that an interrupted run loses nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor
from transformers.utils import logging

from clha_fast.batching.collator import RankedCollator
from clha_fast.data.convert import convert
from clha_fast.data.notes import Notes
from clha_fast.data.readers import Source, read_records
from clha_fast.data.records import RankedRecord, make_record
from clha_fast.files import RunIdentity
from clha_fast.rewards.reward_model import RewardModel, load_reward_model

__all__ = [
    "RewardModel",
    "ScoreResult",
    "ScoringError",
    "ScoringInterrupted",
    "check_destination",
    "load_reward_model",
    "score_file",
]

# How far a response's score may move when a longer one is batched with it, relative to the larger of the two.
_DRIFT = {torch.float32: 1e-3, torch.float64: 1e-3}
_DRIFT_HALF = 5e-2

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


def check_destination(destination: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
    """What `score_file` demands of its destination, before anything is loaded.

    Raises:
        FileExistsError: `destination` exists and `overwrite` is not set; an unfinished run is there and neither
            `resume` nor `overwrite` is set.
        OSError: `destination` is a folder, or its folder does not exist.
    """
    path = os.fspath(destination)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: expected a file, got a folder")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"{path}: expected an existing folder, got {os.path.dirname(path)}")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists already; expected a new file, or overwrite=True")
    partial = f"{path}.partial"
    if os.path.lexists(partial) and not (resume or overwrite):
        raise FileExistsError(f"{partial}: holds an unfinished run; give resume=True to continue it, or overwrite=True")


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
    journal = _Journal(f"{path}.partial", run.identity(), run.batches, resume)
    resumed = len(journal.rewards)
    try:
        with journal:
            run.score(journal, progress)
        scored = run.with_rewards(journal.rewards)
        written = [_best_first(record) for record in scored] if rank_by_reward else scored
        convert((record.as_dict() for record in written), path, "canonical", overwrite=overwrite, notes=Notes())
    except OSError as error:
        raise ScoringError(f"{path}: could not be written ({error.strerror or error}); {journal.kept()}") from error
    except KeyboardInterrupt:
        raise ScoringInterrupted(f"interrupted; {journal.kept()}") from None
    os.unlink(journal.path)
    replaced = sum(record.rewards is not None for record in records)
    return ScoreResult(scored, written, sum(map(len, run.rows_of)), resumed, run.truncated, replaced, run.max_length)


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
        whole = RankedCollator(self.reward_model.tokenizer)
        cut = RankedCollator(self.reward_model.tokenizer, max_length=self.max_length)
        for record in logging.tqdm(self.records, desc="Tokenising", unit=" prompts", disable=not progress):
            feature = whole.tokenize_record(record)
            longest = len(feature["prompt_ids"]) + max(map(len, feature["completion_ids"]))
            if self.max_length is not None and longest > self.max_length:
                feature = cut.tokenize_record(record)
                self.truncated += 1
            found: dict[tuple[int, ...], int] = {}
            for number, ids in enumerate(feature["completion_ids"]):
                # The same response twice is scored once: apart, padding could part their rewards by a last bit.
                if tuple(ids) not in found:
                    found[tuple(ids)] = len(self.rows)
                    self.rows.append([*feature["prompt_ids"], *ids])
                    self.places.append((record.source, number))
            self.rows_of.append([found[tuple(ids)] for ids in feature["completion_ids"]])

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

    def score(self, journal: _Journal, progress: bool) -> None:
        """Score the batches that the journal lacks."""
        if len(journal.done) < len(self.batches):
            self._check_padding(journal)
        bar = logging.tqdm(
            total=len(self.rows),
            initial=len(journal.rewards),
            desc="Scoring",
            unit=" responses",
            disable=not progress,
        )
        with bar:
            for number, batch in enumerate(self.batches):
                if number in journal.done:
                    continue
                scores = self._forward([self.rows[index] for index in batch], journal)
                self._check_finite(batch, scores, journal)
                # Nine digits are enough to read the same float32 again.
                journal.add(number, [float(f"{score:.9g}") for score in scores.tolist()])
                bar.update(len(batch))

    def _forward(self, rows: Sequence[Sequence[int]], journal: _Journal) -> Tensor:
        try:
            return self.reward_model.score_tokens(rows)
        except torch.OutOfMemoryError as error:
            size = f"{len(rows)} responses of up to {len(rows[0]):,} tokens"
            raise ScoringError(f"batch_size: {size} do not fit in memory; {journal.kept()}") from error

    def _check_padding(self, journal: _Journal) -> None:
        """Some models read padding as text whatever the mask says; their scores must not be written."""
        ragged = next((batch for batch in self.batches if len(self.rows[batch[-1]]) < len(self.rows[batch[0]])), None)
        if ragged is None:
            return
        longer, shorter = self.rows[ragged[0]], self.rows[ragged[-1]]
        together = self._forward([longer, shorter], journal)
        alone = self._forward([shorter], journal)[0]
        drift = float((together[1] - alone).abs() / together.abs().max().clamp_min(1e-30))
        model = self.reward_model.model
        if drift > _DRIFT.get(model.dtype, _DRIFT_HALF):  # never of NaN, which has its own error
            raise ScoringError(
                f"batch_size: expected 1 for {type(model).__name__}, which reads padding as text (it scores a response "
                f"{float(alone):.5g} alone and {float(together[1]):.5g} beside a longer one), got {self.batch_size}"
            )

    def _check_finite(self, batch: Sequence[int], scores: Tensor, journal: _Journal) -> None:
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


class _Journal:
    """One line for the run's identity, then one for each batch, added as soon as it is scored.

    Args:
        path: of the file; an existing one is read when `resume` is set, and replaced otherwise.
        batches: positions of the responses of each batch.

    Attributes:
        done: numbers of the batches that are in it. rewards: by position of the response.

    Raises:
        ValueError: the file holds another run, or a line other than the last is damaged.
    """

    def __init__(self, path: str, identity: RunIdentity, batches: Sequence[Sequence[int]], resume: bool) -> None:
        self.path = path
        self.batches = batches
        self.done: set[int] = set()
        self.rewards: dict[int, float] = {}
        self._header = identity.as_dict()
        self._good = 0
        self._file: IO[bytes] | None = None
        if resume and os.path.lexists(path):
            self._read(identity)

    def _read(self, identity: RunIdentity) -> None:
        with open(self.path, "rb") as file:
            # What follows the last newline was cut off in the middle of being written.
            lines = file.read().split(b"\n")[:-1]
        for number, line in enumerate(lines):
            entry = _loads(line)
            if number == 0 and entry is not None and "settings" in entry:
                changed = identity.differences(entry)
                if changed:
                    raise ValueError(
                        f"resume: expected the run that {self.path} holds, got another ({'; '.join(changed)}); "
                        "give the same settings and files, or overwrite=True without resume=True"
                    )
            elif number == 0 or not self._take(entry):
                if number == 0 or number < len(lines) - 1:
                    raise ValueError(
                        f"{self.path}:{number + 1}: damaged; begin again with overwrite=True, without resume=True"
                    )
                return
            self._good += len(line) + 1

    def _take(self, entry: dict[str, Any] | None) -> bool:
        """Whether `entry` is a batch of this run; its rewards are taken over then."""
        number, rewards = (entry or {}).get("batch"), (entry or {}).get("rewards")
        if not isinstance(number, int) or not 0 <= number < len(self.batches) or not isinstance(rewards, list):
            return False
        if len(rewards) != len(self.batches[number]) or not all(map(_is_score, rewards)):
            return False
        self._note(number, rewards)
        return True

    def _note(self, number: int, rewards: Sequence[float]) -> None:
        self.done.add(number)
        self.rewards.update(zip(self.batches[number], rewards, strict=True))

    def __enter__(self) -> _Journal:
        # Unbuffered: what add() has returned from is in the file, whatever happens to the process.
        self._file = open(self.path, "ab", buffering=0)
        try:
            self._file.truncate(self._good)
            if not self._good:
                self._write(self._header)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        if not self.rewards:  # nothing to keep: the next run may have other settings
            os.unlink(self.path)

    def add(self, number: int, rewards: Sequence[float]) -> None:
        """Note the rewards of a batch, in the file first."""
        self._write({"batch": number, "rewards": list(rewards)})
        self._note(number, rewards)

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        data = memoryview(json.dumps(entry).encode() + b"\n")
        while data:
            data = data[self._file.write(data) :]

    def kept(self) -> str:
        """A sentence's end that says what a later run can take over."""
        total = sum(map(len, self.batches))
        if not self.rewards:
            return f"none of {total:,} responses is scored yet"
        return f"{len(self.rewards):,} of {total:,} responses are scored and kept in {self.path}, resume=True goes on"


def _is_score(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _loads(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
