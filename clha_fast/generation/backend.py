"""What writes answers: settings, prompts as tokens, and the contract of a backend."""

from __future__ import annotations

import functools
import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from clha_fast.data.columns import template_of
from clha_fast.options import as_python, count, is_number

logger = logging.getLogger("clha_fast")
# Special tokens that a tokenizer has for its own ends: of any other somebody may expect to find it in a text.
_OWN = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are made; the same prompt, model and settings give the same answer, in whatever company.

    Attributes:
        max_new_tokens: of an answer. max_prompt_length: tokens of a prompt, which is cut on the left behind its BOS;
            None is what the model's positions leave.
        temperature: 0 is greedy. top_p: nucleus of the softmax to draw from, 1 is all of it. seed: of the draws,
            together with the prompt.
        answer_prefix: what every answer begins with; not part of the answer that comes back.
        stop: texts that end an answer; None takes those of the prompt's own form (`generation.prompts`).
        lead: what a prompt of messages ends with, behind the generation prompt of the chat template: what the model
            was trained behind (`generation.prompts.trained_lead`), "" for nothing, as a server asks. None is as
            training on the record has it where it has responses, else nothing.
        chat_template_kwargs: variables of the chat template for all prompts; a record's own win.

    Raises:
        ValueError: a value out of range, by name.
    """

    max_new_tokens: int = 128
    max_prompt_length: int | None = 384
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    answer_prefix: str = ""
    stop: tuple[str, ...] | None = None
    lead: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, count(name, value, "a positive whole number"))
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature: expected a finite number of at least 0, got {self.temperature!r}")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        if self.top_p != 1 and not self.temperature:
            raise ValueError(f"top_p: expected 1 with temperature 0, which draws nothing, got {self.top_p!r}")
        if not isinstance(self.seed, numbers.Integral) or isinstance(self.seed, bool):
            raise ValueError(f"seed: expected a whole number, got {self.seed!r}")
        for name in ("temperature", "top_p", "seed"):
            object.__setattr__(self, name, as_python(getattr(self, name)))
        if not (self.lead is None or isinstance(self.lead, str)):
            raise ValueError(f"lead: expected a text or None, got {self.lead!r}")
        given = {"chat_template_kwargs": self.chat_template_kwargs}
        object.__setattr__(self, "chat_template_kwargs", template_of(given, "settings"))
        if self.stop is None:
            return
        # A text by itself would be a stop for each of its letters.
        texts = isinstance(self.stop, (list, tuple)) and all(isinstance(text, str) and text for text in self.stop)
        if not texts:
            raise ValueError(f"stop: expected a list of texts that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))  # of a file they come as a list


class EncodedPrompt(NamedTuple):
    """ids: what the model reads, the answer's prefix at its end. stops, ends: texts and tokens that end the answer.

    seed: of the draws for this prompt.
    """

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    ends: tuple[int, ...]
    seed: int


class Generated(NamedTuple):
    """text: without prefix, stop text and outer blanks. finish: "stop", or "length" where nothing ended it."""

    text: str
    finish: str


class GenerationBackend(Protocol):
    """What answers encoded prompts. `max_positions`: tokens of prompt and answer together, None without a limit."""

    tokenizer: Any

    @property
    def max_positions(self) -> int | None: ...

    def describe(self) -> dict[str, str]:
        """What else than weights and `GenerationSettings` decides an answer, such as the dtype."""

    def fingerprint(self) -> str:
        """The same text for the same weights."""

    def answer(self, prompts: Sequence[EncodedPrompt], settings: GenerationSettings) -> list[Generated]:
        """One answer a prompt, at most `settings.max_new_tokens` tokens each, in order.

        Raises:
            torch.OutOfMemoryError: fewer prompts may fit. ValueError: these prompts cannot share a batch.
        """


def cut_answer(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first of the stop texts, without outer blanks; whether there was one)."""
    found = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(found, default=len(text))].strip(), bool(found)


def answer_text(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer's tokens, without special ones."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def read_answer(ids: Sequence[int], tokenizer: Any, ends: Sequence[int], stops: Sequence[str]) -> Generated:
    """The answer that new tokens are; `ends` and `stops` as `EncodedPrompt`.

    Special tokens are no part of its text. That one stood inside an answer is said once, but for those of `_OWN`.
    """
    ended = bool(ids) and ids[-1] in ends
    own = list(ids[:-1] if ended else ids)
    text = answer_text(own, tokenizer)
    if text != tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        used = {*own} - {getattr(tokenizer, f"{name}_token_id") for name in _OWN}
        added = tokenizer.added_tokens_decoder  # made anew every time it is asked for
        for number in sorted(used & added.keys()):
            if added[number].special:
                _say_left_out(added[number].content)
    text, stop = cut_answer(text, stops)
    return Generated(text, "stop" if ended or stop else "length")


@functools.cache
def _say_left_out(token: str) -> None:
    logger.warning(
        f"answers: the model writes {token!r}, a special token, which is no part of an answer's text: no reward and no "
        "figure sees it; a token that they should see must not be special in the tokenizer"
    )
