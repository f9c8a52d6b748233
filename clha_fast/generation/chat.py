"""A conversation with a model: history, answers as they are written, and what an interrupted one leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from clha_fast.data.prompts import PromptRecord
from clha_fast.data.records import Message
from clha_fast.generation.backend import EncodedPrompt, GenerationSettings, cut_answer
from clha_fast.generation.hf import TransformersBackend
from clha_fast.generation.prompts import encode_prompts


class Reply(NamedTuple):
    """What came of a line.

    Attributes:
        text: without outer blanks. finish: "stop", "length" or "interrupted".
        dropped: oldest turns left out so far. cut: tokens that the prompt is cut to on its left, 0 where it is whole.
    """

    text: str
    finish: str
    dropped: int
    cut: int


class Chat:
    """A conversation; messages go through the chat template, or are a plain transcript where the tokenizer has none.

    Args:
        settings: `max_prompt_length` None is what the model's positions leave. A conversation that is longer loses its
            oldest turns, never the system message or the last line.
        system: the first message, "" for none. history: False makes every line a text prompt of its own, as it stands.

    Attributes:
        messages: of both sides, without the system message. said: as `EncodedPrompts.said`, of the last line.

    Raises:
        ValueError: a system message, or variables of the chat template, without history.
    """

    def __init__(
        self, backend: TransformersBackend, settings: GenerationSettings, system: str = "", history: bool = True
    ) -> None:
        if system and not history:
            raise ValueError(f"system: expected none where every line is a prompt of its own, got {system!r}")
        if settings.chat_template_kwargs and not history:
            given = settings.chat_template_kwargs
            raise ValueError(f"chat_template_kwargs: expected none where every line is a prompt, got {given!r}")
        self.backend, self.settings, self.history = backend, settings, history
        self.messages: list[Message] = []
        self.said = ""
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._dropped = 0

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages, self._dropped = [], 0

    def say(self, line: str, said: Callable[[str], None] = lambda piece: None) -> Reply:
        """The answer to a line; KeyboardInterrupt ends it, and what was written until then stays in the conversation.

        Args:
            said: called with pieces of the answer as they are written; joined they are the reply's text.

        Raises:
            RecordError: the chat template refuses the messages.
        """
        turn: Message = {"role": "user", "content": line}
        prompt, settings, cut = self._encode(line, turn)
        written = _Written(prompt.stops, said)
        try:
            (found,) = self.backend.answer([prompt], settings, lambda row, text: written.so_far(text))
            written.end(found.text)
            reply = Reply(found.text, found.finish, self._dropped, cut)
        except KeyboardInterrupt:
            reply = Reply(written.text, "interrupted", self._dropped, cut)
        # An empty turn is one that many templates refuse.
        if self.history and reply.text:
            self.messages += [turn, {"role": "assistant", "content": reply.text}]
        return reply

    def _encode(self, line: str, turn: Message) -> tuple[EncodedPrompt, GenerationSettings, int]:
        while True:
            whole = (*self._system, *self.messages, turn) if self.history else line
            record = PromptRecord(whole, "chat")
            found = encode_prompts([record], self.backend.tokenizer, self.settings, self.backend.max_positions)
            if not found.cut or not self.messages:
                (prompt,), self.said = found.prompts, found.said
                return prompt, found.settings, len(prompt.ids) if found.cut else 0
            self.messages = self.messages[2:]
            self._dropped += 1


class _Written:
    """What of an answer can be shown as it is written: no half a letter, nothing that may become a stop text."""

    def __init__(self, stops: Sequence[str], said: Callable[[str], None]) -> None:
        self.stops, self.said, self.text = stops, said, ""

    def so_far(self, whole: str) -> None:
        text, _ = cut_answer(whole, self.stops)
        text = text.rstrip("\ufffd")
        held = max(
            (k for stop in self.stops for k in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:k])),
            default=0,
        )
        self.end(text[: len(text) - held].rstrip())

    def end(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            self.said(text[len(self.text) :])
            self.text = text
