"""What a record knows of its responses beside rewards: checked, and in its response's place whatever the order."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data import RankedRecord, RecordError, convert, make_record, read_records

SIGNALS = {
    "reference_logps": [-1.5, -20.25, -3.0],
    "reference_tokens": [7, 4294967295, 0],
    "advantages": [1, 0.5, -2.0],
}
ROW = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1.0, 3.0, 2.0], **SIGNALS}


def test_they_follow_their_responses() -> None:
    plain = make_record("p", ["a", "b", "c"], signals=SIGNALS)
    assert plain.signals == {name: tuple(values) for name, values in SIGNALS.items()}
    by_rank = make_record("p", ["a", "b", "c"], ranks=[3, 1, 2], signals=SIGNALS)
    by_reward = make_record("p", ["a", "b", "c"], rewards=[1.0, 3.0, 2.0], rank_by_reward=True, signals=SIGNALS)
    for record in (by_rank, by_reward, plain.in_order([1, 2, 0])):
        assert record.completions == ("b", "c", "a")
        assert record.signals["reference_logps"] == (-20.25, -3.0, -1.5)
        assert record.signals["reference_tokens"] == (4294967295, 0, 7)
        assert record.signals["advantages"] == (0.5, -2.0, 1.0)


def test_the_order_takes_all_along() -> None:
    tools = {"tools": [{"name": "t"}]}
    prompt = [{"role": "user", "content": "q"}]
    record = RankedRecord(prompt, ("a", "b"), (1.0, 2.0), 1, "f:1", tools, {"advantages": (0.0, 1.0)})
    other = record.in_order([1, 0])
    assert (other.completions, other.rewards, other.sft_index) == (("b", "a"), (2.0, 1.0), 0)
    assert (other.template, other.source, other.signals) == (tools, "f:1", {"advantages": (1.0, 0.0)})


def test_rows_files_and_back(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(ROW) + "\n" + json.dumps({"prompt": "q", "completions": ["d"]}) + "\n")
    first, second = read_records(source)
    assert first.as_dict() == ROW
    assert "reference_logps" not in second.as_dict()
    convert(source, tmp_path / "out.jsonl")
    assert read_records(tmp_path / "out.jsonl") == [first, second]
    (ranked,) = read_records([ROW], rank_by_reward=True)
    assert ranked.signals["advantages"] == (0.5, -2.0, 1.0)


def test_tables_and_mappings(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([ROW, {"prompt": "q", "completions": ["d"]}])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    plain, bare = read_records(tmp_path / "rows.parquet")
    assert plain.as_dict() == ROW
    assert bare.signals == {}
    (tmp_path / "rows.csv").write_text('prompt,completions,reference_logps\np,"[""a"", ""b""]","[-1.5, -2]"\n')
    assert read_records(tmp_path / "rows.csv")[0].signals == {"reference_logps": (-1.5, -2.0)}
    wide = [{"q": "p", "x": "a", "y": "b", "lx": -1.0, "ly": -2.0}]
    columns: dict[str, Any] = {"prompt": "q", "completions": ["x", "y"], "reference_logps": ["lx", "ly"]}
    assert read_records(wide, columns=columns)[0].signals == {"reference_logps": (-1.0, -2.0)}
    rows = [{"p": "p", "r": text, "adv": number} for text, number in (("a", 1.0), ("b", -1.0))]
    columns = {"prompt": "p", "completions": "r", "advantages": "adv", "group_by": "p"}
    assert read_records(rows, columns=columns)[0].signals == {"advantages": (1.0, -1.0)}
    pair = [{"prompt": "p", "chosen": "a", "rejected": "b", "l": [-1.0, -2.0]}]
    with pytest.raises(RecordError, match=r"columns\.reference_logps: expected a field that this format reads"):
        read_records(pair, columns={"reference_logps": "l"})


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"advantages": [1.0, 2.0]}, "^f:3: advantages: expected 3 numbers, one a completion, got 2$"),
        (
            {"advantages": [1.0, 2.0, math.nan]},
            r"^f:3: advantages\[2\]: expected a finite number .*, got nan$",
        ),
        ({"reference_logps": [-1.0, "x", 0]}, r"^f:3: reference_logps\[1\]: expected a number, got 'x'$"),
        ({"reference_logps": -1.0}, "^f:3: reference_logps: expected a list of numbers, got -1.0$"),
        ({"advantages": [1e39, 0, 0]}, r"^f:3: advantages\[0\]: expected a finite number \(float32\), got 1e\+39$"),
        ({"old_logps": [1.0, 2.0, 3.0]}, "^f:3: signals: expected names among reference_logps, .*, got 'old_logps'$"),
        ({"reference_tokens": [1, 2, 3]}, "^f:3: reference_tokens: expected reference_logps beside it, got None$"),
        (
            {"reference_logps": [0, 0, 0], "reference_tokens": [1, 2.5, 3]},
            r"^f:3: reference_tokens: expected whole numbers, got \(1.0, 2.5, 3.0\)$",
        ),
        ([1.0], r"^f:3: signals: expected a mapping with some of reference_logps, .*, got \[1.0\]$"),
    ],
)
def test_signals_that_are_refused(signals: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        make_record("p", ["a", "b", "c"], signals=signals, source="f:3")
