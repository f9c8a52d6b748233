"""How often a reward model puts the better response of a pair first, and how sure that is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha_fast.evaluation.intervals import estimate, ratio


@dataclass(frozen=True)
class PairAccuracy:
    """Attributes:
    accuracy: the share of right pairs, of `pairs` that belong to `prompts` different prompts. interval: its 95%
        bootstrap interval over prompts, None of one prompt.
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


def pair_accuracy(
    correct: Sequence[float], pairs: Sequence[int], prompts: Sequence[Hashable] | None = None
) -> PairAccuracy:
    """The accuracy over all pairs; prompts are resampled, for the pairs of one are not independent.

    Args:
        correct: right pairs of each record, a pair of equal rewards counts half. pairs: of each record, at least one.
        prompts: of each record; the records of one are drawn together. None where no two have the same.

    Raises:
        ValueError: as `intervals.by_prompt`. ImportError: scipy is not installed.
    """
    found = estimate(ratio, np.column_stack([correct, pairs]), prompts=prompts)
    interval = None if found.low is None or found.high is None else (found.low, found.high)
    return PairAccuracy(sum(correct) / sum(pairs), interval, found.prompts, sum(pairs))


def mean_interval(values: Sequence[float], prompts: Sequence[Hashable] | None = None) -> tuple[float, float] | None:
    """The 95% bootstrap interval of a mean over prompts, None of one prompt; `prompts` as `pair_accuracy`.

    Raises:
        ValueError: as `intervals.by_prompt`. ImportError: scipy is not installed.
    """
    found = estimate(ratio, np.column_stack([values, np.ones(len(values))]), prompts=prompts)
    return None if found.low is None or found.high is None else (found.low, found.high)
