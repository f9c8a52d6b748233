"""Answers put in order: by the length-normalised log-probability that a language model gives them, or by rewards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clha_fast.data.readers import Source
from clha_fast.data.records import RankedRecord, agreeing, as_compared
from clha_fast.files import check_destination
from clha_fast.processes import ALONE, Processes
from clha_fast.rewards.policy import Policy, PolicyRun
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.run import Row, ScoringInterrupted, as_records
from clha_fast.rewards.scoring import RewardRun


class Ranking(NamedTuple):
    """The order of a prompt's answers.

    Attributes:
        order: positions of the answers, best first; equal scores (rewards: in float32) stay in the order given.
        scores: of each answer, in the order given: s_i = S_i / |y_i|, nats a token (a reward model's: its rewards).
    """

    order: list[int]
    scores: list[float]


@dataclass(frozen=True)
class RankResult:
    """What a run of ranking gave.

    Attributes:
        records: the source's records, in its order. rankings: one a record.
        candidates: answers in all. resumed: answers (the same ones of a record count once) that an earlier run had
            scored. truncated: records of which something was cut. rewarded: whether the scores are rewards.
    """

    records: list[RankedRecord]
    rankings: list[Ranking]
    candidates: int
    resumed: int
    truncated: int
    rewarded: bool = False

    def agreement(self, by_reward: bool = False) -> tuple[float, int]:
        """(pairs that the scores order as the file does, pairs that the file orders); equal scores are half right.

        Rewards, the file's and a reward model's, are compared in float32, as everywhere.

        Args:
            by_reward: as the file's rewards do instead.
        """
        same, pairs = 0.0, 0
        for record, ranking in zip(self.records, self.rankings, strict=True):
            given = [-float(k) for k in range(len(record.completions))]
            if by_reward:
                given = as_compared(record.rewards or [0.0] * len(given))
            scores = as_compared(ranking.scores) if self.rewarded else ranking.scores
            right, ordered = agreeing(given, scores)
            same, pairs = same + right, pairs + ordered
        return same, pairs


def rank_file(
    source: Source | Sequence[RankedRecord],
    destination: str | os.PathLike[str],
    judge: Policy | RewardModel,
    *,
    format: str = "auto",
    columns: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    answer_prefix: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    processes: Processes = ALONE,
) -> RankResult:
    """Write every record of `source` to `destination` with its answers best first, as JSON Lines.

    A line is the canonical record in its new order, with the scores in that order (`mean_logps` of a language model,
    `rewards` of a reward model), and `order`: the positions that the answers had in `source`. Whatever else the record
    has of each answer (rewards, signals) moves with it. An answer is scored on the tokens that training gives it.
    Interruption, resuming and batches are those of `scoring.score_file`.

    Args:
        source: records, or as `clha_fast.data.iter_records`, with `format` and `columns`.
        judge: a language model scores by s_i = S_i / |y_i|, nats a token (Eq. 3); a reward model by its reward. In rows
            of its `layout`: in shared ones the answers to a prompt share it.
        batch_size: answers in a forward pass.
        max_length, max_prompt_length, max_completion_length: tokens, cut as in training; None is no limit, and for
            max_length with a reward model that model's. A reward model has the first alone.
        answer_prefix: what a language model's answers begin with (Chain of Hindsight's good marker,
            `generation.trained_prefix`); read, not scored. A reward model has none.
        resume, overwrite, progress, processes: as `scoring.score_file`.

    Raises:
        RecordError, ValueError, OSError, ScoringError, ScoringInterrupted: as `score_file` and `score_policy`.
    """
    check_destination(destination, resume=resume, overwrite=overwrite)
    records = as_records(source, format, columns)
    limits = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
    }
    run = _run(records, judge, batch_size, limits, progress and not processes.rank, answer_prefix)
    rankings: list[Ranking] = []

    def finish(scores: dict[int, float]) -> list[dict[str, Any]]:
        rankings.extend(_rankings(run, scores))
        # Not `scores`: readers refuse such a column without rewards, lest it be taken for them.
        key = "mean_logps" if isinstance(judge, Policy) else "rewards"
        return [_line(record, ranking, key) for record, ranking in zip(records, rankings, strict=True)]

    options = {"resume": resume, "overwrite": overwrite, "progress": progress}
    resumed = run.write(os.fspath(destination), finish, processes=processes, **options)
    rewarded = isinstance(run, RewardRun)
    return RankResult(records, rankings, sum(map(len, run.rows_of)), resumed, run.truncated, rewarded)


def rank(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    layout: str = "padded",
    answer_prefix: str = "",
) -> Ranking:
    """The order in which a causal language model puts the answers to a prompt, without forming the logits.

    Replaces, an answer at a time::

        logps = model(prompt + answer).logits.log_softmax(-1)      # [T, V]
        score = logps[answer's tokens].mean()                      # s_i = S_i / |y_i|, Eq. 3

    Args:
        model: on its device, an adapter or not, attached or not; its modules' modes (training or not) stay.
        prompt: a text, or messages `{"role", "content"}`, which go through the tokenizer's chat template.
        answers: n >= 1 texts, none empty; each is closed and tokenised as in training.
        batch_size: answers in a forward pass.
        max_length: tokens of prompt and answer, cut as in training; None is no limit.
        layout: of the rows that run: `shared` computes the prompt once for all answers, `auto` where that pays, as
            `clha_fast.attach`. The model is probed for it in every call; `rewards.policy.Policy` with `rank_file` does
            it once.
        answer_prefix: what the model's answers begin with, as `rank_file`.

    Raises:
        UnsupportedLayoutError: the model does not compute such rows as it computes each answer alone.
        RecordError: no answer, an empty one, a text that is none; as `RankedCollator.tokenize_record`.
        ValueError: a bad option, more tokens than the model has positions for; as `rewards.policy.Policy`.
        ScoringError: a score is not finite, or memory does not suffice.
    """
    given: Any = prompt if isinstance(prompt, str) else list(prompt)
    record = RankedRecord(given, answers if isinstance(answers, str) else tuple(answers), source="rank")  # type: ignore[arg-type]
    modes = [(module, module.training) for module in model.modules()]
    try:
        limits = {"max_length": max_length}
        run = _run([record], Policy(model, tokenizer, layout), batch_size, limits, False, answer_prefix)
        journal = run.journal(None)
        run.score(journal, range(len(run.batches)), False)
    except KeyboardInterrupt:
        raise ScoringInterrupted("interrupted while scoring; nothing of it is kept") from None
    finally:
        for module, training in modes:
            module.training = training
    return _rankings(run, journal.values)[0]


class _PolicyRanking(PolicyRun):
    key = "scores"

    def forward(self, rows: Sequence[Row]) -> Tensor:
        return super().forward(rows) / torch.tensor([len(row.response) for row in rows])


class _RewardRanking(RewardRun):
    key = "scores"


def _run(
    records: list[RankedRecord],
    judge: Policy | RewardModel,
    batch_size: int,
    limits: Mapping[str, int | None],
    progress: bool,
    answer_prefix: str,
) -> _PolicyRanking | _RewardRanking:
    if isinstance(judge, Policy):
        return _PolicyRanking(records, judge, batch_size, dict(limits), progress, answer_prefix)
    if answer_prefix:
        raise ValueError(f"answer_prefix: expected none with a reward model, got {answer_prefix!r}")
    for name, value in limits.items():
        if name != "max_length" and value is not None:
            raise ValueError(f"{name}: expected none with a reward model, which has max_length, got {value}")
    return _RewardRanking(records, judge, batch_size, limits["max_length"], progress)


def _rankings(run: PolicyRun | RewardRun, scores: Mapping[int, float]) -> list[Ranking]:
    return [_ranking([scores[index] for index in indices], isinstance(run, RewardRun)) for indices in run.rows_of]


def _ranking(scores: list[float], rewarded: bool) -> Ranking:
    compared = as_compared(scores) if rewarded else scores
    return Ranking(
        sorted(range(len(scores)), key=compared.__getitem__, reverse=True), scores
    )  # stable, reverse included


def _line(record: RankedRecord, ranking: Ranking, key: str) -> dict[str, Any]:
    line = record.in_order(ranking.order).as_dict()
    if not record.sft_index:  # it named no answer: the target is the best one
        line.pop("sft_index", None)
    return {**line, key: [ranking.scores[k] for k in ranking.order], "order": ranking.order}
