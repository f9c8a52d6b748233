"""The benchmark of objectives ends with a line for each, on a batch that is small."""

from __future__ import annotations

import sys

import pytest

from benchmarks import objectives
from benchmarks.inputs import shrink


def test_a_line_for_each_objective(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"small-vocabulary": shrink(objectives.WORKLOADS["small-vocabulary"], 64)}
    monkeypatch.setattr(objectives, "WORKLOADS", small)
    monkeypatch.setattr(sys, "argv", ["objectives", "--rounds", "5"])
    objectives.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "objective_ms" in line]
    assert [line.partition("  ")[0].strip() for line in lines] == list(objectives.OBJECTIVES)
    assert all("over_clha 1.000" in line for line in lines[:1])
    assert all("over_clha_quartiles [" in line for line in lines)
