"""Files in which prompts stand several times: the records of one prompt are one draw, wherever an interval is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clha_fast.data import RankedRecord
from clha_fast.evaluation.accuracy import mean_interval, pair_accuracy
from clha_fast.evaluation.comparison import compare, comparison_table
from clha_fast.evaluation.intervals import Estimate, by_prompt, difference, estimate, ratio
from clha_fast.evaluation.report import RAW, TOTAL, Evaluation, evaluation_table
from clha_fast.evaluation.results import difference as table_difference
from clha_fast.evaluation.results import spreads
from clha_fast.evaluation.rewards import check_reward_model
from clha_fast.evaluation.spread import over_seeds_and_prompts, paired_difference
from clha_fast.rewards.reward_model import RewardModel
from tests.support.reward_models import TOKENIZER, by_length

pytest.importorskip("scipy", reason="scipy is not installed (the eval extra)")

PROMPTS = 12


def rows_of(seed: int, *lead: int) -> np.ndarray:
    """[..., PROMPTS, 2], what 12 prompts add to a ratio."""
    draws = np.random.default_rng(seed)
    return np.stack([draws.random((*lead, PROMPTS)), draws.integers(1, 5, (*lead, PROMPTS))], -1)


def copied(times: int, apart: bool) -> np.ndarray:
    """Which of the 12 prompts each row belongs to: one prompt's rows together, or the whole file again."""
    return np.tile(np.arange(PROMPTS), times) if apart else np.repeat(np.arange(PROMPTS), times)


def test_rows_of_a_prompt_are_added_up() -> None:
    rows = np.array([[1.0, 1.0], [2.0, 5.0], [4.0, 3.0], [8.0, 1.0]])
    assert by_prompt(rows, ["b", "a", "b", "c"]).tolist() == [[5.0, 4.0], [2.0, 5.0], [8.0, 1.0]]
    seeds = np.stack([rows, 10 * rows])
    assert by_prompt(seeds, [3, 3, 3, 3]).tolist() == [[[15.0, 10.0]], [[150.0, 100.0]]]
    assert by_prompt(rows, "abcd") is rows is by_prompt(rows, None)
    for call in (lambda: by_prompt(rows, "abc"), lambda: estimate(ratio, rows, prompts="abcde")):
        with pytest.raises(ValueError, match="prompts: expected one for each of 4 rows, got "):
            call()


@pytest.mark.parametrize(("times", "apart"), [(2, True), (8, False)])
def test_a_file_twice_is_no_surer_than_once(times: int, apart: bool) -> None:
    place = copied(times, apart)
    once = estimate(ratio, rows_of(0))
    again = estimate(ratio, rows_of(0)[place], prompts=place.tolist())
    assert again.prompts == PROMPTS
    assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))
    apiece = estimate(ratio, rows_of(0)[place])
    assert apiece.high - apiece.low < (once.high - once.low) / 1.2  # as if they were other prompts
    ours, theirs = rows_of(1), rows_of(2)
    once, again = (
        difference(ratio, ours, theirs),
        difference(ratio, ours[place], theirs[place], prompts=place.tolist()),
    )
    assert (again.prompts, again.low, again.high) == (PROMPTS, pytest.approx(once.low), pytest.approx(once.high))


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("times", "apart"), [(3, True), (5, False)])
def test_over_seeds_too(seeds: int, times: int, apart: bool) -> None:
    place = copied(times, apart)
    ours, theirs = rows_of(3, seeds), rows_of(4, seeds)
    ours[0, 2] = np.nan  # one side has no value: neither counts
    for once, again in (
        (over_seeds_and_prompts(ratio, ours), over_seeds_and_prompts(ratio, ours[:, place], prompts=place.tolist())),
        (
            paired_difference(ratio, ours, theirs),
            paired_difference(ratio, ours[:, place], theirs[:, place], prompts=place.tolist()),
        ),
    ):
        assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))
        assert again.seeds == pytest.approx(once.seeds)


def test_rows_without_a_value_leave_their_prompt_to_the_others() -> None:
    rows = np.array([[1.0, 1.0], [np.nan, 1.0], [0.0, 0.0], [0.0, 1.0], [np.nan, 1.0]])
    assert estimate(ratio, rows, prompts=["a", "a", "b", "c", "d"]) == Estimate(0.5, 0.0, 1.0, 2)
    alone = estimate(ratio, rows, prompts=["a", "b", "c", "a", "d"])
    assert alone == Estimate(0.5, prompts=1, note="one prompt: no interval")


def evaluation(seed: int, place: np.ndarray) -> Evaluation:
    """Answers to the prompts of `place`, some without a raw reward."""
    draws = np.random.default_rng(seed)
    raw: list[float | None] = draws.normal(size=PROMPTS).tolist()
    raw[seed] = None
    own: dict[str, Any] = {"words": draws.integers(1, 9, PROMPTS).astype(float).tolist(), RAW + "rm": raw}
    values = {name: [column[k] for k in place] for name, column in own.items()}
    prompts = [f"p{k}" for k in place]
    known = {"rm": {"fingerprint": "f", "accuracy": Estimate(0.9, 0.8, 1.0, 9).as_dict(), "refused": ""}}
    return Evaluation(prompts, ["a" if k % 3 else "b" for k in place], prompts, values, checks=known)


@pytest.mark.parametrize("apart", [True, False])
def test_every_interval_of_an_evaluation_and_of_a_comparison(apart: bool) -> None:
    first, place = np.arange(PROMPTS), copied(4, apart)
    ours, theirs = (tuple(evaluation(seed, where) for where in (first, place)) for seed in (0, 1))
    for once, again in zip(*(found.figures()["b"].values() for found in ours), strict=True):
        assert again.as_dict() == pytest.approx(once.as_dict())
    (header, _, prompts, records), (_, _, alone, words) = (
        evaluation_table(found, found.figures()).splitlines()[:4] for found in (ours[1], ours[0])
    )
    assert header.split() == ["b", "a", TOTAL]
    assert prompts.split() == alone.split() == ["prompts", "4", "8", "12"]
    assert records.split()[-3:] == ["16", "32", "48"]
    assert words.startswith("raw reward: rm")

    once, again = (compare(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (again.prompts, again.records, once.records) == (12, 48, 12)
    for part in ("a", "b", TOTAL):
        for name, row in once.differences[part].items():
            for side in ("a", "b", "difference"):
                found, wanted = getattr(again.differences[part][name], side), getattr(row, side)
                assert found.as_dict() == pytest.approx(wanted.as_dict()), (part, name, side)
        assert again.wins[part]["rm"].rate.as_dict() == pytest.approx(once.wins[part]["rm"].rate.as_dict())
    assert comparison_table(again).startswith("12 prompts in common in 48 records; 0 records stand in A alone")

    once, again = (spreads([found]) for found in ours)
    for part in ("a", "b", TOTAL):
        for name, wanted in once[part].items():
            assert again[part][name]["low"] == pytest.approx(wanted["low"]), (part, name)
            assert again[part][name]["high"] == pytest.approx(wanted["high"]), (part, name)
    once, again = (table_difference([a], [b]) for a, b in zip(ours, theirs, strict=True))
    assert once.keys() == again.keys()
    for name, wanted in once.items():
        assert (again[name].low, again[name].high) == pytest.approx((wanted.low, wanted.high)), name


@pytest.mark.parametrize("times", [1, 20])
def test_a_reward_model_is_no_better_for_being_asked_again(times: int) -> None:
    """Right about three prompts of four: that may be chance, however often they stand in the file."""
    better, worse = "the cat sat on a mat", "a dog"
    records = [
        RankedRecord(f"say {k}:{' ' * (n % 2)}", (worse, better) if k == 3 else (better, worse))
        for n in range(times)
        for k in range(4)
    ]
    found = check_reward_model("rm", records, RewardModel(by_length(), TOKENIZER))
    assert (found.accuracy.value, found.accuracy.prompts) == (0.75, 4)
    assert "does not lie above chance" in found.refused


@pytest.mark.parametrize("times", [2, 10])
def test_accuracies_and_means_of_runs(times: int) -> None:
    draws = np.random.default_rng(6)
    correct, place = draws.integers(0, 2, PROMPTS).astype(float), copied(times, True)
    once, again = (pair_accuracy(correct[k].tolist(), [1] * len(k), k.tolist()) for k in (np.arange(PROMPTS), place))
    assert (again.accuracy, again.interval) == (once.accuracy, pytest.approx(once.interval))
    assert (again.prompts, again.pairs) == (PROMPTS, PROMPTS * times)
    values = draws.normal(size=PROMPTS)
    assert mean_interval(values[place].tolist(), place.tolist()) == pytest.approx(mean_interval(values.tolist()))
