"""Intervals over seeds and prompts together: what another training run, on other prompts, may give."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 0


@dataclass(frozen=True)
class Spread:
    """A mean with the interval in which it lies; low and high are None where there is nothing to resample.

    Attributes:
        seeds: the value of each seed alone.
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seeds": list(self.seeds)}


def over_seeds_and_prompts(top: np.ndarray, bottom: np.ndarray | None = None) -> Spread:
    """sum(top) / sum(bottom), and its 95% percentile bootstrap interval; seeds and prompts are drawn independently.

    Args:
        top, bottom: [seeds, prompts], what each prompt adds. None: ones, so a mean over prompts. NaN is a prompt that
            has no value, and counts in neither.
    """
    top = np.asarray(top, dtype=np.float64)
    bottom = np.ones_like(top) if bottom is None else np.asarray(bottom, dtype=np.float64)
    missing = np.isnan(top) | np.isnan(bottom)
    top, bottom = np.where(missing, 0.0, top), np.where(missing, 0.0, bottom)
    low, high = _interval(lambda s, p: _ratio(top[np.ix_(s, p)], bottom[np.ix_(s, p)]), *top.shape)
    seeds = tuple(_number(_ratio(t, b)) for t, b in zip(top, bottom, strict=True))
    return Spread(_number(_ratio(top, bottom)), low, high, seeds)


def paired_difference(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> Spread:
    """The first ratio less the second, both (top, bottom) [seeds, prompts]: the same seeds and prompts are drawn."""
    (a, b), (c, d) = ours, theirs

    def difference(s: np.ndarray, p: np.ndarray) -> float:
        at = np.ix_(s, p)
        return _ratio(a[at], b[at]) - _ratio(c[at], d[at])

    seeds, prompts = a.shape
    low, high = _interval(difference, seeds, prompts)
    everyone = np.arange(prompts)
    each = tuple(_number(difference(np.array([k]), everyone)) for k in range(seeds))
    return Spread(_number(difference(np.arange(seeds), everyone)), low, high, each)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> float:
    whole = float(bottom.sum())
    return float(top.sum()) / whole if whole else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _interval(
    statistic: Callable[[np.ndarray, np.ndarray], float], seeds: int, prompts: int
) -> tuple[float | None, float | None]:
    from scipy.stats import DegenerateDataWarning, bootstrap

    if prompts < 2:
        return None, None
    samples = (np.arange(prompts),) if seeds < 2 else (np.arange(seeds), np.arange(prompts))

    def drawn(*indices: np.ndarray) -> float:
        return statistic(np.zeros(1, dtype=np.int64) if len(indices) == 1 else indices[0], indices[-1])

    # Percentile: a jackknife over two samples, which BCa takes, would undo the pairing of seeds and prompts.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # said by None
        found = bootstrap(
            samples,
            drawn,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        )
    low, high = (float(value) for value in found.confidence_interval)
    return (None, None) if np.isnan(low) or np.isnan(high) else (low, high)
