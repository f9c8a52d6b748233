"""How often a reward model puts the better response of a pair first, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha_fast.evaluation.intervals import estimate, ratio


@dataclass(frozen=True)
class PairAccuracy:
    """Attributes:
    accuracy: the share of right pairs. interval: its 95% bootstrap interval over prompts, None of one prompt.
    """

    accuracy: float
    interval: tuple[float, float] | None
    prompts: int
    pairs: int

    @property
    def like_chance(self) -> bool:
        """Whether guessing would not be told from it."""
        return self.interval is None or self.interval[0] <= 0.5 <= self.interval[1]

    def as_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "interval": None if self.interval is None else list(self.interval)}


def pair_accuracy(correct: Sequence[float], pairs: Sequence[int]) -> PairAccuracy:
    """The accuracy over all pairs; prompts are resampled, for the pairs of one are not independent.

    Args:
        correct: right pairs of each prompt, a pair of equal rewards counts half. pairs: of each prompt, at least one.

    Raises:
        ImportError: scipy is not installed.
    """
    found = estimate(ratio, np.column_stack([correct, pairs]))
    interval = None if found.low is None or found.high is None else (found.low, found.high)
    return PairAccuracy(sum(correct) / sum(pairs), interval, len(pairs), sum(pairs))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% bootstrap interval of a mean over prompts, None of one prompt; ImportError without scipy."""
    found = estimate(ratio, np.column_stack([values, np.ones(len(values))]))
    return None if found.low is None or found.high is None else (found.low, found.high)
