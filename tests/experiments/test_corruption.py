"""Noise put into ranked data: what changes, how often, and that draws do not depend on anything but record and seed."""

from __future__ import annotations

import numpy as np
import pytest

from clha_fast.data.records import RankedRecord
from clha_fast.experiments.corruption import Corruption, reordered


def ranked(number: int, size: int = 3) -> RankedRecord:
    rewards = tuple(float(size - k) + 0.1 * number for k in range(size))
    return RankedRecord(f"question {number}", tuple(f"answer {number} {k}" for k in range(size)), rewards)


RECORDS = [ranked(number, 2 + number % 3) for number in range(400)]


def pairs_of(record: RankedRecord) -> set[tuple[str, float]]:
    return set(zip(record.completions, record.rewards, strict=True))


@pytest.mark.parametrize(("kind", "rate"), [("flips", 0.3), ("flips", 1.0), ("rewards", 0.7)])
def test_it_depends_on_the_record_and_the_seed_alone(kind, rate):
    noise = Corruption(kind, rate, seed=5)
    whole = noise.apply(RECORDS)
    assert noise.apply(RECORDS) == whole
    if kind == "flips":  # for rewards the spread is that of all records
        assert noise.apply(RECORDS[::-1])[::-1] == whole
    assert Corruption(kind, rate, seed=6).apply(RECORDS) != whole


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.6, 1.0])
def test_a_flip_exchanges_two_candidates_and_leaves_each_its_reward(rate):
    found = Corruption("flips", rate, seed=1).apply(RECORDS)
    moved = [
        sum(a != b for a, b in zip(x.completions, y.completions, strict=True))
        for x, y in zip(RECORDS, found, strict=True)
    ]
    assert set(moved) <= {0, 2}
    assert all(pairs_of(x) == pairs_of(y) for x, y in zip(RECORDS, found, strict=True))
    share = np.mean([count == 2 for count in moved])
    assert abs(share - rate) < 4 * np.sqrt(max(rate * (1 - rate), 1e-12) / len(RECORDS)) + 1e-9


def test_more_flips_hold_fewer_ones():
    few, many = (Corruption("flips", rate, seed=3).apply(RECORDS) for rate in (0.1, 0.4))
    for record, a, b in zip(RECORDS, few, many, strict=True):
        if a != record:
            assert b == a


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_noisy_rewards_rank_again_and_have_the_spread_that_was_asked_for(rate):
    found = Corruption("rewards", rate, seed=2).apply(RECORDS)
    gaps = []
    for record, noisy in zip(RECORDS, found, strict=True):
        assert sorted(record.completions) == sorted(noisy.completions)
        assert list(noisy.rewards) == sorted(noisy.rewards, reverse=True)
        honest = dict(zip(record.completions, record.rewards, strict=True))
        gaps += [reward - honest[text] for text, reward in zip(noisy.completions, noisy.rewards, strict=True)]
    spread = np.std([reward for record in RECORDS for reward in record.rewards])
    assert np.std(gaps) == pytest.approx(rate * spread, rel=0.1)
    assert abs(np.mean(gaps)) < 4 * rate * spread / np.sqrt(len(gaps))


def test_no_noise_is_no_change_for_ranked_rewards():
    assert Corruption("rewards", 0.0).apply(RECORDS) == RECORDS
    assert Corruption("flips", 0.0).apply(RECORDS) == RECORDS


def test_the_target_is_the_candidate_that_stands_first():
    record = RankedRecord("q", ("a", "b", "c"), (3.0, 2.0, 1.0), sft_index=1)
    assert reordered(record, [2, 0, 1]) == RankedRecord("q", ("c", "a", "b"), (1.0, 3.0, 2.0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("label", 0.1), "kind: expected one of rewards, flips, got 'label'"),
        (("flips", 1.5), "rate: expected a probability, got 1.5"),
        (("rewards", -1.0), "rate: expected a finite number of standard deviations, at least 0, got -1.0"),
        (("rewards", float("nan")), "rate: expected a finite number"),
    ],
)
def test_what_is_no_noise_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Corruption(*arguments)


def test_records_without_rewards_are_named():
    with pytest.raises(ValueError, match="file:3: rewards: expected some"):
        Corruption("flips", 0.1).apply([RankedRecord("q", ("a", "b"), source="file:3")])
