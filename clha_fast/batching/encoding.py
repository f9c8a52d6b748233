"""Texts as token ids, and how the tokens of a text that continues another differ from those that it has alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from clha_fast.data.records import RecordError

# Texts that a response is tokenised behind where a tokenizer treats the start of a text differently.
_ANCHORS = ("\n", ".", "0", "a")


class Encoder:
    """A tokenizer without truncation, and without special tokens of its own."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts, each as it stands."""
        return list(self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def prefix(self, text: str, own: list[int]) -> list[int]:
        """What the tokenizer puts in front of `text`; what it puts behind (EOS, SEP) would end the prompt."""
        full = list(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if not own:
            return full[:1] if full[:1] == [self.tokenizer.bos_token_id] else []
        starts = (k for k in range(len(full) - len(own) + 1) if full[k : k + len(own)] == own)
        return full[: next(starts, 0)]

    def mark_before(self, text: str, ids: Sequence[int]) -> str:
        """The special token that ends a text of these ids, where what follows depends on it; "" where there is none."""
        token = self._added.get(ids[-1]) if ids else None
        if token is None or not (self._adds_blank or token.rstrip):
            return ""
        # Bytes of SentencePiece are such tokens in some tokenizers; a mark with `rstrip` eats blanks behind it.
        return token.content if not text or text.rstrip().endswith(token.content) else ""

    def continuing(self, texts: Sequence[str], source: str, before: str) -> list[list[int]]:
        """Tokens of texts that continue another, without the blank that some tokenizers put in front of every text.

        Some of these put one behind every special token, too, and some special tokens eat blanks: both as it is behind
        `before`, which is one or "".
        """
        if not self._adds_blank and not before:
            return self.encode(list(texts))
        found = []
        for number, text in enumerate(texts):
            for anchor in ([before] if before else []) + [*_ANCHORS]:
                front, ids = self.encode([anchor, anchor + text])
                if ids[: len(front)] == front:
                    found.append(ids[len(front) :])
                    break
            else:
                expected = "a response whose first token is its own after any text before it"
                raise RecordError.of(source, f"completions[{number}]", expected, text)
        return found

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return dict(self.tokenizer.added_tokens_decoder)  # made anew each time that it is asked for

    @functools.cached_property
    def _adds_blank(self) -> bool:
        alone, *after = self.encode(["b", *(f"{anchor}b" for anchor in _ANCHORS)])
        return bool(alone) and not any(ids[-len(alone) :] == alone for ids in after)
