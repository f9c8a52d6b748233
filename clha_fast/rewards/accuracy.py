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
            "eval_fraction: expected scipy, which makes the intervals of held-out figures, got none; "
            "pip install 'clha-fast[eval]' brings it, and eval_fraction 0 holds nothing out"
        )


def ratio(top: Sequence[float], bottom: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """sum(top) / sum(bottom) over prompts and its 95% bootstrap interval, which is None of one prompt.

    Raises:
        ImportError: scipy is not installed.
    """
    check_intervals()
    from scipy import stats

    def share(right: Any, of: Any, axis: int = -1) -> Any:
        return right.sum(axis=axis) / of.sum(axis=axis)

    value = sum(top) / sum(bottom)
    if len(top) == 1:
        return value, None
    found = stats.bootstrap(
        (top, bottom),
        share,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _BLOCK // len(top)),
        method="percentile",  # the others are not defined where every resample gives the same
        rng=_SEED,
    ).confidence_interval
    return value, (float(found.low), float(found.high))


def pair_accuracy(correct: Sequence[float], pairs: Sequence[int]) -> PairAccuracy:
    """The accuracy over all pairs; prompts are resampled, for the pairs of one are not independent.

    Args:
        correct: right pairs of each prompt, a pair of equal rewards counts half. pairs: of each prompt, at least one.

    Raises:
        ImportError: scipy is not installed.
    """
    accuracy, interval = ratio(correct, pairs)
    return PairAccuracy(accuracy, interval, len(pairs), sum(pairs))
