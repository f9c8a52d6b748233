"""The page shows the figures that are kept, and the demo has the settings that were chosen."""

from __future__ import annotations

import json

import pytest

from benchmarks.demo import GRID, MARKS, PAGE, RESULT, SEEDS, choice, page
from clha_fast.cli.demo import SECOND


def test_the_page_shows_what_is_kept() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    begin, end = MARKS
    assert PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip() == page(found).strip()
    assert list(found["held_out"]) == list(map(str, SEEDS))
    assert found["chosen"] == choice(found["settings"])
    assert {name: SECOND[name] for name in GRID[found["chosen"]]} == GRID[found["chosen"]]


def test_the_most_pairs_right_of_those_that_stay_fluent() -> None:
    def row(accuracy: float, better: float) -> dict[str, dict[str, float]]:
        return {"before": {"accuracy": 0.4, "better": -5.5}, "after": {"accuracy": accuracy, "better": better}}

    rows = {"loud": row(0.9, -9.0), "right": row(0.7, -6.4), "shy": row(0.5, -5.4)}
    assert choice(rows) == "right"
    with pytest.raises(ValueError, match="no setting"):
        choice({"loud": rows["loud"]})
