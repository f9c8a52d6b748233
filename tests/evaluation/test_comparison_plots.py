"""Pictures of a comparison: the lines and names in them, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from clha_fast.evaluation.comparison_plots import bars_picture, curves_picture, figure_bars, training_curves

pytest.importorskip("matplotlib", reason="matplotlib is not installed (the plot extra)")
MARGINS, ACCURACY, LIKELIHOOD, NOISE = range(4)


def log(*kept: float | None, **more: Any) -> list[dict[str, Any]]:
    """Lines of steps in which such shares of the pairs were kept."""
    lines = [{"step": step, "loss": 1.0, "kept_pair_share": share, **more} for step, share in enumerate(kept)]
    return [*lines, {"step": len(kept), "train_runtime": 1.0}]


def noise_of(picture: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in picture.axes[NOISE].lines}


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [((0.0, 0.5, 1.0), [1.0, 0.5, 0.0]), ((0.0, 0.0), [1.0, 1.0]), ((None, 0.25), [0.75]), ((1.0,), [0.0])],
)
def test_steps_on_which_all_pairs_are_noise_are_drawn(kept, dropped):
    assert noise_of(curves_picture({"a": log(*kept), "sft": log(0.0, 0.0)}, ["a"])) == {"a": dropped}


def test_what_ranks_is_told_by_its_log_where_nobody_says_it():
    found = noise_of(curves_picture({"a": log(0.0, 0.5), "sft": log(0.0, 0.0), "b": log(None)}))
    assert found == {"a": [1.0, 0.5]}


def test_the_legend_names_a_method_that_has_a_line_in_any_panel():
    logs = {
        "no pair kept": log(0.0),
        "margins": log(None, **{"rewards/margins": 0.5}),
        "likelihood": log(None, **{"logps/chosen": -2.0}),
        "nothing": log(None),
    }
    (legend,) = curves_picture(logs, ["no pair kept"]).legends
    assert [text.get_text() for text in legend.get_texts()] == ["no pair kept", "margins", "likelihood"]
    assert not curves_picture({"nothing": log(None)}).legends


@pytest.mark.parametrize("count", [1, 10, 11, 25])
def test_no_two_methods_have_one_colour(count):
    picture = curves_picture({f"m{number}": log(0.5, **{"rewards/margins": 1.0}) for number in range(count)})
    assert len({line.get_color() for line in picture.axes[MARGINS].lines}) == count
    assert [line.get_color() for line in picture.axes[MARGINS].lines] == [
        line.get_color() for line in picture.axes[NOISE].lines
    ]


def row(label: str, corruption: Any = None, length: str = "2") -> dict[str, Any]:
    figures = {"Total": {"nll": {"value": 1.0, "low": 0.5, "high": 1.5}}}
    return {"length": length, "label": label, "corruption": corruption, "figures": figures}


def test_bars_say_what_was_done_to_the_training_data(tmp_path):
    rows = [row("base"), row("CLHA"), row("CLHA", {"kind": "flips", "rate": 0.3})]
    rows += [row("CLHA", {"kind": "rewards", "rate": 1.0})]
    names = ["base", "CLHA", "CLHA, flips 0.3", "CLHA, reward noise, sd 1"]
    picture = bars_picture(rows, ["nll"])
    assert [text.get_text() for text in picture.axes[0].get_yticklabels()] == names
    both = bars_picture([*rows, row("base", length="3")], ["nll"])
    assert [text.get_text() for text in both.axes[0].get_yticklabels()][2] == "CLHA, flips 0.3, n = 2"
    assert bars_picture([{"label": "x", "error": "none"}], ["nll"]) is None
    figure_bars(rows, ["nll"], str(tmp_path / "bars.png"))
    training_curves({"a": log(0.5, 0.5)}, str(tmp_path / "curves.png"))
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}
