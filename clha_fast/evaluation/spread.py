"""Intervals over seeds and prompts together: what another training run, on other prompts, may give."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clha_fast.evaluation.intervals import LEVEL, RESAMPLES, Array, by_prompt, import_scipy

_SEED = 0
_BATCH = 100  # resamples at a time; where seeds are drawn too it decides which draw is whose
_ELEMENTS = 4_000_000  # of the counts that exist at a time
_HELD = 25_000_000  # of the counts that are kept for the next figure


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


def over_seeds_and_prompts(
    statistic: Callable[[Array], Array],
    rows: Array,
    *,
    prompts: Sequence[Hashable] | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> Spread:
    """A figure of sums over seeds and prompts, with its 95% interval.

    Seeds and prompts are drawn independently, with replacement, as by `scipy.stats.bootstrap`, and the ends of the
    percentile interval are moved out for the few seeds there are: a bootstrap over S of them has (S - 1) / S of their
    variance, and normal tails. The factor is sqrt(S / (S - 1)) on the seeds' part of the variance, and Student's t with
    Satterthwaite's degrees of freedom. One seed is kept as it is: the interval is over prompts alone.

    Args:
        statistic: maps sums [..., K] to the figure [...]; NaN where it is undefined (0 / 0).
        rows: [S, R, K], what each row adds under each seed. A row with a NaN adds nothing.
        prompts: the prompt of each row; the rows of one are drawn together. None where no two rows have the same.
        least, most: the figure's range; an end that was moved beyond it is put there.

    Raises:
        ValueError: as `intervals.by_prompt`. ImportError: scipy is not installed.
    """
    rows = np.asarray(rows, dtype=np.float64)
    rows = by_prompt(np.where(np.isnan(rows).any(-1, keepdims=True), 0.0, rows), prompts)
    seeds = tuple(_number(statistic(own.sum(0))) for own in rows)
    value = _number(statistic(rows.sum((0, 1))))
    if value is None or rows.shape[1] < 2:
        return Spread(value, None, None, seeds)
    ends = _interval(_draws(statistic, rows, over_seeds=rows.shape[0] > 1), value, statistic, rows)
    low, high = (None if end is None else min(max(end, least), most) for end in ends)
    return Spread(value, low, high, seeds)


def paired_difference(
    statistic: Callable[[Array], Array],
    ours: Array,
    theirs: Array,
    *,
    prompts: Sequence[Hashable] | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> Spread:
    """The figure of `ours` less that of `theirs`, rows [S, R, K] of the same seeds and prompts, drawn together.

    `prompts` are as in `over_seeds_and_prompts`. Where one side has no value (NaN), neither counts. The difference lies
    between least - most and most - least.

    Raises:
        ValueError: the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"rows: expected the same seeds and prompts, got the shapes {ours.shape} and {theirs.shape}")
    size = ours.shape[-1]

    def difference(sums: Array) -> Array:
        return np.asarray(statistic(sums[..., :size]) - statistic(sums[..., size:]))

    both = np.concatenate([ours, theirs], -1)
    return over_seeds_and_prompts(difference, both, prompts=prompts, least=least - most, most=most - least)


def _number(value: Any) -> float | None:
    return None if math.isnan(float(value)) else float(value)


def _draws(
    statistic: Callable[[Array], Array], rows: Array, over_seeds: bool = False, over_prompts: bool = True
) -> Array:
    """[RESAMPLES], the figure of drawn seeds, of drawn prompts, or of both."""
    seeds, prompts, size = rows.shape
    sizes = ((seeds,) if over_seeds else ()) + ((prompts,) if over_prompts else ())
    once = rows if over_seeds else rows.sum(0, keepdims=True)  # what is not drawn counts once
    once = once if over_prompts else once.sum(1, keepdims=True)
    flat = once.transpose(1, 0, 2).reshape(once.shape[1], -1)
    found = []
    for often in _counts(sizes, RESAMPLES):
        sums = (often[-1] if over_prompts else np.ones((len(often[0]), 1))) @ flat
        by_seed = sums.reshape(len(sums), -1, size)
        found.append(np.einsum("bs,bsk->bk", often[0], by_seed) if over_seeds else by_seed[:, 0])
    with np.errstate(all="ignore"):  # a figure that some resamples lack: None says it
        return np.asarray(statistic(np.concatenate(found)))


def _counts(sizes: tuple[int, ...], resamples: int) -> Iterable[list[NDArray[Any]]]:
    """For each size [batch, size], how often each was drawn: batch after batch, all figures' the same."""
    return (_held if resamples * sum(sizes) <= _HELD else _drawn)(sizes, resamples)


def _drawn(sizes: tuple[int, ...], resamples: int) -> Iterator[list[NDArray[Any]]]:
    """The draws of `scipy.stats.bootstrap`, of which only counts are kept: memory and time go with the sizes."""
    draws = np.random.default_rng(_SEED)
    batch = max(1, min(_BATCH, _ELEMENTS // sum(sizes)))
    for start in range(0, resamples, batch):
        number = min(batch, resamples - start)
        offsets = np.arange(number)[:, None]
        yield [
            np.bincount((draws.integers(0, size, (number, size)) + size * offsets).ravel(), minlength=number * size)
            .reshape(number, size)
            .astype(np.float32)
            for size in sizes
        ]


@functools.lru_cache(maxsize=4)
def _held(sizes: tuple[int, ...], resamples: int) -> list[list[NDArray[Any]]]:
    return list(_drawn(sizes, resamples))


def _interval(
    draws: Array, value: float, statistic: Callable[[Array], Array], rows: Array
) -> tuple[float | None, float | None]:
    if not np.isfinite(draws).all():
        return None, None
    tail = (1 - LEVEL) / 2
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    seeds, prompts, _ = rows.shape
    of_seeds = float(_draws(statistic, rows, True, False).var()) * seeds / (seeds - 1) if seeds > 1 else 0.0
    of_prompts = float((_draws(statistic, rows) if seeds > 1 else draws).var())
    if not of_seeds + of_prompts > 0:
        return low, high
    stats = import_scipy()
    # Shares: the squares of variances as small as of a BLEU of 1e-154 would be 0.
    share = of_seeds / (of_seeds + of_prompts)
    freedom = 1 / (share**2 / max(seeds - 1, 1) + (1 - share) ** 2 / (prompts - 1))
    wider = float(stats.t.ppf(1 - tail, freedom) / stats.norm.ppf(1 - tail))
    if seeds > 1:
        wider /= math.sqrt(share * (seeds - 1) / seeds + (1 - share))
    return value - (value - low) * wider, value + (high - value) * wider
