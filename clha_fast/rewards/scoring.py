"""Rewards for ranked responses, kept in a journal so that an interrupted run loses nothing."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clha_fast.data.readers import Source
from clha_fast.data.records import RankedRecord, as_compared
from clha_fast.files import check_destination
from clha_fast.processes import ALONE, Processes
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.rewards.rows import AnswerCollator, JudgeCollator
from clha_fast.rewards.run import Row, ScoringError, ScoringInterrupted, ScoringRun, as_records

logger = logging.getLogger("clha_fast.rewards")

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
    processes: Processes = ALONE,
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
        progress: show a bar, in the first process.
        processes: those that share the batches (`processes.join`). All call with the same arguments, but for the
            number of the model's device, and return the same; the first one writes the very file that one alone writes.

    Raises:
        RecordError: a bad record, as `iter_records` and `RankedCollator.tokenize_record`; nothing is scored then.
        ValueError: a bad option; what is to be resumed is another run or is damaged; processes with other arguments.
        OSError: as `check_destination`; the source cannot be read.
        ScoringError: a file cannot be written, a score is not finite, memory does not suffice, another process has
            ended, or the model gives a response another score when others are batched with it.
        ScoringInterrupted: Ctrl-C. In both cases the message says what is kept.
    """
    check_destination(destination, resume=resume, overwrite=overwrite)
    records = as_records(source, format, columns)
    run = RewardRun(records, reward_model, batch_size, max_length, progress and not processes.rank)
    scored: list[RankedRecord] = []
    written: list[RankedRecord] = []

    def finish(rewards: dict[int, float]) -> list[dict[str, Any]]:
        scored.extend(run.with_rewards(rewards))
        written.extend([_best_first(record) for record in scored] if rank_by_reward else scored)
        return [record.as_dict() for record in written]

    options = {"resume": resume, "overwrite": overwrite, "progress": progress}
    resumed = run.write(os.fspath(destination), finish, processes=processes, **options)
    replaced = sum(record.rewards is not None for record in records)
    return ScoreResult(scored, written, sum(map(len, run.rows_of)), resumed, run.truncated, replaced, run.max_length)


def score_records(
    records: Sequence[RankedRecord],
    reward_model: RewardModel,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = True,
    sampled: bool = False,
    notes: list[str] | None = None,
) -> list[RankedRecord]:
    """The records with the rewards of `reward_model`, nothing written; arguments and errors as `score_file`.

    That some were cut is said, to `notes` too where these are given. `sampled`: the responses are a model's answers
    (`rewards.rows.AnswerCollator`).
    """
    run = RewardRun(list(records), reward_model, batch_size, max_length, progress, sampled)
    if run.truncated:
        say(
            f"{run.truncated:,} of {len(run.records):,} prompts with what is scored behind them are cut to its "
            f"{run.max_length:,} tokens; their rewards are of what is left",
            notes,
        )
    journal = run.journal(None)
    try:
        run.score(journal, range(len(run.batches)), progress)
    except KeyboardInterrupt:
        raise ScoringInterrupted("interrupted while scoring; nothing of it is kept") from None
    return run.with_rewards(journal.values)


def say(text: str, notes: list[str] | None) -> None:
    """A warning about what a reward model reads, which goes to `notes` as well."""
    logger.warning(f"reward_model: {text}")
    if notes is not None:
        notes.append(text)


def _best_first(record: RankedRecord) -> RankedRecord:
    rewards = as_compared(record.rewards or ())
    order = sorted(range(len(rewards)), key=lambda k: -rewards[k])  # stable: equal ones in the order given
    ordered = record.in_order(order)
    return ordered if record.sft_index else dataclasses.replace(ordered, sft_index=0)


class RewardRun(ScoringRun):
    """`ScoringRun` by a reward model."""

    key = "rewards"
    scorer = "reward_model"

    def __init__(
        self,
        records: list[RankedRecord],
        reward_model: RewardModel,
        batch_size: int,
        max_length: int | None,
        progress: bool,
        sampled: bool = False,
    ) -> None:
        limit = reward_model.max_positions
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length: expected at most the reward model's {limit} positions, got {max_length}")
        self.reward_model = reward_model
        self.max_length = reward_model.default_max_length if max_length is None else max_length
        collator = (AnswerCollator if sampled else JudgeCollator)(reward_model.tokenizer, self.max_length)
        super().__init__(records, reward_model.model, collator, batch_size, progress, reward_model.layout)

    def settings(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "label": self.reward_model.label or 0}

    def fingerprint(self) -> str:
        return self.reward_model.fingerprint()

    def forward(self, rows: Sequence[Row]) -> Tensor:
        return self.reward_model.score_rows(rows)

    def with_rewards(self, rewards: dict[int, float]) -> list[RankedRecord]:
        """The records, with rewards by position of the row."""
        out = []
        for record, indices in zip(self.records, self.rows_of, strict=True):
            values = tuple(rewards[index] for index in indices)
            out.append(dataclasses.replace(record, rewards=values))
        return out
