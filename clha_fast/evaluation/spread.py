"""Intervals over seeds and prompts together: what another training run, on other prompts, may give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clha_fast.evaluation.intervals import LEVEL, RESAMPLES, Array, import_scipy

_SEED = 0


@dataclass(frozen=True)
class Spread:
    """A figure with the interval in which it lies; low and high are None where there is nothing to resample.

    Attributes:
        seeds: the figure of each seed alone, None where it is undefined.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seeds": list(self.seeds)}


def over_seeds_and_prompts(statistic: Callable[[Array], Array], rows: Array) -> Spread:
    """A figure of sums over seeds and prompts, with its 95% percentile bootstrap interval.

    Seeds and prompts are drawn independently, with replacement (`scipy.stats.bootstrap`); one seed is kept as it is.

    Args:
        statistic: maps sums [..., K] to the figure [...]; NaN where it is undefined (0 / 0).
        rows: [S, P, K], what each prompt adds under each seed. A prompt with a NaN adds nothing.
    """
    rows = np.asarray(rows, dtype=np.float64)
    rows = np.where(np.isnan(rows).any(-1, keepdims=True), 0.0, rows)
    seeds = tuple(_number(statistic(own.sum(0))) for own in rows)
    value = _number(statistic(rows.sum((0, 1))))
    low, high = (None, None) if value is None else _interval(statistic, rows)
    return Spread(value, low, high, seeds)


def paired_difference(statistic: Callable[[Array], Array], ours: Array, theirs: Array) -> Spread:
    """The figure of `ours` less that of `theirs`, rows [S, P, K] of the same seeds and prompts, drawn together.

    Raises:
        ValueError: the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"rows: expected the same seeds and prompts, got the shapes {ours.shape} and {theirs.shape}")
    size = ours.shape[-1]

    def difference(sums: Array) -> Array:
        return np.asarray(statistic(sums[..., :size]) - statistic(sums[..., size:]))

    missing = np.isnan(ours).any(-1, keepdims=True), np.isnan(theirs).any(-1, keepdims=True)
    parts = [np.where(gone, 0.0, rows) for gone, rows in zip(missing, (ours, theirs), strict=True)]
    return over_seeds_and_prompts(difference, np.concatenate(parts, -1))


def _number(value: Any) -> float | None:
    return None if math.isnan(float(value)) else float(value)


def _interval(statistic: Callable[[Array], Array], rows: Array) -> tuple[float | None, float | None]:
    seeds, prompts, _ = rows.shape
    if prompts < 2:
        return None, None

    def counts(index: Any, size: int) -> Array:
        """[..., size], how often each was drawn."""
        return np.asarray((index[..., None] == np.arange(size)).sum(-2), dtype=np.float64)

    def drawn(*indices: Any, axis: int) -> Array:
        often = counts(indices[-1], prompts)
        runs = np.ones((*often.shape[:-1], 1)) if len(indices) == 1 else counts(indices[0], seeds)
        return statistic(np.einsum("...s,...p,spk->...k", runs, often, rows, optimize=True))

    scipy_stats = import_scipy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy_stats.DegenerateDataWarning)  # None says it
        found = scipy_stats.bootstrap(
            (np.arange(prompts),) if seeds < 2 else (np.arange(seeds), np.arange(prompts)),
            drawn,
            n_resamples=RESAMPLES,
            batch=100,
            vectorized=True,
            axis=-1,
            confidence_level=LEVEL,
            # BCa's jackknife leaves out one seed or one prompt, as if they were values of one sample each.
            method="percentile",
            rng=np.random.default_rng(_SEED),
        )
    low, high = (float(end) for end in found.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
