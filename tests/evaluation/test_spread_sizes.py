"""Intervals over seeds and prompts of many prompts: the draws are scipy's, memory goes with the prompts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from clha_fast.evaluation import spread
from clha_fast.evaluation.intervals import ratio
from clha_fast.evaluation.spread import over_seeds_and_prompts

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed (the eval extra)")


def rows_of(seeds: int, prompts: int) -> np.ndarray:
    draws = np.random.default_rng(100 * seeds + prompts)
    return np.stack([draws.random((seeds, prompts)), draws.integers(1, 5, (seeds, prompts))], -1)


@pytest.mark.parametrize("over_seeds", [False, True])
@pytest.mark.parametrize(("seeds", "prompts"), [(2, 7), (3, 40)])
def test_the_draws_are_scipy_s(seeds: int, prompts: int, over_seeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "RESAMPLES", 250)
    rows = rows_of(seeds, prompts)

    def figure(*index: np.ndarray, axis: int) -> np.ndarray:
        chosen = rows[index[0][..., :, None], index[-1][..., None, :]] if over_seeds else rows[:, index[-1]]
        return ratio(chosen.sum((-3, -2)) if over_seeds else chosen.sum((0, -2)))

    wanted = stats.bootstrap(
        tuple(np.arange(size) for size in ((seeds, prompts) if over_seeds else (prompts,))),
        figure,
        n_resamples=250,
        batch=100,
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
    assert spread._draws(ratio, rows, over_seeds) == pytest.approx(wanted, rel=1e-12)


def test_intervals_stay_what_they_were() -> None:
    found = over_seeds_and_prompts(ratio, rows_of(3, 40))
    assert (found.low, found.high) == pytest.approx((0.16677596005799053, 0.2358786947056762), rel=1e-9)


@pytest.mark.parametrize("held", [spread._HELD, 0])
def test_memory_goes_with_the_prompts(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """[100, 2,500, 2,500] truth values, as it was, are 600 MiB."""
    monkeypatch.setattr(spread, "RESAMPLES", 100)
    monkeypatch.setattr(spread, "_HELD", held)
    rows = rows_of(3, 2_500)
    spread._held.cache_clear()
    tracemalloc.start()
    try:
        found = over_seeds_and_prompts(ratio, rows)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.low < found.value < found.high
    assert most < 40 * 2**20
