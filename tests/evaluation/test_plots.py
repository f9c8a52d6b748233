"""The points that are drawn of a run, by hand, and the pictures."""

from __future__ import annotations

import re

from clha_fast.evaluation.plots import PANELS, curves_svg, series_of

LOG = [
    {"step": 0, "eval_loss": 5.0, "eval_kendall_tau": 0.1},
    {"step": 2, "loss": 4.0, "kendall_tau": 0.2},
    {"step": 2, "eval_loss": 3.5, "eval_kendall_tau": None},
    {"step": 4, "loss": 3.0},
    {"step": 4, "eval_loss": 2.5},
    {"step": 4, "train_runtime": 1.0},
]


def test_evaluations_along_the_way_and_at_both_ends() -> None:
    before, after = {"eval_loss": 5.0, "eval_kendall_tau": 0.1}, {"eval_loss": 2.5, "eval_kendall_tau": 0.4}
    loss = series_of(LOG, before, after, "loss")
    assert loss.training == [(2, 4.0), (4, 3.0)]
    assert loss.held_out == [(0, 5.0), (2, 3.5), (4, 2.5)]
    tau = series_of(LOG, before, after, "kendall_tau")
    assert tau.training == [(2, 0.2)]
    assert tau.held_out == [(0, 0.1), (4, 0.4)]
    assert series_of(LOG, before, {}, "loss").held_out == [(0, 5.0), (2, 3.5)], "an interrupted run"
    assert series_of([], {}, {}, "loss") == ([], [])


def test_the_weights_of_an_earlier_step_are_drawn_there() -> None:
    after = {"eval_loss": 3.4, "eval_step": 2}
    assert series_of(LOG, {"eval_loss": 5.0}, after, "loss").held_out == [(0, 5.0), (2, 3.4)]


def test_the_picture_names_every_panel_and_is_the_same_twice() -> None:
    svg = curves_svg(LOG, {"eval_loss": 5.0}, {"eval_loss": 2.5})
    assert svg == curves_svg(LOG, {"eval_loss": 5.0}, {"eval_loss": 2.5})
    assert svg.startswith("<svg")
    for panel in PANELS:
        assert panel.title in svg
    assert svg.count("no figures") == 4, "accuracy, margin, log-probability, terms"
    assert "no figures" in curves_svg([], {}, {})


def test_one_training_point_is_seen() -> None:
    alone, two = (
        curves_svg([{"step": step, "loss": 1.0} for step in steps], {}, {}, PANELS[:1]) for steps in ((4,), (2, 4))
    )
    markers = [len(set(re.findall(r'<path id="(\w+)"', svg))) for svg in (alone, two)]
    assert markers[0] == markers[1] + 1, "a line through one point has no length; the ticks' marks are in both"
