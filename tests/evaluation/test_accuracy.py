"""The held-out accuracy of a reward model and its interval."""

from __future__ import annotations

import math
import sys

import pytest

from clha_fast.evaluation.accuracy import mean_interval, pair_accuracy


def test_by_hand() -> None:
    pytest.importorskip("scipy")
    found = pair_accuracy([1.0, 0.0, 2.5], [1, 1, 3])
    assert found.accuracy == 3.5 / 5
    assert (found.prompts, found.pairs) == (3, 5)
    assert found.interval is not None
    # A resample of three prompts: the lowest share is that of the second alone, the highest that of the first.
    assert found.interval == (0.0, 1.0)
    assert found.like_chance
    assert pair_accuracy([1.0, 0.0, 2.5], [1, 1, 3]) == found


def test_prompts_are_resampled_not_pairs() -> None:
    """Pairs of one prompt that go together widen the interval: 40 prompts of ten pairs are not 400 of one."""
    pytest.importorskip("scipy")
    together = pair_accuracy([10.0, 10.0, 10.0, 0.0] * 10, [10] * 40)
    apart = pair_accuracy([1.0, 1.0, 1.0, 0.0] * 100, [1] * 400)
    widths = []
    for found, count in ((together, 40), (apart, 400)):
        assert found.accuracy == 0.75
        assert found.interval is not None
        widths.append(found.interval[1] - found.interval[0])
        assert widths[-1] == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / count), rel=0.12)
        assert not found.like_chance


def test_ends() -> None:
    pytest.importorskip("scipy")
    assert pair_accuracy([2.0, 1.0], [2, 1]).interval == (1.0, 1.0)
    one = pair_accuracy([1.0], [1])
    assert (one.accuracy, one.interval, one.like_chance) == (1.0, None, True)
    assert one.as_dict() == {"accuracy": 1.0, "interval": None}


def test_means() -> None:
    pytest.importorskip("scipy")
    low, high = mean_interval([0.0, 1.0] * 50) or (0, 0)
    assert (high + low) / 2 == pytest.approx(0.5, abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.12)
    assert mean_interval([3.0]) is None
    assert mean_interval([0.0, 0.0]) == (0, 0)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"scipy is not installed; pip install 'clha-fast\[eval\]' brings it"):
        pair_accuracy([1.0, 0.0], [1, 1])
