"""What reward models say of answers, and whether they can be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha_fast.data.prompts import prompt_hash
from clha_fast.data.records import RankedRecord, agreeing, as_compared
from clha_fast.evaluation.intervals import Estimate, estimate, ratio
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.rows import AnswerCollator
from clha_fast.rewards.scoring import say, score_records


def answer_rewards(
    records: Sequence[RankedRecord],
    answers: Sequence[str],
    reward_model: RewardModel,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    notes: list[str] | None = None,
) -> tuple[list[float], list[float | None]]:
    """(reward, raw score) of each answer to the prompt of its record.

    The reward is 100 sigmoid(raw), as it is published; an empty answer, and one in which the reward model's tokenizer
    finds no token, has the reward 0 and no raw score. An answer is read in the form of the record's own responses
    (`rewards.rows.AnswerCollator.answered`). Nothing that an answer says is an error.

    Args:
        batch_size, max_length: as `clha_fast.rewards.scoring.score_file`, whose errors these are.
        notes: gets sentences about answers that were cut, or in which nothing is read; they are logged in any case.
    """
    collator = AnswerCollator(reward_model.tokenizer, None)
    read = [bool(answer.strip()) and collator.reads(answer) for answer in answers]
    pairs = zip(records, answers, read, strict=True)
    given = [collator.answered(record, [answer]) for record, answer, own in pairs if own]
    if unread := sum(bool(answer) for answer, own in zip(answers, read, strict=True) if not own):
        say(f"{unread:,} of {len(answers):,} answers have no token that it reads, and count as empty", notes)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "sampled": True, "notes": notes}
    scored = iter(score_records(given, reward_model, progress=progress, **settings) if given else [])
    raw: list[float | None] = []
    for own in read:
        rewards = next(scored).rewards if own else None
        raw.append(None if rewards is None else rewards[0])
    return [0.0 if value is None else 100 * sigmoid(value) for value in raw], raw


def judge_of(reward_model: RewardModel) -> str:
    """What tells a reward model from others in `Evaluation.checks`: its fingerprint, and which logit is the reward."""
    label = f" {reward_model.label}" if reward_model.label else ""
    return reward_model.fingerprint() + label


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@dataclass(frozen=True)
class RewardCheck:
    """How often a reward model prefers the better-ranked response of held-out pairs.

    Attributes:
        accuracy: over all pairs i < j of the records, with its interval over prompts (records of one prompt are one
            draw); a tie counts half. Pairs whose
            own rewards are equal have no order and do not count.
        refused: why the rewards of this model are not reported, in one sentence; "" where they are.
        notes: sentences about records that were cut.
    """

    accuracy: Estimate
    refused: str
    notes: tuple[str, ...] = ()


def check_reward_model(
    name: str,
    records: Sequence[RankedRecord],
    reward_model: RewardModel,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> RewardCheck:
    """Measure a reward model on ranked records that it was not trained on.

    Args:
        name: of the reward model, for the sentence.
    """
    ranked = [record for record in records if len(record.completions) > 1]
    said: list[str] = []
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "notes": said}
    scored = score_records(ranked, reward_model, **settings) if ranked else []
    rows = [_better(old, new) for old, new in zip(ranked, scored, strict=True)]
    accuracy = estimate(ratio, np.array(rows).reshape(-1, 2), prompts=[prompt_hash(record) for record in ranked])
    if accuracy.value is None:
        why = "there is no ranked pair to measure it on; give other records to check it with"
    elif accuracy.low is None:
        why = f"its accuracy on held-out pairs has no interval ({accuracy.note})"
    elif accuracy.low <= 0.5:
        why = (
            f"its accuracy on held-out pairs is {accuracy.value:.3f}, and the interval from {accuracy.low:.3f} to "
            f"{accuracy.high:.3f} does not lie above chance"
        )
    else:
        why = ""
    refused = f"no rewards of {name} are reported: {why}" if why else ""
    return RewardCheck(accuracy, refused, tuple(f"{name}, held-out pairs: {text}" for text in said))


def _better(record: RankedRecord, scored: RankedRecord) -> tuple[float, float]:
    """(pairs in which the better-ranked response has the higher score, ties half; pairs)."""
    assert scored.rewards is not None
    values = as_compared(scored.rewards)
    given = None if record.rewards is None else as_compared(record.rewards)
    return agreeing(range(0, -len(values), -1) if given is None else given, values)
