"""Noise put into ranked data on purpose: two kinds that do different things to a loss which masks by rewards.

`rewards`   r' = r + rate * std * e, e ~ N(0, 1), std that of all rewards; candidates are ranked again by r', which
            they carry: what a worse reward model gives. Rewards and ranks agree, so `abs` and `signed` are one rule.
`flips`     with probability `rate`, two candidates of a record, drawn at random, change places; each keeps its
            own honest reward: what a careless labeller gives. Rewards and ranks disagree where it struck.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from clha_fast.data.records import RankedRecord, as_compared
from clha_fast.data.split import prompt_key

Kind = Literal["rewards", "flips"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Corruption:
    """How data are corrupted.

    Attributes:
        kind: "rewards" or "flips". rate: standard deviations for "rewards", a probability for "flips".
        seed: of the draws. A record's depend on it and on the record alone, not on its place in the file.

    Raises:
        ValueError: another kind, a negative rate, a probability above 1.
    """

    kind: Kind
    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        most = 1.0 if self.kind == "flips" else float("inf")
        if not 0 <= self.rate <= most or self.rate == float("inf"):
            expected = "a probability" if self.kind == "flips" else "a finite number of standard deviations, at least 0"
            raise ValueError(f"rate: expected {expected}, got {self.rate!r}")

    def apply(self, records: Sequence[RankedRecord]) -> list[RankedRecord]:
        """The corrupted records; their SFT target is the candidate that then stands first.

        Raises:
            ValueError: a record without rewards.
        """
        for record in records:
            if record.rewards is None:
                raise ValueError(f"{record.source}: rewards: expected some, for noise is judged by them, got None")
        if self.kind == "flips":
            return [self._flipped(record) for record in records]
        spread = float(np.std(np.concatenate([np.asarray(record.rewards) for record in records]))) if records else 0.0
        return [self._noisy(record, self.rate * spread) for record in records]

    def _draws(self, record: RankedRecord) -> np.random.Generator:
        text = "\n".join((self.kind, str(self.seed), prompt_key(record), *record.completions))
        return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32))

    def _flipped(self, record: RankedRecord) -> RankedRecord:
        draws, size = self._draws(record), len(record.completions)
        order = list(range(size))
        strikes = draws.random() < self.rate
        if size > 1 and strikes:
            first, second = draws.choice(size, 2, replace=False)
            order[first], order[second] = order[second], order[first]
        return reordered(record, order)

    def _noisy(self, record: RankedRecord, spread: float) -> RankedRecord:
        assert record.rewards is not None
        noise = self._draws(record).standard_normal(len(record.rewards))
        rewards = [reward + spread * float(e) for reward, e in zip(record.rewards, noise, strict=True)]
        compared = as_compared(rewards)
        order = sorted(range(len(rewards)), key=lambda k: -compared[k])
        return reordered(dataclasses.replace(record, rewards=tuple(rewards)), order)


def reordered(record: RankedRecord, order: Sequence[int]) -> RankedRecord:
    """The record with its candidates, and all that belongs to each, in another order; the first is the SFT target."""
    return dataclasses.replace(record.in_order(order), sft_index=0)
