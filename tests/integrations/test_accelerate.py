"""The recipe for accelerate in docs/integrations.md, run as it is written, against a bare loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes import assert_same, bare_loop, run


def test_two_steps_are_those_of_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("accelerate", tmp_path)
    assert names["model"].training
    assert_same(names["accelerator"].unwrap_model(names["model"]), bare_loop(tmp_path))
