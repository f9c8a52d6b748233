"""How often a reward model puts the better response of a pair first, and how sure that is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_RESAMPLES = 9999
_SEED = 0
_BLOCK = 10**7  # numbers that are resampled at a time


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


def check_intervals() -> None:
    """ImportError where scipy, which makes the intervals, is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(
            "eval_fraction: expected scipy, which makes the interval of the held-out accuracy, got none; "
            "pip install 'clha-fast[eval]' brings it, and eval_fraction 0 holds nothing out"
        )


def pair_accuracy(correct: Sequence[float], pairs: Sequence[int]) -> PairAccuracy:
    """The accuracy over all pairs; prompts are resampled, for the pairs of one are not independent.

    Args:
        correct: right pairs of each prompt, a pair of equal rewards counts half. pairs: of each prompt, at least one.

    Raises:
        ImportError: scipy is not installed.
    """
    check_intervals()
    from scipy import stats

    def share(right: Any, of: Any, axis: int = -1) -> Any:
        return right.sum(axis=axis) / of.sum(axis=axis)

    interval = None
    if len(pairs) > 1:
        found = stats.bootstrap(
            (correct, pairs),
            share,
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=max(1, _BLOCK // len(pairs)),
            method="percentile",  # the others are not defined where every resample gives the same
            rng=_SEED,
        ).confidence_interval
        interval = (float(found.low), float(found.high))
    return PairAccuracy(sum(correct) / sum(pairs), interval, len(pairs), sum(pairs))
