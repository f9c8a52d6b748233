"""Records for training and evaluation, split by prompt: no prompt is on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

from clha_fast.data.records import Prompt, RankedRecord


class _Prompted(Protocol):
    @property
    def prompt(self) -> Prompt: ...


def prompt_key(record: _Prompted) -> str:
    """The same text for the same prompt: outer blanks do not count."""
    if isinstance(record.prompt, str):
        return record.prompt.strip()
    return json.dumps([dict(message) for message in record.prompt], sort_keys=True)


def split_records(
    records: Sequence[RankedRecord], fraction: float, seed: int
) -> tuple[list[RankedRecord], list[RankedRecord]]:
    """(training, evaluation), by a hash of prompt and seed: a prompt is on one side, whatever else the file holds.

    One prompt of two or more is always held out, however small the file (then another one, perhaps, in a larger file).

    Raises:
        ValueError: `fraction` is not between 0 and 1, or one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction: expected a number between 0 and 1, got {fraction!r}")
    train: list[RankedRecord] = []
    held_out: list[RankedRecord] = []
    shares = [_share(record, seed) for record in records]
    lowest = sorted(set(shares))[:2]
    limit = max(fraction, lowest[1]) if len(lowest) > 1 else fraction
    for record, share in zip(records, shares, strict=True):
        (held_out if share < limit else train).append(record)
    if not train or not held_out:
        side = "training" if not train else "evaluation"
        prompts = len({prompt_key(record) for record in records})
        raise ValueError(
            f"eval_fraction: {fraction} of {len(records):,} records with {prompts:,} different prompts leaves none for "
            f"{side}; give more prompts, another fraction or seed, an eval_file, or 0 for no evaluation"
        )
    return train, held_out


def _share(record: RankedRecord, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{prompt_key(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def half_of(records: Sequence[RankedRecord], half: int) -> list[RankedRecord]:
    """The records of one half of all prompts, by a hash of the prompt alone: whatever the seed, the halves share none.

    Raises:
        ValueError: `half` is not 0 or 1, or no record is in it.
    """
    if isinstance(half, bool) or half not in (0, 1):
        raise ValueError(f"half: expected 0 or 1, got {half!r}")
    found = [record for record in records if _half(record) == half]
    if not found:
        got = f"none of {len(records):,} records"
        raise ValueError(f"half: expected prompts in half {half}, got {got}; give more prompts")
    return found


def _half(record: RankedRecord) -> int:
    return hashlib.sha256(f"half\n{prompt_key(record)}".encode()).digest()[0] & 1


def shared_prompts(train: Sequence[RankedRecord], held_out: Sequence[RankedRecord]) -> int:
    """How many evaluation records have a prompt that training also has."""
    seen = {prompt_key(record) for record in train}
    return sum(prompt_key(record) in seen for record in held_out)
