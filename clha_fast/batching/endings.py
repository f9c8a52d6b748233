"""What stands at the end of a response that was rendered beforehand."""

from __future__ import annotations

import functools
from typing import Any

from clha_fast.batching.chat import render_chat
from clha_fast.data.records import RecordError


class Endings:
    """The special tokens that end a turn where they end a response: all but those with another meaning.

    Attributes:
        special: their numbers. texts: these, as they are written.
    """

    def __init__(self, tokenizer: Any) -> None:
        names = ("unk_token_id", "bos_token_id", "cls_token_id", "mask_token_id")
        others = {getattr(tokenizer, name, None) for name in names} - {tokenizer.eos_token_id}
        added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.tokenizer = tokenizer
        self.special = frozenset((*tokenizer.all_special_ids, *added)) - others
        self.texts: tuple[str, ...] = tuple(tokenizer.convert_ids_to_tokens(sorted(self.special)))

    def closed(self, text: str) -> str:
        """The text; rendered beforehand, without what a template writes behind its end of turn.

        Of several special tokens at the end ("<|end|>\\n<|endoftext|>") the chat template's own ends the turn, else the
        first that a blank follows. One without a blank behind it may close what stands inside the turn (a tool call),
        and so does "</...>".
        """
        found = self._found(text)
        if not found:
            return text
        own = [end for token, end in found if token == self._end_of_turn]
        tags = (token for token in found if not token[0].startswith("</") or token[0] == self.tokenizer.eos_token)
        spaced = [end for _, end in tags if text[end : end + 1].isspace()]
        return text[: min(own or spaced or [found[0][1]])]

    def opened(self, text: str) -> str:
        """The text without the special tokens that end its turn."""
        found = self._found(text)
        return text[: found[-1][1] - len(found[-1][0])] if found else text

    def _found(self, text: str) -> list[tuple[str, int]]:
        """Special tokens at the end, blanks between them or not, from the last one on, each with where it ends."""
        found: list[tuple[str, int]] = []
        rest = text.rstrip()
        while rest.endswith(self.texts):
            token = max((token for token in self.texts if rest.endswith(token)), key=len)
            found.append((token, len(rest)))
            rest = rest.removesuffix(token).rstrip()
        return found

    @functools.cached_property
    def _end_of_turn(self) -> str:
        """The special token with which the chat template closes a response, "" where there is none."""
        if not getattr(self.tokenizer, "chat_template", None):
            return ""
        try:
            chat = render_chat([{"role": "user", "content": "prompt"}], ["response"], self.tokenizer, "record")
        except RecordError:  # one for other prompts than this
            return ""
        closed = chat.responses[0].rstrip()
        return max((token for token in self.texts if closed.endswith(token)), key=len, default="")
