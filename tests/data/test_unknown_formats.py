"""Files and rows of no known format: what the error names, and bad records in front of good ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clha_fast.data import RecordError, read_records

ONE = {"prompt": "a", "completions": ["b", "c"]}


@pytest.mark.parametrize(
    ("value", "under"),
    [
        ({"items": [ONE]}, "items"),
        ({"version": 1, "items": [ONE]}, "items"),
        ({"train": [ONE], "test": [ONE], "note": "x"}, "train, test"),
        ({"data": [ONE], "rows": [ONE]}, "data, rows"),
        ({"data": {"rows": [ONE]}}, "data, and in a list"),
        ({"version": "2", "data": {"id-1": ONE, "id-2": ONE}}, "data, and in a list"),
        ({"version": "2", "data": {"rows": [ONE]}}, "data, and in a list"),
        ({f"id-{k}": ONE for k in range(9)}, "id-0, id-1, id-2, ..., and in a list"),
        ({"license": "x", "items": ["a"]}, None),
        ({"text": "x"}, None),
    ],
)
def test_rows_under_an_unknown_name(tmp_path: Path, value: object, under: str | None) -> None:
    path = tmp_path / "rows.json"
    for indent in (None, 1):
        path.write_text(json.dumps(value, indent=indent))
        with pytest.raises(RecordError, match="unknown format, its fields are: ") as caught:
            list(read_records(path))
        said = ". Rows in one JSON object lie under data, rows, records, examples, instances, not under "
        assert str(caught.value).partition(said)[2] == (under or "")
    with pytest.raises(RecordError) as row:
        read_records([value])
    assert "Rows in one" not in str(row.value), "a row of somebody's own is no file"


def test_an_error_does_not_repeat_a_file_s_every_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({f"id-{k}": ONE for k in range(500)}))
    with pytest.raises(RecordError, match=r", \.\.\. \(1,000 in all\)\. ") as caught:
        read_records(path)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("bad", [{"prompt": "q", "chosen": "a", "rejected": None}, {"meta": 1}, {"prompt": "q"}])
@pytest.mark.parametrize("count", [1, 3, 99])
def test_the_first_record_with_a_format_decides_where_bad_ones_are_left_out(bad: dict[str, object], count: int) -> None:
    rows = [*[bad] * count, {"prompt": "q", "chosen": "a", "rejected": "b"}, {**bad, "more": 1}]
    with pytest.raises(RecordError, match=r"^record 0: unknown format, its fields are: "):
        read_records(rows)
    errors: list[RecordError] = []
    (record,) = read_records(rows, errors=errors)
    assert record.completions == ("a", "b")
    places = [*range(count), count + 1]
    assert [str(error).partition(":")[0] for error in errors] == [f"record {place}" for place in places]
    with pytest.raises(RecordError, match=r"^record 0: unknown format, its fields are: "):
        read_records([bad] * 100 + rows, errors=[])
    with pytest.raises(RecordError, match=r"^record 0: unknown format, its fields are: "):
        read_records([bad] * count, errors=[])


def test_an_empty_column_is_called_empty() -> None:
    with pytest.raises(RecordError, match=r"its fields are: chosen, prompt, rejected \(empty\)\. Say"):
        read_records([{"prompt": "q", "chosen": "a", "rejected": None}])
