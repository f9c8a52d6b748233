"""The recipe for LLaMA-Factory in docs/integrations.md, run as it is written, against a bare loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes import assert_same, bare_loop, run


@pytest.mark.filterwarnings("ignore")
def test_two_steps_are_those_of_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed")
    monkeypatch.chdir(tmp_path)
    names = run("llamafactory", tmp_path)
    assert names["trainer"].state.global_step == 2
    # Its optimiser is torch's fused one, which rounds otherwise in the last place.
    assert_same(names["model"], bare_loop(tmp_path, weight_decay=0.0), atol=3e-7)
