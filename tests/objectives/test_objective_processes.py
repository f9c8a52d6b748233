"""Every objective in two gloo processes with different numbers of prompts: the eager loss of the whole step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.objectives.test_objectives import NAMES
from tests.support import forked


@pytest.fixture(scope="module")
def distances(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    out: Path = tmp_path_factory.mktemp("objectives") / "found.json"
    done = forked.run("train", "tests.support.objective_processes", str(out), processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(NAMES, json.loads(out.read_text()), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(distances: dict[str, float], name: str) -> None:
    assert distances[name] < 1e-12
