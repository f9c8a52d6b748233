"""Figures with bootstrap intervals over prompts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Method = Literal["percentile", "BCa"]
LEVEL = 0.95
RESAMPLES = 2000
_SEED = 0
_POINT = "the same whatever prompts are drawn: the interval is a point"
_ELEMENTS = 4_000_000  # of the resampled rows that exist at a time


@dataclass(frozen=True)
class Estimate:
    """A figure over prompts.

    Attributes:
        value: None where there is nothing to compute it from. low, high: the 95 % interval, None where there is none.
        prompts: how many have a value, each once however many rows it has. note: why there is no interval, or what is
            odd about it; "".
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    prompts: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def estimate(
    statistic: Callable[[Array], Array],
    rows: Array,
    *,
    prompts: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    method: Method = "percentile",
) -> Estimate:
    """A figure of sums over prompts, with the interval that `scipy.stats.bootstrap` gives; the same every time.

    Args:
        statistic: maps sums over prompts [..., K] to the figure [...]; NaN where it is undefined (0 / 0).
        rows: [R, K], what each row adds; those with a NaN, and those that add nothing (no pair, say), have no value and
            are left out.
        prompts: the prompt of each row. The rows of one are drawn together, as what they are: one draw of a prompt.
            None where no two rows have the same.

    Raises:
        ValueError: as `by_prompt`. ImportError: scipy is not installed.
    """
    rows = np.asarray(rows, dtype=np.float64)
    valued = np.flatnonzero(~np.isnan(rows).any(1) & rows.any(1)).tolist()
    if prompts is not None:
        _check_prompts(rows, prompts)
        prompts = [prompts[k] for k in valued]
    rows = by_prompt(rows[valued], prompts)
    count = len(rows)
    value = float(statistic(rows.sum(0))) if count else math.nan
    if math.isnan(value):
        return Estimate(None, prompts=count, note="no prompt has a value")
    if count == 1:
        return Estimate(value, prompts=1, note="one prompt: no interval")
    if (rows == rows[0]).all():
        return Estimate(value, value, value, count, _POINT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a figure that is undefined in a resample, which the note says
        found = import_scipy().bootstrap(
            (np.arange(count),),
            lambda index, axis: statistic(rows[index].sum(-2)),
            n_resamples=resamples,
            batch=max(1, _ELEMENTS // rows.size),
            vectorized=True,
            axis=-1,
            confidence_level=level,
            method=method,
            rng=np.random.default_rng(_SEED),
        )
    low, high = (float(end) for end in found.confidence_interval)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Estimate(value, prompts=count, note="undefined in some resamples: no interval")
    return Estimate(value, low, high, count, _POINT if low == high else "")


def difference(statistic: Callable[[Array], Array], ours: Array, theirs: Array, **settings: Any) -> Estimate:
    """The figure of `ours` less that of `theirs`, rows [R, K] of the same prompts: both are resampled together."""
    size = ours.shape[1]
    return estimate(
        lambda sums: statistic(sums[..., :size]) - statistic(sums[..., size:]), np.hstack([ours, theirs]), **settings
    )


def by_prompt(rows: Array, prompts: Sequence[Hashable] | None) -> Array:
    """[..., P, K], the sums of the rows [..., R, K] of each prompt, in the order in which prompts first appear.

    Args:
        prompts: of each row; None where each row has its own.

    Raises:
        ValueError: not one prompt a row.
    """
    if prompts is None:
        return rows
    _check_prompts(rows, prompts)
    places: dict[Hashable, int] = {}
    place = [places.setdefault(prompt, len(places)) for prompt in prompts]
    if len(places) == len(place):
        return rows
    found = np.zeros((*rows.shape[:-2], len(places), rows.shape[-1]))
    np.add.at(np.moveaxis(found, -2, 0), place, np.moveaxis(rows, -2, 0))
    return found


def _check_prompts(rows: Array, prompts: Sequence[Hashable]) -> None:
    if len(prompts) != rows.shape[-2]:
        raise ValueError(f"prompts: expected one for each of {rows.shape[-2]:,} rows, got {len(prompts):,}")


def ratio(sums: Array) -> Array:
    """[..., 2] -> [...], the first over the second; NaN of nothing. With ones in the second place it is a mean."""
    top, bottom = sums[..., 0], sums[..., 1]
    nothing = np.full(np.shape(top), np.nan)
    return np.asarray(np.divide(top, bottom, out=nothing, where=bottom != 0))


def import_scipy() -> Any:
    """`scipy.stats`; ImportError says how to get it."""
    return import_extra("scipy.stats", "intervals")


def check_extra() -> None:
    """ImportError where a package that measuring answers needs is missing: said before hours of answering."""
    for module in ("scipy.stats", "nltk", "sacrebleu"):
        import_extra(module, "measuring answers")


def import_extra(module: str, what: str) -> Any:
    """A package of the extra `eval`; ImportError, in one sentence, names it and the way to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what}: {package} is not installed; pip install 'clha-fast[eval]' brings it") from error
