"""Rewards of answers that have just been sampled, the empty ones too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clha_fast.data.prompts import Prompted, answered
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.rows import read_as_text, reward_collator, token_rows

# Stands for an empty answer until its tokens are taken off.
_SOME = "."


class AnswerRewards:
    """A reward model as a function of prompts and answers.

    Each answer is read as `score_file` reads the response that it is in a record (`data.prompts.answered`).

    Args:
        batch_size: answers in a forward pass.
        max_length: as `score_file`.
    """

    def __init__(self, reward_model: RewardModel, batch_size: int = 16, max_length: int | None = None) -> None:
        self.reward_model, self.batch_size = reward_model, batch_size
        length = reward_model.default_max_length if max_length is None else max_length
        self._collator = reward_collator(reward_model.tokenizer, length)
        self._checked = False

    def __call__(self, records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """A raw reward for each answer to each record's prompt; an empty one is a response that ends at once.

        Raises:
            ValueError: a reward that is not finite; a model that reads padding as text.
            RecordError: as `RankedCollator.tokenize_record`.
        """
        rows: list[list[int]] = []
        for record, texts in zip(records, answers, strict=True):
            feature = self._collator.tokenize_record(answered(record, [text or _SOME for text in texts]))
            end = self.reward_model.tokenizer.eos_token_id
            for text, row in zip(texts, token_rows(feature), strict=True):
                rows.append(row if text else [*feature["prompt_ids"], end])
        rewards = self._score(rows)
        wrong = [number for number, reward in enumerate(rewards) if not abs(reward) < float("inf")]
        if wrong:
            raise ValueError(f"reward_model: expected finite rewards, got {rewards[wrong[0]]} for an answer")
        found = iter(rewards)
        return [[next(found) for _ in texts] for texts in answers]

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        self._check_padding(rows[order[0]], rows[order[-1]])
        rewards = torch.zeros(len(rows))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rewards[batch] = self.reward_model.score_tokens([rows[number] for number in batch])
        return rewards.tolist()

    def _check_padding(self, longer: Sequence[int], shorter: Sequence[int]) -> None:
        if self._checked or len(longer) == len(shorter):
            return
        model = self.reward_model.model
        shown = read_as_text(self.reward_model.score_tokens, model.dtype, longer, shorter)
        if shown:
            raise ValueError(
                f"reward_model: expected one that leaves padding out, got {type(model).__name__}, which reads it as "
                f"text ({shown})"
            )
        self._checked = True
