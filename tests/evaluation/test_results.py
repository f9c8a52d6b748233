"""Figures over seeds and prompts: values and differences by hand, intervals against a plain loop, tables."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from clha_fast.evaluation import spread
from clha_fast.evaluation.comparison_tables import as_csv, differences_markdown, figure_named, markdown
from clha_fast.evaluation.intervals import ratio
from clha_fast.evaluation.report import FIGURES, Evaluation
from clha_fast.evaluation.results import difference, spreads
from clha_fast.evaluation.spread import over_seeds_and_prompts, paired_difference

pytest.importorskip("scipy", reason="scipy is not installed (the eval extra)")


def means(values) -> np.ndarray:
    """[S, P] as rows whose ratio is the mean."""
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values, np.ones_like(values)], -1)


def test_the_mean_and_each_seed_by_hand():
    found = over_seeds_and_prompts(ratio, means([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]))
    assert found.value == 4.0
    assert found.seeds == (2.0, 6.0)
    # Two seeds that differ by 4: with one degree of freedom they say next to nothing.
    assert found.low < -10 < 18 < found.high


def test_a_ratio_weighs_prompts_by_their_denominators():
    assert over_seeds_and_prompts(ratio, np.array([[[3.0, 3.0], [0.0, 1.0]]])).value == 0.75


def test_a_prompt_without_a_value_counts_in_neither():
    found = over_seeds_and_prompts(ratio, np.array([[[1.0, 1.0], [np.nan, 5.0], [3.0, 1.0]]]))
    assert found.value == 2.0


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 0)])
def test_one_prompt_has_no_interval(shape):
    found = over_seeds_and_prompts(ratio, means(np.ones(shape)))
    assert (found.low, found.high) == (None, None)
    assert found.value == (1.0 if shape[1] else None)


def test_equal_values_have_an_interval_of_width_0():
    found = over_seeds_and_prompts(ratio, means(np.full((2, 5), 0.25)))
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def plain_bootstrap(values: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """The ends of a percentile interval of the mean, seeds and prompts drawn in a loop."""
    seeds, prompts = values.shape
    found = []
    for _ in range(4000):
        index = np.ix_(draws.integers(0, seeds, seeds), draws.integers(0, prompts, prompts))
        found.append(values[index].mean())
    return np.quantile(found, [0.025, 0.975])


def test_over_one_seed_it_is_a_bootstrap_over_prompts():
    draws = np.random.default_rng(0)
    values = draws.normal(size=(1, 60))
    found = over_seeds_and_prompts(ratio, means(values))
    wider = 2.001 / 1.960  # Student's t of 59 degrees of freedom over the normal
    ends = values.mean() + (plain_bootstrap(values, draws) - values.mean()) * wider
    assert [found.low, found.high] == pytest.approx(ends.tolist(), abs=0.02)


def test_seeds_that_do_not_differ_widen_nothing():
    draws = np.random.default_rng(0)
    one = draws.normal(size=(1, 60))
    single, many = over_seeds_and_prompts(ratio, means(one)), over_seeds_and_prompts(ratio, means(np.repeat(one, 4, 0)))
    assert (single.value, single.low) == pytest.approx((many.value, many.low), abs=0.02)


def test_few_seeds_widen_a_bootstrap_that_is_too_narrow():
    draws = np.random.default_rng(2)
    values = draws.normal(size=(3, 200)) + draws.normal(size=(3, 1))
    low, high = plain_bootstrap(values, draws)
    found = over_seeds_and_prompts(ratio, means(values))
    # Nearly all variance is of seeds: sqrt(3 / 2), and t of 2 degrees of freedom over the normal, 4.303 / 1.960.
    assert 2.0 < (found.high - found.low) / (high - low) < 2.75


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("size", [1e-120, 1e-154, 1e-200, 1e-300])
def test_figures_that_are_nearly_0(seeds, size):
    """As a BLEU without smoothing is, of answers that share next to nothing: variances squared are 0 in float64."""
    values = np.random.default_rng(3).normal(1, 0.2, size=(seeds, 16))
    whole = over_seeds_and_prompts(ratio, means(values))
    found = over_seeds_and_prompts(ratio, means(values * size))
    assert found.value == pytest.approx(whole.value * size, rel=1e-9)
    assert found.low <= found.value <= found.high
    if size == 1e-120:
        assert (found.low, found.high) == pytest.approx((whole.low * size, whole.high * size), rel=1e-9)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_few_seeds_hold_the_truth(seeds, monkeypatch):
    monkeypatch.setattr(spread, "RESAMPLES", 200)
    draws = np.random.default_rng(1)
    hits = 0
    for _ in range(80):
        shared = draws.normal(size=(1, 40))
        sides = [shared + draws.normal(size=(seeds, 40)) + 0.3 * draws.normal(size=(seeds, 1)) for _ in range(2)]
        found = paired_difference(ratio, means(sides[0]), means(sides[1]))
        hits += found.low <= 0 <= found.high
    assert hits / 80 >= 0.9  # 0.81 without widening, at three seeds


@pytest.mark.parametrize(("least", "most"), [(0, 1), (0, 100), (-1, 1), (0, math.inf), (-math.inf, math.inf)])
def test_ends_stop_at_what_a_figure_can_be(least, most):
    top, bottom = min(most, 5.0), max(least, -5.0)
    far = means([[top] * 4, [bottom] * 4, [top, bottom, top, bottom]])
    free, found = over_seeds_and_prompts(ratio, far), over_seeds_and_prompts(ratio, far, least=least, most=most)
    assert free.low < bottom < top < free.high
    assert (found.value, found.low, found.high) == (free.value, max(free.low, least), min(free.high, most))
    change = paired_difference(ratio, far, far[::-1], least=least, most=most)
    free = paired_difference(ratio, far, far[::-1])
    assert (change.low, change.high) == (max(free.low, least - most), min(free.high, most - least))


def test_every_figure_that_has_a_range_says_it():
    found = {name: (figure.least, figure.most) for name, figure in FIGURES.items()}
    shares = dict.fromkeys(("distinct_2", "accuracy", "kept_accuracy", "kept_share"), (0, 1))
    percent = dict.fromkeys(("bleu", "corpus_bleu", "empty", "unfinished"), (0, 100))
    signed = dict.fromkeys(("tau", "prompt_tau"), (-1, 1))
    assert found == {**shares, **percent, **signed, "words": (0, math.inf), "nll": (0, math.inf)}
    assert (figure_named("reward: rm").least, figure_named("reward: rm").most) == (0, 100)
    assert figure_named("raw reward: rm").least == -math.inf


def test_a_prompt_without_a_value_on_one_side_counts_on_neither():
    ours, theirs = means([[1.0, 2.0, 9.0, 3.0]]), means([[1.0, 2.0, np.nan, 3.0]])
    assert paired_difference(ratio, ours, theirs).value == 0.0


def test_pairing_takes_out_what_both_share():
    draws = np.random.default_rng(1)
    shared = 10 * draws.normal(size=(3, 40))
    found = paired_difference(ratio, means(shared + 0.5 + 0.01 * draws.normal(size=(3, 40))), means(shared))
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert 0.48 < found.low < found.value < found.high < 0.52
    assert found.seeds == pytest.approx((0.5, 0.5, 0.5), abs=0.01)
    with pytest.raises(ValueError, match="expected the same seeds and prompts"):
        paired_difference(ratio, means(shared), means(shared[:2]))


def evaluation(bleu, correct, ordered, subsets=("a", "a", "b"), prompts=("x", "y", "z")) -> Evaluation:
    values = {"bleu": bleu, "correct": correct, "ordered": ordered}
    return Evaluation(list(prompts), list(subsets), ["r"] * 3, values)


BOTH = [
    evaluation([10.0, 20.0, 60.0], [1.0, 0.0, 3.0], [1.0, 1.0, 3.0]),
    evaluation([10.0, 40.0, 60.0], [1.0, 1.0, 0.0], [1.0, 1.0, 3.0]),
]


def test_the_total_is_over_prompts_not_over_subsets():
    found = spreads(BOTH)
    assert list(found) == ["a", "b", "Total"]
    assert found["a"]["bleu"]["value"] == pytest.approx(20.0)
    assert found["b"]["bleu"]["value"] == pytest.approx(60.0)
    assert found["Total"]["bleu"]["value"] == pytest.approx(200 / 6)
    assert found["Total"]["accuracy"]["value"] == pytest.approx(6 / 10)
    assert found["Total"]["accuracy"]["seeds"] == pytest.approx([4 / 5, 2 / 5])


def test_what_one_seed_lacks_is_no_figure():
    bare = evaluation([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    del bare.values["bleu"]
    assert spreads([BOTH[0], bare])["Total"].keys() == {"accuracy"}
    assert spreads([bare])["Total"]["accuracy"] == {"value": None, "low": None, "high": None, "seeds": [None]}


def test_a_difference_is_of_the_same_prompts_and_seeds():
    with pytest.raises(ValueError, match="expected the same prompts and seeds"):
        difference([BOTH[0]], [evaluation([1.0] * 3, [1.0] * 3, [1.0] * 3, prompts=("x", "y", "w"))])
    found = difference(BOTH, BOTH[::-1])["bleu"]
    assert found.value == 0.0
    assert found.seeds == pytest.approx((-20 / 3, 20 / 3))


ROWS = [
    {"length": "2", "method": "b", "label": "base | model", "seeds": [], "figures": spreads(BOTH[:1])},
    {
        **{"length": "2", "method": "clha", "label": "CLHA", "seeds": [1, 2], "learning_rate": 1e-5},
        **{"kept_share": 0.51, "gate_share": 1.0, "scored_tokens": 12345.0, "figures": spreads(BOTH)},
    },
    {"length": "3", "method": "pro", "label": "PRO", "error": "seed 1: out of memory"},
]


def cells_of(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as cells."""
    tables = [part.splitlines() for part in text.strip().split("\n\n")]
    return [[[cell.strip() for cell in line.strip("|").replace("\\|", "!").split("|")] for line in t] for t in tables]


def test_markdown_has_the_shape_of_the_papers_table():
    first, second = cells_of(markdown(ROWS, ["a", "b"]))
    title = figure_named("bleu").title
    assert first[0] == ["n", "method", f"a: {title}", f"b: {title}", f"Total: {title}"]
    assert {len(line) for line in first} == {5}
    assert first[2][:2] == ["2", "base ! model"]
    assert first[2][3] == "60.00"  # one prompt: no interval
    assert first[4][2:] == ["-", "-", "-"]
    assert {len(line) for line in second} == {len(second[0])}
    row = dict(zip(second[0], second[3], strict=True))
    assert row["kept in training"] == "51%"
    assert row["scored tokens"] == "12,345"
    assert row["seeds"] == "2"


def test_a_reward_models_column_stands_beside_bleu_and_is_missing_where_there_is_none():
    named = [{**ROWS[1], "figures": {"Total": {**ROWS[1]["figures"]["Total"], "reward: evaluation": None}}}]
    named[0]["figures"]["Total"]["reward: evaluation"] = ROWS[1]["figures"]["Total"]["bleu"]
    first = cells_of(markdown([*named, ROWS[0]], []))[0]
    assert first[0][2:] == [f"Total: {figure_named(name).title}" for name in ("bleu", "reward: evaluation")]
    assert first[3][3] == "-"


def test_a_subset_called_total_stands_beside_the_total():
    found = spreads([evaluation([10.0, 20.0, 60.0], [1.0] * 3, [1.0] * 3, subsets=("Total", "", ""))])
    assert [found[name]["bleu"]["value"] for name in ("Total (subset)", "", "Total")] == pytest.approx([10, 40, 30])
    row = {**ROWS[0], "figures": found}
    header, _, cells = cells_of(markdown([row], ["Total (subset)", ""]))[0]
    title = figure_named("bleu").title
    assert header[2:] == [f"{name}: {title}" for name in ("Total (subset)", "(no subset)", "Total")]
    assert [cell.split(" ")[0] for cell in cells[2:]] == ["10.00", "40.00", "30.00"]


def test_csv_has_a_line_a_figure():
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    found = {(line["method"], line["subset"], line["figure"]): line for line in lines}
    assert float(found["clha", "Total", "bleu"]["value"]) == pytest.approx(200 / 6)
    assert len(found["clha", "a", "bleu"]["seeds"].split()) == 2
    assert not [line for line in lines if line["method"] == "pro"]


def test_rows_of_one_method_are_told_by_their_corruption():
    """In the CSV and in Markdown: no two lines have the same key."""
    kinds = [None, {"kind": "flips", "rate": 0.1}, {"kind": "flips", "rate": 0.3}, {"kind": "rewards", "rate": 0.3}]
    rows = [{**ROWS[1], "corruption": kind} for kind in kinds]
    lines = list(csv.DictReader(io.StringIO(as_csv([*rows, ROWS[0]]))))
    keys = [(line["method"], line["corruption"], line["rate"], line["subset"], line["figure"]) for line in lines]
    assert len(set(keys)) == len(keys)
    found = dict.fromkeys((line["corruption"], float(line["rate"])) for line in lines)
    assert list(found) == [("", 0.0), ("flips", 0.1), ("flips", 0.3), ("rewards", 0.3)]
    names = [line[1] for line in cells_of(markdown(rows, []))[0][2:]]
    assert names == ["CLHA", "CLHA, flips 0.1", "CLHA, flips 0.3", "CLHA, reward noise, sd 0.3"]


def test_differences_are_bold_where_0_lies_outside():
    clear = {"value": 0.2, "low": 0.1, "high": 0.3, "seeds": [0.2]}
    vague = {"value": 0.2, "low": -0.1, "high": 0.3, "seeds": [0.2]}
    rows = [
        {"length": "2", "label": "abs", "corruption": None, "seeds": [1], "differences": {"accuracy": clear}},
        {
            **{"length": "2", "label": "abs", "corruption": {"kind": "flips", "rate": 0.3}, "seeds": [1]},
            "differences": {"accuracy": vague},
        },
    ]
    table, text = cells_of(differences_markdown(rows, "none", ["accuracy", "bleu"]))
    assert table[0] == ["n", "training data", "less none", figure_named("accuracy").title]
    assert table[2] == ["2", "clean", "abs", "**0.2000 [0.1000, 0.3000]**"]
    assert table[3] == ["2", "flips 0.3", "abs", "0.2000 [-0.1000, 0.3000]"]
    assert text[0][0].startswith("1 seed: 95% intervals over prompts alone")
