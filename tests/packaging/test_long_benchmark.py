"""The benchmark of layouts beside TRL's DPO: one loss, and a page that says what was not measured."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import long_trl
from benchmarks.long import RESULT, main, peak_alive, seconds, small_llama, table, texts


def row(prompt: int, way: str, time: float, memory: float) -> dict[str, object]:
    return {
        "prompt": prompt,
        "way": way,
        "seconds": 2.0,
        "bytes": 3e6,
        "time_over_trl": time,
        "memory_over_trl": memory,
    }


def test_the_table_beside_trl() -> None:
    rows = [row(32, "trl", 1, 1), row(32, "padded", 0.5, 0.25), row(32, "shared", 0.4, 0.2)]
    assert long_trl.table(rows).splitlines()[-1] == "| 32 | 2.00, 3 | 0.50 x, 0.25 x | 0.40 x, 0.20 x |"
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    bare = {name: value for name, value in result.items() if not name.startswith("trl")}
    assert table(bare).endswith("Beside TRL's DPO at n = 2: not measured (`python -m benchmarks.long --trl`).")
    told = table(bare | {"trl": rows, "trl_about": "about it"})
    assert long_trl.table(rows) in told
    assert told.endswith("about it")


def test_the_same_loss() -> None:
    pytest.importorskip("trl")
    pairs = {12: texts(2, 12, seed=1)[0]}
    found = {r["way"]: r for r in long_trl.run(small_llama(), "cpu", 1, pairs, seconds, peak_alive)}
    assert tuple(found) == long_trl.WAYS
    assert 0.01 < found["trl"]["loss"] < 10
    for way in ("padded", "shared"):
        assert found[way]["loss"] == pytest.approx(found["trl"]["loss"], rel=1e-5)
        assert found[way]["bytes"] > 0


@pytest.mark.skipif(long_trl.installed(), reason="trl is installed")
def test_without_trl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.long", "--trl"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = "--trl: expected trl and datasets, not installed (pip install trl==1.16.0)"
    assert said in capsys.readouterr().err
