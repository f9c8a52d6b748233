"""What a reward model reads and what it answers: one road for scoring and for training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from clha_fast.batching.batch import CandidateFeature
from clha_fast.batching.collator import RankedCollator
from clha_fast.data.prompts import Prompted, answered
from clha_fast.data.records import RankedRecord
from clha_fast.data.rendering import read_variables
from clha_fast.models.rounding import rounding_of

# How far a response's reward, a sum that may cancel, may move when a longer one is batched with it, relative to the
# larger of the two: 0.05 in bfloat16.
_DRIFT, _EPS = 1e-3, 6.4
_Row = TypeVar("_Row")
# Stands for an empty answer, which no record may have, until the record is made.
_SOME = "."


def reward_collator(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> RankedCollator:
    """What tokenises a record for a reward model, as for the training of a language model; `token_rows` are its rows.

    Args:
        max_length: tokens of prompt and response together; None is no limit.
    """
    return RankedCollator(tokenizer, max_length=max_length)


class JudgeCollator(RankedCollator):
    """`reward_collator` for a reward model that judges what was written for another model.

    Variables that only the other model's chat template reads are left out, as `data.rendering.read_variables` says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        super().__init__(tokenizer, max_length=max_length)

    def tokenize_counted(self, record: RankedRecord) -> tuple[CandidateFeature, int, int]:
        """As `RankedCollator`."""
        if record.template:
            read = read_variables(record.template, self.tokenizer, record.source)
            record = dataclasses.replace(record, template=read)
        return super().tokenize_counted(record)


class AnswerCollator(JudgeCollator):
    """`JudgeCollator` for answers that were sampled: no error of data, whatever they say (`batching.chat.render_chat`).

    One without tokens is a response that ends at once.

    Args:
        blank: as `data.prompts.answered`; None, where the reward model does not say what it was trained on, is a blank,
            which keeps the words of prompt and answer apart.
    """

    _sampled = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, blank: bool | None = None) -> None:
        super().__init__(tokenizer, max_length)
        self._blank = blank is not False

    def answered(self, record: Prompted, answers: Sequence[str]) -> RankedRecord:
        """As `data.prompts.answered`; an empty answer is allowed, and is empty but for what closes it.

        Where the record's own responses were rendered beforehand and all end in one end of turn ("<|im_end|>"), answers
        do: generation leaves it out, and a reward is read there.
        """
        closing = self._closing_of(record)
        given = answered(record, [answer or _SOME for answer in answers], self._blank)
        own = tuple(
            (whole if answer else "") + ("" if answer.rstrip().endswith(closing) else closing)
            for whole, answer in zip(given.completions, answers, strict=True)
        )
        object.__setattr__(given, "completions", own)  # which no other record may have empty
        return given

    def _closing_of(self, record: Prompted) -> str:
        if not isinstance(record, RankedRecord) or not isinstance(record.prompt, str):
            return ""
        closings = {
            self._endings.closed(text)[len(self._endings.opened(text)) :].strip() for text in record.completions
        }
        return closings.pop() if len(closings) == 1 else ""

    def reads(self, text: str) -> bool:
        """Whether the reward model's tokenizer has a token for anything in the text."""
        return bool(self._encoder.encode([self._endings.opened(text).strip()])[0])


def token_rows(feature: CandidateFeature) -> list[list[int]]:
    """A row of tokens for each response, best rank first: the prompt, the response and what closes it."""
    return [[*feature["prompt_ids"], *ids] for ids in feature["completion_ids"]]


def pad_rows(rows: Sequence[Sequence[int]], pad: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64 [len(rows), T] each, padded on the right to a multiple of `multiple`."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return input_ids, mask


def padded_rewards(
    model: nn.Module, config: Any, input_ids: Tensor, attention_mask: Tensor, pad: int, label: int = 0
) -> Tensor:
    """The rewards of padded rows, with a graph where gradients are on.

    Classifiers on decoders find a row's last token by comparing with the configuration's padding token, which is
    therefore `pad` while the model runs.

    Args:
        model: a sequence classifier, or a wrapper around it. config: the classifier's own.
        input_ids, attention_mask: int64 [rows, T] on the model's device. label: which logit is the reward.

    Returns:
        float32 [rows] (float64 of a float64 model), on the model's device.
    """
    with configured(config, pad_token_id=pad, use_cache=False):
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    rewards = logits[:, label]
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def drift_of(model: Any) -> float:
    """How far the reward of a text may be from its own in another batch, relative to the larger."""
    return max(_DRIFT, _EPS * rounding_of(model))


def read_as_text(score: Callable[[list[_Row]], Tensor], model: Any, longer: _Row, shorter: _Row) -> str:
    """What shows that a model reads padding as text, whatever the mask says; "" where nothing does.

    Args:
        score: the rewards of rows that are batched, by `model`.
    """
    together = score([longer, shorter])
    alone = score([shorter])[0]
    drift = float((together[1] - alone).abs() / together.abs().max().clamp_min(1e-30))
    if drift > drift_of(model):  # never of NaN, which has its own error
        return f"it scores a response {float(alone):.5g} alone and {float(together[1]):.5g} beside a longer one"
    return ""


@contextlib.contextmanager
def configured(config: Any, **changes: Any) -> Iterator[None]:
    """A model's configuration with some fields changed, in its text part too; as it was afterwards."""
    missing = object()
    places = [config] if config.get_text_config() is config else [config, config.get_text_config()]
    before = [(place, {name: getattr(place, name, missing) for name in changes}) for place in places]
    try:
        for place in places:
            for name, value in changes.items():
                setattr(place, name, value)
        yield
    finally:
        for place, values in before:
            for name, value in values.items():
                if value is missing:
                    delattr(place, name)
                else:
                    setattr(place, name, value)
