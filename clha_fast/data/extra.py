"""More candidates for records that there are: somebody's answers to the same prompts, matched by prompt."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from clha_fast.data.containers import rows_of
from clha_fast.data.readers import record_from_row
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.split import prompt_key


def prompt_digest(record: RankedRecord) -> int:
    """64 bits that stand for a prompt: the same ones for the same prompt, evenly spread."""
    return int.from_bytes(hashlib.sha256(prompt_key(record).encode()).digest()[:8], "big")


class ExtraCandidates:
    """Answers to prompts, from a file of `{"prompt", "answer"}` rows or of records in any known format.

    Args:
        given: path, or path:name, of a file or a glob; the name is what figures call it.

    Attributes:
        answers: by digest of the prompt, in the order of the file; held in memory.
        used, repeated: answers that became candidates, and those that were the same as one that was there.

    Raises:
        RecordError: a bad row, or none. OSError: the file cannot be read.
    """

    def __init__(self, given: str) -> None:
        path, colon, name = given.rpartition(":")
        if not colon or os.path.lexists(os.path.expanduser(given)) or not path or os.sep in name:
            path, name = given, os.path.basename(given)
        self.path, self.name = path, name
        self.answers: dict[int, list[str]] = {}
        self.used = self.repeated = self.empty = self.matched = 0
        for place, row in rows_of(path):
            if not isinstance(row, Mapping):
                raise row if isinstance(row, RecordError) else RecordError.of(place, "", "a JSON object", row)
            record, answers = _read(row, place)
            kept = [answer for answer in answers if answer.strip()]
            self.empty += len(answers) - len(kept)
            self.answers.setdefault(prompt_digest(record), []).extend(kept)
        if not any(self.answers.values()):
            raise RecordError(f"{path}: expected answers, found none", source=path)

    def match(self, prompts: Set[int]) -> None:
        """Count the prompts that are among `prompts`.

        Raises:
            ValueError: none is.
        """
        self.matched = sum(digest in prompts for digest in self.answers)
        if not self.matched:
            raise ValueError(
                f"{self.path}: expected answers to prompts of this data, got {len(self.answers):,} other prompts (are "
                "they those of train.jsonl as it was written, same parse?)"
            )

    def summary(self) -> dict[str, Any]:
        """For prepare.json."""
        return {
            "name": self.name,
            "prompts": len(self.answers),
            "prompts_matched": self.matched,
            "answers": sum(map(len, self.answers.values())),
            "used": self.used,
            "repeated": self.repeated,
            "empty": self.empty,
        }


def _read(row: Mapping[str, Any], place: str) -> tuple[RankedRecord, Sequence[str]]:
    if "answer" not in row:
        record = record_from_row(row, place)
        return record, record.completions
    if not isinstance(row["answer"], str):
        raise RecordError.of(place, "answer", "a text", row["answer"])
    # An empty answer is no error of the file: a model may have given it.
    return RankedRecord(row.get("prompt"), (row["answer"] or " ",), source=place), [row["answer"]]  # type: ignore[arg-type]


def with_extra(completions: Sequence[str], digest: int, extras: Iterable[ExtraCandidates], length: int) -> list[str]:
    """The completions and, behind them, answers that are none of them yet, each file's first before any's second.

    They begin with a blank where the completions do.
    """
    found = list(completions)
    blank = " " if all(text.startswith(" ") for text in found) else ""
    texts = {text.strip() for text in found}
    rounds = itertools.zip_longest(*([(extra, text) for text in extra.answers.get(digest, ())] for extra in extras))
    for extra, answer in filter(None, itertools.chain.from_iterable(rounds)):
        if len(found) == length:
            break
        if answer.strip() in texts:
            extra.repeated += 1
            continue
        texts.add(answer.strip())
        found.append(blank + answer.strip())
        extra.used += 1
    return found
