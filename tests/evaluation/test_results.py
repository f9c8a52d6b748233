"""Figures over seeds and prompts: means and differences by hand, intervals against a plain loop, tables."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from clha_fast.evaluation.results import (
    FIGURES,
    as_csv,
    difference,
    differences_markdown,
    figures_of,
    markdown,
    matrices,
)
from clha_fast.evaluation.spread import over_seeds_and_prompts, paired_difference

pytest.importorskip("scipy", reason="scipy is not installed (the eval extra)")


def test_the_mean_and_each_seed_by_hand():
    found = over_seeds_and_prompts(np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]))
    assert found.mean == 4.0
    assert found.seeds == (2.0, 6.0)
    assert 1.0 <= found.low < 4.0 < found.high <= 7.0


def test_a_ratio_weighs_prompts_by_their_denominators():
    found = over_seeds_and_prompts(np.array([[3.0, 0.0]]), np.array([[3.0, 1.0]]))
    assert found.mean == 0.75


def test_a_prompt_without_a_value_counts_in_neither():
    found = over_seeds_and_prompts(np.array([[1.0, np.nan, 3.0]]), np.array([[1.0, 5.0, 1.0]]))
    assert found.mean == 2.0


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 0)])
def test_one_prompt_has_no_interval(shape):
    found = over_seeds_and_prompts(np.ones(shape))
    assert (found.low, found.high) == (None, None)
    assert found.mean == (1.0 if shape[1] else None)


def test_equal_values_have_an_interval_of_width_0():
    found = over_seeds_and_prompts(np.full((2, 5), 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_the_interval_is_that_of_a_plain_two_way_bootstrap():
    draws = np.random.default_rng(0)
    values = draws.normal(size=(5, 60)) + draws.normal(size=(5, 1)) + draws.normal(size=(1, 60))
    means = []
    for _ in range(4000):
        seeds, prompts = draws.integers(0, 5, 5), draws.integers(0, 60, 60)
        means.append(values[np.ix_(seeds, prompts)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    found = over_seeds_and_prompts(values)
    assert found.low == pytest.approx(low, abs=0.06)
    assert found.high == pytest.approx(high, abs=0.06)


def test_pairing_takes_out_what_both_share():
    draws = np.random.default_rng(1)
    shared = 10 * draws.normal(size=(3, 40))
    ours, theirs, ones = shared + 0.5 + 0.01 * draws.normal(size=(3, 40)), shared, np.ones((3, 40))
    found = paired_difference((ours, ones), (theirs, ones))
    assert found.mean == pytest.approx(0.5, abs=0.01)
    assert 0.48 < found.low < found.mean < found.high < 0.52
    assert found.seeds == pytest.approx((0.5, 0.5, 0.5), abs=0.01)


def assessment(bleu, correct, ordered, subsets=("a", "a", "b"), **more):
    values = {"bleu": bleu, "correct": correct, "ordered": ordered}
    return {"prompts": ["x", "y", "z"], "subsets": list(subsets), "values": values, **more}


BOTH = [
    assessment([10.0, 20.0, 60.0], [1, 0, 3], [1, 1, 3], corpus={"Total": {"corpus_bleu": 4.0}}),
    assessment([10.0, 40.0, 60.0], [1, 1, 0], [1, 1, 3], corpus={"Total": {"corpus_bleu": 6.0}}),
]


def test_the_total_is_over_prompts_not_over_subsets():
    found = figures_of(BOTH, ["a", "b"])
    assert found["a"]["bleu"]["mean"] == pytest.approx(20.0)
    assert found["b"]["bleu"]["mean"] == pytest.approx(60.0)
    assert found["Total"]["bleu"]["mean"] == pytest.approx(200 / 6)
    assert found["Total"]["accuracy"]["mean"] == pytest.approx(6 / 10)
    assert found["Total"]["accuracy"]["seeds"] == pytest.approx([4 / 5, 2 / 5])
    assert found["Total"]["corpus_bleu"]["mean"] == 5.0
    assert "reward" not in found["Total"]


def test_what_one_seed_lacks_is_no_figure():
    bare = assessment([1.0, 1.0, 1.0], [0, 0, 0], [0, 0, 0])
    del bare["values"]["bleu"]
    assert matrices([BOTH[0], bare], FIGURES["bleu"]) is None
    assert figures_of([BOTH[0], bare], [])["Total"].keys() == {"accuracy", "corpus_bleu"}


def test_a_difference_needs_the_same_prompts():
    other = {**BOTH[0], "prompts": ["x", "y", "w"]}
    with pytest.raises(ValueError, match="expected the same prompts and seeds"):
        difference([BOTH[0]], [other], "bleu")
    found = difference(BOTH, BOTH[::-1], "bleu")
    assert found.mean == 0.0
    assert found.seeds == pytest.approx((-20 / 3, 20 / 3))


ROWS = [
    {
        "length": "2",
        "method": "base",
        "label": "base | model",
        "seeds": [],
        "figures": figures_of(BOTH[:1], ["a", "b"]),
    },
    {
        **{"length": "2", "method": "clha", "label": "CLHA", "seeds": [1, 2], "learning_rate": 1e-5},
        **{"kept_share": 0.51, "gate_share": 1.0, "scored_tokens": 12345.0, "figures": figures_of(BOTH, ["a", "b"])},
    },
    {"length": "3", "method": "pro", "label": "PRO", "error": "seed 1: out of memory"},
]


def cells_of(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as cells."""
    tables = [part.splitlines() for part in text.strip().split("\n\n")]
    return [[[cell.strip() for cell in line.strip("|").replace("\\|", "!").split("|")] for line in t] for t in tables]


def test_markdown_has_the_shape_of_the_papers_table():
    first, second = cells_of(markdown(ROWS, ["a", "b"]))
    assert first[0] == ["n", "method", "a BLEU (published)", "b BLEU (published)", "Total BLEU (published)"]
    assert {len(line) for line in first} == {5}
    assert first[2][:2] == ["2", "base ! model"]
    assert first[2][3] == "60.0"  # one prompt: no interval
    assert first[4][2:] == ["-", "-", "-"]
    assert {len(line) for line in second} == {len(second[0])}
    row = dict(zip(second[0], second[3], strict=True))
    assert row["kept pairs"] == "51%"
    assert row["scored tokens"] == "12,345"
    assert row["seeds"] == "2"
    assert row["corpus BLEU"] == "5.00"


def test_csv_has_a_line_a_figure():
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    found = {(line["method"], line["subset"], line["figure"]): line for line in lines}
    assert float(found["clha", "Total", "bleu"]["mean"]) == pytest.approx(200 / 6)
    assert len(found["clha", "a", "bleu"]["seeds"].split()) == 2
    assert not [line for line in lines if line["method"] == "pro"]


def test_differences_are_bold_where_0_lies_outside():
    clear = {"mean": 0.2, "low": 0.1, "high": 0.3, "seeds": [0.2]}
    vague = {"mean": 0.2, "low": -0.1, "high": 0.3, "seeds": [0.2]}
    rows = [
        {"length": "2", "label": "abs", "corruption": None, "seeds": [1], "differences": {"accuracy": clear}},
        {
            **{"length": "2", "label": "abs", "corruption": {"kind": "flips", "rate": 0.3}, "seeds": [1]},
            "differences": {"accuracy": vague},
        },
    ]
    table, text = cells_of(differences_markdown(rows, "none", ["accuracy", "bleu"]))
    assert table[0] == ["n", "training data", "less none", FIGURES["accuracy"].title]
    assert table[2] == ["2", "clean", "abs", "**0.200 [0.100, 0.300]**"]
    assert table[3] == ["2", "flips 0.3", "abs", "0.200 [-0.100, 0.300]"]
    assert text[0][0].startswith("1 seeds")
