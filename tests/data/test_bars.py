"""A bar while many records are read: on a terminal, from the number on from which tokenising shows one."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data import convert, read_records
from clha_fast.data.bars import LARGE
from clha_fast.data.prompts import read_prompts
from clha_fast.generation.answers import read_answers

RANKED = {"prompt": "p", "completions": ["a", "b"]}
READ: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "records": (read_records, RANKED),
    "rewards beside an unread column": (read_records, {**RANKED, "rewards": [2, 1], "note": "n"}),
    "conversion": (lambda path: convert(path, path.parent / "out.jsonl"), RANKED),
    "prompts": (read_prompts, {"prompt": "p"}),
    "prompts with responses": (read_prompts, RANKED),
    "answers": (read_answers, {"prompt": "p", "answer": "a"}),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", READ)
def test_many_records_show_a_bar(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, row = READ[kind]
    said = {}
    for case, count, stream in (
        ("few", LARGE, Terminal()),
        ("many", LARGE + 1, Terminal()),
        ("piped", LARGE + 1, io.StringIO()),
        ("another's", LARGE + 1, Terminal()),
    ):
        path = tmp_path / case / "in.jsonl"
        path.parent.mkdir()
        path.write_text((json.dumps(row) + "\n") * count)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("LOCAL_RANK", "1" if case == "another's" else "0")
        read(path)
        said[case] = stream.getvalue()
    assert said["many"].count("Reading: ") >= 1
    assert f"{LARGE + 1} records" in said["many"]
    assert said["many"].endswith("\n")
    assert [said[case] for case in ("few", "piped", "another's")] == ["", "", ""]


def test_an_error_stands_behind_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps(RANKED) + "\n") * (LARGE + 5) + "{")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match=f"in.jsonl:{LARGE + 6}: "):
        read_records(path)
    assert sys.stderr.getvalue().endswith("\n")  # type: ignore[attr-defined]
