"""The recipe for Lightning in docs/integrations.md, run as it is written, against a bare loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes import assert_same, bare_loop, run


@pytest.mark.filterwarnings("ignore")
def test_two_steps_are_those_of_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    names = run("lightning", tmp_path)
    assert names["trainer"].global_step == 2
    assert names["module"].model.training
    assert_same(names["module"].model, bare_loop(tmp_path))
