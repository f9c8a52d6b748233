"""What a file's records are like beside being right: counted while they are read, said once when they have been."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from clha_fast.data.records import Prompt, RankedRecord, agreeing, as_compared, repeats_prompt

logger = logging.getLogger("clha_fast.data")

_MANY = 100  # pairs, from which an order by chance is told from one that people gave


@dataclass
class Notes:
    """Counts over the records of one source.

    Attributes:
        name: the file, or "records".
        records: how many were read. single: those with one response. equal: those with two equal responses.
        repeated: those whose responses all began with the prompt, which was taken off. left: those whose prompt is so
            short that it was left there. partly: those of which some responses begin with it, and others do not.
        silent: those with several responses to a prompt without any text. blank: those with a response of blanks alone.
        bare: trees without two ranked replies to one message, of which no record came.
        pairs: of responses with different rewards; reversed: those whose worse-ranked one has the higher reward.
        unread: columns that no reader takes, and in how many records they hold something.
        first: by the name of a count, where the first record that it counts is.
    """

    name: str = "records"
    records: int = 0
    single: int = 0
    equal: int = 0
    repeated: int = 0
    left: int = 0
    partly: int = 0
    silent: int = 0
    blank: int = 0
    bare: int = 0
    pairs: int = 0
    reversed: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def see(self, record: RankedRecord, unread: Iterable[str] = (), repeated: bool = False) -> None:
        """Count a record, the columns of its row that nobody took, and whether its responses repeated the prompt."""
        left = repeated and all(text.startswith(str(record.prompt)) for text in record.completions)
        self.records += 1
        self.unread.update(unread)
        rewards = as_compared(record.rewards or ())
        right, pairs = agreeing(rewards, range(0, -len(rewards), -1))
        self.pairs += pairs
        found = {
            "repeated": repeated and not left,
            "left": left,
            "partly": not repeated and any(map(repeats_prompt(record.prompt), record.completions)),
            "silent": len(record.completions) > 1 and not says(record.prompt),
            "blank": not all(text.strip() for text in record.completions),
            "single": len(record.completions) == 1,
            "equal": len(set(record.completions)) < len(record.completions),
            "reversed": int(pairs - right),
        }
        for name, count in found.items():
            setattr(self, name, getattr(self, name) + count)
            if count:
                self.first.setdefault(name, record.source)

    def merge(self, other: Notes) -> None:
        """Add the counts of other records of the same source."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.unread.update(other.unread)
        self.first = other.first | self.first

    def as_dict(self) -> dict[str, Any]:
        """What `Notes(**...)` takes: plain values, for JSON."""
        return {**vars(self), "unread": dict(self.unread), "first": dict(self.first)}

    def sentences(self) -> list[str]:
        """One for each thing that a user has to know; none for an ordinary file."""
        found = []
        if self.unread:
            names = ", ".join(
                name if count == self.records else f"{name} ({count:,} of {self.records:,} records)"
                for name, count in self.unread.items()
            )
            found.append(_nobody(names))
        if self.bare:
            found.append(f"{self.bare:,} trees have no message with two ranked replies")
        if self.single:
            found.append(self._counted("single", "have one response, which ranks nothing"))
        if self.equal:
            found.append(self._counted("equal", "have two equal responses, which are ranked nevertheless"))
        if self.blank:
            found.append(self._counted("blank", "have a response of blanks alone, which is ranked nevertheless"))
        if self.silent:
            found.append(self._counted("silent", "have a prompt without any text, which their responses answer"))
        if self.repeated:
            found.append(self._counted("repeated", "had responses that repeat the prompt, which was taken off them"))
        if self.left:
            found.append(self._counted("left", "have responses that begin with their short prompt, which was left"))
        if self.partly > 1 and 2 * self.partly > self.records:  # not an answer here and there, a way of writing them
            beside = "have responses that begin with the prompt, beside others that do not: it was left, and is trained"
            found.append(self._counted("partly", f"{beside} on as part of them"))
        most = self.reversed * 2 > self.pairs
        # Two standard deviations: rewards that stand in no order at all are reversed in about half of the pairs.
        chance = self.pairs >= _MANY and self.reversed > self.pairs / 2 - math.sqrt(self.pairs)
        if most or chance:
            found.append(
                f"{self.reversed:,} of {self.pairs:,} pairs are ranked against their rewards"
                f"{'' if most else ', about as many as in an order by chance'} (first: {self.first['reversed']}); "
                "rank_by_reward=True (--rank_by_reward) orders them by reward"
            )
        return [f"{self.name}: {sentence}" for sentence in found]

    def _counted(self, name: str, what: str) -> str:
        return f"{getattr(self, name):,} of {self.records:,} records {what} (first: {self.first[name]})"

    def say_new_columns(self, before: Collection[str]) -> None:
        """Log the unread columns that are not among `before`: for a stream, which has no end to wait for."""
        names = [name for name in self.unread if name not in before]
        if names:
            logger.warning(f"{self.name}: {_nobody(', '.join(names))}")

    def say(self) -> None:
        """Log the sentences, as warnings."""
        for sentence in self.sentences():
            logger.warning(sentence)


def says(prompt: Prompt) -> bool:
    """Whether any of it is more than blanks."""
    texts = [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]
    return any(text.strip() for text in texts)


def _nobody(names: str) -> str:
    return (
        f"nobody reads the columns {names}; columns={{field: column}} maps one to a field (--columns.FIELD COLUMN, as "
        "--columns.rewards '[score_a, score_b]')"
    )
