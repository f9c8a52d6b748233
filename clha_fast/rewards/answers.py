"""Rewards of answers that have just been sampled, the empty ones too."""

from __future__ import annotations

from collections.abc import Sequence

from clha_fast.data.prompts import Prompted
from clha_fast.data.records import RecordError, shorten
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.rows import AnswerCollator, read_as_text, token_rows


class AnswerRewards:
    """A reward model as a function of prompts and answers.

    Each answer is read as `score_file` reads the response that it is in a record (`AnswerCollator.answered`); behind a
    prompt alone, in the form of the responses that the reward model was trained on (`RewardModel.blank`). What the
    policy says is no error of data: an answer that the reward model's chat template refuses, or does not write as it
    is, stands as it is where the template writes any other.

    Args:
        batch_size: answers in a forward pass.
        max_length: as `score_file`.

    Attributes:
        metrics: of the last call, shares of its answers: `judge_cut_share`, of which something was cut to
            `max_length`; `judge_empty_share`, in which the reward model's tokenizer found no token.
    """

    def __init__(self, reward_model: RewardModel, batch_size: int = 16, max_length: int | None = None) -> None:
        self.reward_model, self.batch_size = reward_model, batch_size
        self.max_length = reward_model.default_max_length if max_length is None else max_length
        self.metrics: dict[str, float] = {}
        self._collator = AnswerCollator(reward_model.tokenizer, self.max_length, reward_model.blank)
        self._checked = False

    def __call__(self, records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """A raw reward for each answer to each record's prompt; one without tokens is a response that ends at once.

        Raises:
            ValueError: a reward that is not finite; a model that reads padding as text.
            RecordError: a prompt that the reward model's chat template refuses, or that `max_length` leaves no token.
        """
        rows: list[list[int]] = []
        cut = empty = 0
        for record, texts in zip(records, answers, strict=True):
            read = [bool(text.strip()) and self._collator.reads(text) for text in texts]
            empty += read.count(False)
            own, own_cut = self._rows(record, [text if some else "" for text, some in zip(texts, read, strict=True)])
            rows += own
            cut += own_cut
        self.metrics = {"judge_cut_share": cut / len(rows), "judge_empty_share": empty / len(rows)} if rows else {}
        rewards = self._score(rows)
        wrong = [number for number, reward in enumerate(rewards) if not abs(reward) < float("inf")]
        if wrong:
            raise ValueError(f"reward_model: expected finite rewards, got {rewards[wrong[0]]} for an answer")
        found = iter(rewards)
        return [[next(found) for _ in texts] for texts in answers]

    def read(self, record: Prompted) -> None:
        """Look at a prompt before there are answers to it.

        Raises:
            RecordError: as a call.
        """
        self._rows(record, [""])

    def _rows(self, record: Prompted, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """(the tokens of each answer behind the prompt, how many of them were cut)."""
        try:
            feature, prompt_cut, cut = self._collator.tokenize_counted(self._collator.answered(record, texts))
        except RecordError as error:
            said = f"reward_model: it cannot read the answers {shorten(list(texts))} to this prompt ({error})"
            raise RecordError(said, source=error.source, field=error.field, has_way=error.has_way) from error
        return token_rows(feature), len(texts) if prompt_cut else cut

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The same row is scored once: apart, padding could part its rewards by a last bit, and advantages by more."""
        whole = list(map(tuple, rows))
        order = sorted(dict.fromkeys(whole), key=lambda row: -len(row))
        if not order:
            return []
        self._check_padding(order[0], order[-1])
        rewards: dict[tuple[int, ...], float] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rewards.update(zip(batch, self.reward_model.score_tokens(batch).tolist(), strict=True))
        return [rewards[row] for row in whole]

    def _check_padding(self, longer: Sequence[int], shorter: Sequence[int]) -> None:
        if self._checked or len(longer) == len(shorter):
            return
        model = self.reward_model.model
        shown = read_as_text(self.reward_model.score_tokens, model, longer, shorter)
        if shown:
            raise ValueError(
                f"reward_model: expected one that leaves padding out, got {type(model).__name__}, which reads it as "
                f"text ({shown})"
            )
        self._checked = True
