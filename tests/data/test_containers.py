"""The same records out of every kind of file and table, and one sentence for those that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.data import RankedRecord, RecordError, iter_records, read_records
from clha_fast.data.prompts import PromptRecord, read_prompts
from clha_fast.experiments.run import _data_hash
from clha_fast.files import file_hash
from tests.support.tiny import make_tokenizer

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why, \"so\"?\nTell.", "chosen": "NA", "rejected": "1.50", "chosen_score": 2.5, "rejected_score": -1.0},
    {"prompt": "Hów?", "chosen": "null", "rejected": "[1, 2]", "chosen_score": 1.0, "rejected_score": 0.0},
]  # fmt: skip
RECORDS = [
    RankedRecord(r["prompt"], (r["chosen"], r["rejected"]), (r["chosen_score"], r["rejected_score"])) for r in ROWS
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def frame() -> Any:
    return pandas.DataFrame(ROWS)


def parquet(path: Path) -> None:
    frame().to_parquet(path)


FILES: dict[str, Any] = {
    "rows.csv": lambda path: frame().to_csv(path, index=False),
    "index.csv": lambda path: frame().to_csv(path),
    "mark.CSV": lambda path: frame().to_csv(path, index=False, encoding="utf-8-sig"),
    "rows.tsv": lambda path: frame().to_csv(path, index=False, sep="\t"),
    "rows.csv.gz": lambda path: frame().to_csv(path, index=False, compression="gzip"),
    "rows.tsv.xz": lambda path: frame().to_csv(path, index=False, sep="\t", compression="xz"),
    "rows.parquet": parquet,
    "rows.pq": parquet,
    "rows.PARQUET": parquet,
    "no suffix, parquet": parquet,
    "rows.feather": lambda path: feather.write_feather(frame(), path),
    "no suffix, arrow": lambda path: feather.write_feather(frame(), path, compression="uncompressed"),
    "stream.arrow": lambda path: _stream(path),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.jsonl.GZ": lambda path: path.write_bytes(gzip.compress(LINES)),
    "packed": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "rows.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.zst": lambda path: _zstd(path, LINES),
    "around.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "pretty.json": lambda path: path.write_text(json.dumps({"rows": ROWS}, indent=2)),
    "folder": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "one split": lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path),
}


def _stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _zstd(path: Path, data: bytes) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    FILES[name](path)
    assert read_records(path) == RECORDS
    assert _data_hash(str(path)) == (file_hash(str(path)) if path.is_file() else _data_hash(str(path)))


TABLES: dict[str, Any] = {
    "columns": lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "arrays": lambda: {name: frame()[name].to_numpy() for name in ROWS[0]},
    "pandas": frame,
    "pyarrow": lambda: pyarrow.Table.from_pylist(ROWS),
    "one split": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
    "stream": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    assert read_records(TABLES[name]()) == RECORDS
    if name != "stream":
        assert len(RankedDataset(TABLES[name](), RankedCollator(make_tokenizer()))) == 2


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}', "1", "chosen"),
        ('{"prompt": "q", "prompt": "q", "completions": ["a", "b"]}', "1", "prompt"),
        ('{"prompt": [{"role": "user", "content": "a", "content": "b"}], "completions": ["a", "b"]}', "1", "content"),
        ('{"prompt": "q", "completions": ["a", "b"]}\n{"prompt": "q", "completions": ["a"], "completions": ["b"]}', "2",
         "completions"),
    ],
)  # fmt: skip
def test_a_name_given_twice_is_refused(tmp_path: Path, text: str, place: str, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text + "\n")
    said = f"rows.jsonl:{place}: {name}: the same name twice in one object, of which the last"
    with pytest.raises(RecordError, match=re.escape(said)):
        read_records(path)


@pytest.mark.parametrize("around", ["[%s]", '{"data": [%s]}', '{\n"data": [%s]}'])
def test_a_name_given_twice_is_of_one_row(tmp_path: Path, around: str) -> None:
    """The other rows of the list can be read, and the error says which one it is."""
    good = '{"prompt": "q", "completions": ["a", "b"]}'
    (tmp_path / "rows.json").write_text(around % f'{good},\n{{"prompt": "q", "tools": [{{"x": 1, "x": 2}}]}},\n{good}')
    errors: list[RecordError] = []
    assert len(list(iter_records(tmp_path / "rows.json", errors=errors))) == 2
    assert [str(error).partition("rows.json")[2][:12] for error in errors] == [": item 1: x:"]


def test_a_name_given_twice_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text('{"prompt": "q",\n"chosen": "a",\n"chosen": "b",\n"rejected": "c"}\n')
    with pytest.raises(RecordError, match=re.escape("row.json:1: chosen: the same name twice")):
        read_records(tmp_path / "row.json")


_SIDES = {"response_a": "a", "response_b": "b"}
_LABELLED: list[dict[str, Any]] = [  # of each the second response is the better one
    {"prompt": "q", **_SIDES, "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
    {"prompt": "q", **_SIDES, "winner_model_a": False, "winner_model_b": True, "winner_tie": False},
    {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
    {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 2},
    {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "1.0"},
    {"context": "q", "response1": "a", "response2": "b", "overall_preference": 3},
    {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1},
]


@pytest.mark.parametrize("row", _LABELLED, ids=lambda row: str(list(row)[-1]))
def test_labels_in_csv_cells(tmp_path: Path, row: dict[str, Any]) -> None:
    pandas.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    assert read_records(tmp_path / "a.csv") == [RankedRecord("q", ("b", "a"))]


def test_a_label_that_is_a_text_is_refused() -> None:
    with pytest.raises(RecordError, match="winner_model_a: expected 1 or 0, got '0'"):
        read_records([{"prompt": "q", **_SIDES, "winner_model_a": "0", "winner_model_b": ""}])


def test_answers_of_kto_in_csv_cells(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": text, "label": text == "b"} for text in "ab"]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    mapping = {"completions": "completion", "rewards": "label", "group_by": "prompt"}
    expected = [RankedRecord("q", ("b", "a"), (1.0, 0.0))]
    assert read_records(tmp_path / "a.csv", rank_by_reward=True, columns=mapping) == expected


@pytest.mark.parametrize(
    "answers",
    [
        ['["a", "b"]', "none"],
        ["none", "[1, 2]", "[x]"],
        ['["a", "b"]', '["c"]'],
        ["[1, 2, 3]", "[3, 2, 1]", "[]"],
        ["['a', 'b']"],
        ['{"a": 1}', "{'a': [2]}", "{}"],
        ['[{"a": 1}]', '[{"content": "x"}, 2]', "a"],
    ],
)
@pytest.mark.parametrize("name", ["answer", "answers", "completions", "scores"])
def test_a_response_may_look_like_a_list(tmp_path: Path, answers: list[str], name: str) -> None:
    """A row of a group is one response, whatever its column is called; elsewhere a list of texts is what it is."""
    rows = [{"q": "Two?", name: answer, "r": number} for number, answer in enumerate(answers)]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    mapping = {"prompt": "q", "completions": name, "rewards": "r", "group_by": "q"}
    rewards = tuple(map(float, range(len(answers))))
    assert read_records(tmp_path / "a.csv", columns=mapping) == [RankedRecord("Two?", tuple(answers), rewards)]
    for number, row in enumerate(rows):
        row["other"] = f"[{number}]"
    pandas.DataFrame(rows).to_csv(tmp_path / "b.csv", index=False)
    mapping = {"prompt": "q", "completions": [name, "other"], "group_by": "q"}
    texts = tuple(text for number, answer in enumerate(answers) for text in (answer, f"[{number}]"))
    assert read_records(tmp_path / "b.csv", columns=mapping) == [RankedRecord("Two?", texts)]


def test_messages_and_lists_of_rows_that_are_grouped(tmp_path: Path) -> None:
    rows = [{"q": "Two?", "a": json.dumps([{"role": "assistant", "content": text}])} for text in "xy"]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    mapping = {"prompt": "q", "completions": "a", "group_by": "q"}
    assert read_records(tmp_path / "a.csv", columns=mapping) == [RankedRecord("Two?", ("x", "y"))]
    lists = [{"q": "Two?", "a": ["x", "y"]}, {"q": "Two?", "a": ["z"]}]
    assert read_records(lists, columns=mapping) == [RankedRecord("Two?", ("x", "y", "z"))]


_COMMA = "; a number is written with a decimal point and no comma (0.5)"


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("prompt;chosen;rejected;score_chosen;score_rejected\nq;a;b;0,5;0,3\n", None, "score_chosen"),
        ("prompt;chosen;rejected;score_chosen;score_rejected\nq;a;b;1;-0,3\n", None, "score_rejected"),
        ("prompt;chosen;rejected;score_chosen;score_rejected\nq;a;b;1.234,5;7\n", None, "score_chosen"),
        ("question;answer_0;answer_1;score_0;score_1\nq;a;b;1;1,5e-3\n", None, "score_1"),
        (
            'prompt,r,s\nq,a,"0,5"\nq,b,"0,3"\n',
            {"completions": "r", "rewards": "s", "group_by": "prompt"},
            "rewards[0]",
        ),
        ('prompt,a,b,x,y\nq,a,b,"1,234.5",2\n', {"completions": ["a", "b"], "rewards": ["x", "y"]}, "rewards[0]"),
        ('prompt;completions;rewards\nq;["a", "b"];"[""0,5"", ""0,3""]"\n', None, "rewards[0]"),
        ('prompt;completions;advantages\nq;["a", "b"];0,5\n', None, "advantages"),
        ("prompt;response_1;response_2;preference_strength\nq;a;b;1,0\n", None, "preference_strength"),
    ],
)
def test_a_decimal_comma_is_said(tmp_path: Path, text: str, columns: dict[str, Any] | None, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_records(path, columns=columns)
    assert str(caught.value).startswith(f"{path}: row 0: {said}: expected a")
    assert str(caught.value).endswith(_COMMA)
    assert str(caught.value.advised("leave it out")).endswith(_COMMA), "all records are written so"


@pytest.mark.parametrize("text", ["8.0", "-3", " 1e-3", ".5"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ["a", "b"], "rewards": [1.0, "{}"]},
        {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 2], "reference_logps": ["{}", 2]},
        {"instruction": "q", "completions": [{"response": "a", "overall_score": "{}"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "{}", "score_rejected": 2},
    ],
)
def test_a_number_in_quotes_is_said(row: dict[str, Any], text: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_records([json.loads(json.dumps(row).replace("{}", text))])
    assert str(caught.value).endswith(f"got {text!r}; a number stands without quotes ({text.strip()})")


@pytest.mark.parametrize("cell", ["high", "", "0,5 of 1", ",", "1,2,3", "1, 2 and 3"])
def test_another_text_is_no_number_with_a_comma(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.csv").write_text(f"prompt;chosen;rejected;score_chosen;score_rejected\nq;a;b;{cell};1\n")
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / "a.csv")
    assert _COMMA not in str(caught.value)


@pytest.mark.parametrize("name", ["label", "choice", "labels"])
def test_texts_in_columns_named_as_labels(tmp_path: Path, name: str) -> None:
    """A cell is a number where it says which response is better, and a text where a field of texts is asked of it."""
    pandas.DataFrame([{name: "4", "a": "x", "b": "y"}]).to_csv(tmp_path / "a.csv", index=False)
    found = read_records(tmp_path / "a.csv", columns={"prompt": "a", "completions": [name, "b"]})
    assert found == [RankedRecord("x", ("4", "y"))]
    found = read_records(tmp_path / "a.csv", columns={"prompt": name, "completions": ["a", "b"], "subset": name})
    assert found == [RankedRecord("4", ("x", "y"), subset="4")]
    found = read_records(tmp_path / "a.csv", columns={"prompt": "a", "chosen": name, "rejected": "b"})
    assert found == [RankedRecord("x", ("4", "y"))]
    found = read_records(tmp_path / "a.csv", columns={"prompt": "a", "completions": name, "group_by": "a"})
    assert found == [RankedRecord("x", ("4",))]
    assert [record.prompt for record in read_prompts(tmp_path / "a.csv", columns={"prompt": name})] == ["4"]
    (prompt,) = read_prompts(tmp_path / "a.csv", columns={"prompt": "a"})
    assert isinstance(prompt, PromptRecord)
    assert prompt.extra[name] == "4"


def test_lists_in_csv_cells(tmp_path: Path) -> None:
    row = {"prompt": "q", "completions": json.dumps(["a", "[b]"]), "rewards": "[1, 2.5]"}
    pandas.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    assert read_records(tmp_path / "a.csv") == [RankedRecord("q", ("a", "[b]"), (1.0, 2.5))]
    pandas.DataFrame([{"q": "7", "out": '["a", "b"]', "x": 1, "y": "2e0"}]).to_csv(tmp_path / "b.csv", index=False)
    mapping = {"prompt": "q", "completions": "out", "rewards": ["x", "y"]}
    assert read_records(tmp_path / "b.csv", columns=mapping) == [RankedRecord("7", ("a", "b"), (1.0, 2.0))]
    talk = [{"role": "user", "content": "q"}]
    sides = {side: json.dumps([*talk, {"role": "assistant", "content": side}]) for side in ("chosen", "rejected")}
    pandas.DataFrame([sides]).to_csv(tmp_path / "c.csv", index=False)
    assert read_records(tmp_path / "c.csv") == [RankedRecord(tuple(talk), ("chosen", "rejected"))]


def test_lists_as_python_prints_them(tmp_path: Path) -> None:
    row = {"prompt": "q", "completions": ["it's", '"b"'], "rewards": [1.0, 0.5]}
    pandas.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    assert '["it\'s", \'"b"\']' in (tmp_path / "a.csv").read_text().replace('""', '"')
    assert read_records(tmp_path / "a.csv") == [RankedRecord("q", ("it's", '"b"'), (1.0, 0.5))]
    talk = [{"role": "user", "content": "q"}]
    sides = {side: [*talk, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pandas.DataFrame([sides]).to_csv(tmp_path / "b.csv", index=False)
    assert read_records(tmp_path / "b.csv") == [RankedRecord(tuple(talk), ("chosen", "rejected"))], "no texts"
    pandas.DataFrame([{"q": "[7] is it", "out": ["a", "b"]}]).to_csv(tmp_path / "c.csv", index=False)
    mapping = {"prompt": "q", "completions": "out"}
    assert read_records(tmp_path / "c.csv", columns=mapping) == [RankedRecord("[7] is it", ("a", "b"))]


def test_globs_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, row in enumerate(ROWS):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row))
    found = read_records("~/part-*.jsonl")
    assert found == RECORDS
    assert [record.source for record in found] == [f"{tmp_path}/part-{n}.jsonl:1" for n in range(2)]
    assert len(_data_hash("~/part-*.jsonl")) == 64
    assert read_records("~/part-1.jsonl") == RECORDS[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 is not all", "damaged parquet file"),
        ("b.PQ", b"", "damaged parquet file"),
        ("c.arrow", b"ARROW1 and no more", "damaged arrow file"),
        ("d.csv.gz", gzip.compress(b"prompt,chosen,rejected\na,b,c\n" * 90, mtime=0)[:-20], "damaged csv file"),
        ("e.csv", b'prompt,chosen\n"a,b', "damaged csv file"),
        ("f.jsonl.bz2", bz2.compress(LINES * 900)[:-40], "damaged bz2 data"),
        ("g.jsonl.xz", lzma.compress(LINES)[:-20], "damaged xz data"),
        ("h.xlsx", b"PK\x03\x04 and so on", "expected JSON Lines, a JSON list, csv, .*, got an archive"),
        ("i.jsonl", b"prompt,chosen,rejected\na,b,c\n", "malformed JSON .*csv and tsv files are known by their names"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_not_there_or_not_one_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected files that match, found none"):
        read_records(tmp_path / "*.jsonl")
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_records("somebody/some/data")
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(RecordError, match=r"expected a folder written by save_to_disk, .*got \['rows.jsonl'\]"):
        read_records(tmp_path)
    table = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(train=table, test=table)
    with pytest.raises(RecordError, match=r"expected one split of it, .*got 'splits train, test'"):
        read_records(splits)
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(RecordError, match=r"splits: expected the folder of one split, such as .*splits/train"):
        read_records(tmp_path / "splits")
    with pytest.raises(RecordError, match=r"expected rows, or a mapping of columns \(one row is \[row\]\)"):
        read_records(ROWS[0])
    with pytest.raises(RecordError, match="expected columns of one length"):
        read_records({"prompt": ["a"], "completions": [["b"], ["c"]]})  # type: ignore[arg-type]
