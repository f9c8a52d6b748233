"""A mapping of columns: fields from anywhere in a row, rows of one prompt together, errors that name the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli.columns import take_columns
from clha_fast.cli.data import convert as convert_command
from clha_fast.cli.options import read_config, read_flags, split
from clha_fast.data import RankedRecord, RecordError, read_records, record_from_row

WIDE = {"ask": "Why?", "left": "a", "right": "b", "marks": {"left": 1, "right": 2}, "extra": None}

# mapping, rows, records
MAPPED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[RankedRecord]]] = {
    "two columns and nested scores": (
        {"prompt": "ask", "completions": ["left", "right"], "rewards": ["marks.left", "marks.right"]},
        [WIDE],
        [RankedRecord("Why?", ("a", "b"), (1.0, 2.0))],
    ),
    "a list of objects": (
        {"prompt": "q.text", "completions": "out.say", "ranks": "out.place"},
        [{"q": {"text": "Why?"}, "out": [{"say": "b", "place": 2}, {"say": "a", "place": 1}]}],
        [RankedRecord("Why?", ("a", "b"))],
    ),
    "positions": (
        {"prompt": "turns.0.value", "completions": ["turns.1.value", "turns.-1.value"]},
        [{"turns": [{"value": "Why?"}, {"value": "a"}, {"value": "b"}]}],
        [RankedRecord("Why?", ("a", "b"))],
    ),
    "a name with dots and dashes": (
        {"prompt": "the.prompt", "completions": ["out-1", "out-2"]},
        [{"the.prompt": "Why?", "the": {"prompt": "no"}, "out-1": "a", "out-2": "b"}],
        [RankedRecord("Why?", ("a", "b"))],
    ),
    "fewer responses in some rows": (
        {"prompt": "p", "completions": ["x", "y", "z"], "rewards": ["rx", "ry", "rz"]},
        [{"p": "Why?", "x": "a", "y": None, "z": "c", "rx": 2, "ry": None, "rz": 1}],
        [RankedRecord("Why?", ("a", "c"), (2.0, 1.0))],
    ),
    "only the prompt, the rest is a pair": (
        {"prompt": ["task", "given"]},
        [{"task": "Add.", "given": "2 and 2", "chosen": "It is 4", "rejected": "It is 5", "chosen_score": 3,
          "rejected_score": 1}, {"task": "Hi", "given": "", "chosen": "a", "rejected": "b"}],
        [RankedRecord("Add.\n2 and 2", ("It is 4", "It is 5"), (3.0, 1.0)), RankedRecord("Hi", ("a", "b"))],
    ),
    "only the rewards of a pair": (
        {"rewards": ["ma", "mb"]},
        [{"prompt": "Why?", "chosen": "a", "rejected": "b", "ma": 5, "mb": 4}],
        [RankedRecord("Why?", ("a", "b"), (5.0, 4.0))],
    ),
    "nowhere: the beginning of both": (
        {"prompt": None},
        [{"note": "by hand, twice", "chosen": "The sky is blue.", "rejected": "The sky is black."}],
        [RankedRecord("The sky is", (" blue.", " black."))],
    ),
    "a system text": (
        {"system": "sys"},
        [{"sys": "Be kind.", "prompt": "Why?", "completions": ["a", "b"]}],
        [RankedRecord(({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}), ("a", "b"))],
    ),
    "a response a row, beside its prompt": (
        {"completions": "response", "rewards": "helpfulness", "group_by": "prompt"},
        [{"prompt": "q", "response": text, "helpfulness": k} for k, text in enumerate("ab")],
        [RankedRecord("q", ("a", "b"), (0.0, 1.0))],
    ),
    "sharegpt": (
        {"prompt": "conversations.0.value", "completions": ["chosen.value", "rejected.value"]},
        [{"conversations": [{"value": "q"}], "chosen": {"value": "a"}, "rejected": {"value": "b"}}],
        [RankedRecord("q", ("a", "b"))],
    ),
    "rows of a prompt": (
        {"prompt": "q", "completions": "text", "rewards": "votes", "group_by": "qid"},
        [{"qid": 1, "q": "Why?", "text": "a", "votes": 3}, {"qid": 2, "q": "How?", "text": "c", "votes": 0},
         {"qid": 1, "q": "Why?", "text": "b", "votes": 9}],
        [RankedRecord("Why?", ("a", "b"), (3.0, 9.0)), RankedRecord("How?", ("c",), (0.0,))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPPED)
def test_fields_come_from_where_the_mapping_says(tmp_path: Path, case: str) -> None:
    columns, rows, expected = MAPPED[case]
    assert read_records(rows, columns=columns) == expected
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--columns.{name}={json.dumps(value)}" for name, value in columns.items()]
    assert convert_command([str(path), str(tmp_path / "out.jsonl"), *flags]) == 0
    assert read_records(tmp_path / "out.jsonl") == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "q"}, r"columns: unknown field 'promt'; did you mean 'prompt'\?"),
        ({"prompt": 3}, "columns: prompt: expected a column or a list of columns, got 3"),
        ({"sft_index": ["a"]}, "columns: sft_index: expected a column, got"),
        ({"completions": []}, "columns: completions: expected a column or a list"),
        ({"prompt": "q", "group_by": "q"}, "columns: group_by: expected completions beside it"),
    ],
)
def test_mappings_that_are_none(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        read_records([WIDE], columns=columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "asks"}, r"f: asks: expected a column for prompt, got none of that name .*did you mean 'ask'\?"),
        ({"prompt": "ask", "completions": ["Left", "right"]}, r"Left: expected a column .*; did you mean 'left'\?"),
        ({"prompt": "ask", "completions": ["left", "right"], "rewards": ["marks.lft", "marks.right"]},
         r"marks.lft: expected a column for rewards, .*; did you mean 'left'\?"),
        ({"prompt": ["marks", "ask"], "completions": ["left", "right"]}, "marks: expected a text, to be joined"),
        ({"prompt": "ask", "completions": ["left", "right"], "rewards": "marks"}, "rewards: expected a list"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message.replace("f: ", "^record 0: ")):
        read_records([WIDE], columns=columns)


def test_a_mapped_field_that_the_format_does_not_read_is_refused() -> None:
    row = {"query": "q", "responses": ["a", "b"], "scores": [1, 2], "other": [3, 4]}
    with pytest.raises(RecordError, match=r"columns.rewards: expected a field that this format reads"):
        read_records([row], columns={"rewards": "other"})


def test_subsets_are_read_from_any_format_and_mapped() -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "s", "part": "t"},
        {"prompt": "p", "completions": ["a", "b"], "subset": "s", "part": "t"},
    ]
    for row in rows:
        assert read_records([row])[0].subset == "s"
        assert read_records([row], columns={"subset": "part"})[0].subset == "t"
        assert read_records([{**row, "subset": 3}])[0].subset == ""
        with pytest.raises(RecordError, match="subset: expected a text, got 3"):
            read_records([{**row, "part": 3}], columns={"subset": "part"})
    pair = {"chosen": "Say it a", "rejected": "Say it b", "subset": "not a prompt"}
    assert (read_records([pair])[0].prompt, read_records([pair])[0].subset) == ("Say it", "not a prompt")


def test_groups_must_be_of_one_prompt_and_bad_rows_do_not_stop_the_others() -> None:
    columns = {"prompt": "q", "completions": "a", "group_by": "g"}
    rows = [{"g": 1, "q": "x", "a": "1"}, {"g": 1, "q": "y", "a": "2"}, {"g": 2, "q": "z", "a": "3"}, {"q": "z"}]
    errors: list[RecordError] = []
    assert read_records(rows, columns=columns, errors=errors) == [RankedRecord("z", ("3",))]
    assert sorted(str(error).partition(",")[0] for error in errors) == [
        "record 1: prompt: expected the prompt of record 0",
        "record 3: g: expected a column for group_by",
    ]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tools", ([{"name": "a"}], [{"name": "b"}])),
        ("tools", ([{"name": "a"}], [])),
        ("chat_template_kwargs", ({"thinking": True}, {"thinking": False})),
        ("subset", ("one", "two")),
        ("sft_index", (0, 1)),
    ],
)
def test_groups_have_one_of_what_a_record_has_once(field: str, values: tuple[object, object]) -> None:
    columns = {"completions": "a", "group_by": "prompt"}
    prompt = [{"role": "user", "content": "Why?"}]
    rows = [{"prompt": prompt, "a": text, field: value} for text, value in zip("xy", values, strict=True)]
    with pytest.raises(
        RecordError, match=f"^record 1: {field}: expected the {field} of record 0, with the same prompt"
    ):
        read_records(rows, columns=columns)
    if field == "subset":
        found = read_records(rows, columns={**columns, "subset": None})
        assert found == read_records([{"prompt": prompt, "a": ["x", "y"]}], columns={"completions": "a"})
    missing = read_records([rows[0], {**rows[1], field: float("nan")}], columns=columns)  # as pandas has it
    assert missing == read_records([{**rows[0], "a": ["x", "y"]}], columns={"completions": "a"})
    for one in ({**rows[0]}, {**rows[0], field: None}):
        same = read_records([one, {**rows[1], field: one[field]}, rows[0]], columns=columns)
        assert same == read_records([{**rows[0], "a": ["x", "y", "x"]}], columns={"completions": "a"})


def test_a_subset_that_is_no_text_divides_no_group() -> None:
    rows = [{"prompt": "q", "a": text, "subset": k} for k, text in enumerate("xy")]
    found = read_records(rows, columns={"completions": "a", "group_by": "prompt"})
    assert found == [RankedRecord("q", ("x", "y"))]


@pytest.mark.parametrize("where", ["sft_index", "target"])
@pytest.mark.parametrize(
    ("answers", "given", "expected"),
    [((None, "b", "c"), 1, 0), ((None, "b", "c"), 2, 1), (("a", None, "c"), 2, 1), (("a", None, "c"), 0, 0),
     ((None, "b", None), 1, 0), (("a", "b", "c"), 2, 2), (("a", "b", None), 1.0, 1), (("a", None, "c"), None, 0)],
)  # fmt: skip
def test_sft_index_follows_its_response(
    where: str, answers: tuple[str | None, ...], given: float | None, expected: int
) -> None:
    row = {"q": "Why?", **{f"a{k}": answer for k, answer in enumerate(answers)}, where: given}
    columns = {
        "prompt": "q",
        "completions": ["a0", "a1", "a2"],
        **({} if where == "sft_index" else {"sft_index": where}),
    }
    [found] = read_records([row], columns=columns)
    assert found == RankedRecord("Why?", tuple(a for a in answers if a is not None), sft_index=expected)


@pytest.mark.parametrize(("answers", "given"), [((None, "b", "c"), 0), (("a", "b", None), 2), (("a", None, "c"), 1)])
def test_sft_index_of_a_response_that_is_not_there(answers: tuple[str | None, ...], given: int) -> None:
    row = {"prompt": "Why?", **{f"a{k}": answer for k, answer in enumerate(answers)}, "sft_index": given}
    with pytest.raises(RecordError, match=f"sft_index: expected the place of a response that is there, got {given}"):
        read_records([row], columns={"completions": ["a0", "a1", "a2"]})


@pytest.mark.parametrize(
    ("answers", "said", "target"),
    [
        ([("1a", "1b"), (None, "2b")], (0, 0), "1a"),
        ([(None, "1b"), ("2a", "2b")], (1, 1), "1b"),
        ([(None, "1b"), ("2a", "2b")], (2, 2), "2a"),
        ([(None, "1b"), ("2a", "2b")], (None, 3), "2b"),
        ([("1a", None), (None, "2b"), ("3a", None)], (4, None, 4), "3a"),
        ([("1a", None), (None, "2b"), ("3a", None)], (None, None, None), "1a"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_sft_index_of_a_group_counts_over_all_its_rows(
    tmp_path: Path, text: bool, answers: list[Any], said: tuple[int | None, ...], target: str
) -> None:
    rows = [{"q": "Why?", "a": a, "b": b, "sft_index": index} for (a, b), index in zip(answers, said, strict=True)]
    source: Any = rows
    if text:
        source = tmp_path / "in.csv"
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        source.write_text("\n".join(["q,a,b,sft_index", *lines]) + "\n")
    (record,) = read_records(source, columns={"prompt": "q", "completions": ["a", "b"], "group_by": "q"})
    assert record.completions == tuple(a for pair in answers for a in pair if a is not None)
    assert record.completions[record.sft_index] == target


@pytest.mark.parametrize("given", [0, 3])
def test_sft_index_of_a_response_that_a_group_lacks(given: int) -> None:
    rows = [{"q": "Why?", "a": None, "b": "1b", "sft_index": given}, {"q": "Why?", "a": "2a", "b": None}]
    with pytest.raises(RecordError, match=f"sft_index: expected the place of a response that is there, got {given}"):
        read_records(rows, columns={"prompt": "q", "completions": ["a", "b"], "group_by": "q"})


@pytest.mark.parametrize("empty", ["", None, float("nan")])
@pytest.mark.parametrize("field", ["subset", "sft_index"])
@pytest.mark.parametrize("first", [True, False])
def test_what_a_row_leaves_empty_another_says(field: str, empty: object, first: bool) -> None:
    value: Any = "easy" if field == "subset" else 1
    given = (value, empty) if first else (empty, value)
    rows = [{"q": "Why?", "a": answer, field: own} for answer, own in zip(("1", "2"), given, strict=True)]
    (record,) = read_records(rows, columns={"prompt": "q", "completions": "a", "group_by": "q"})
    assert getattr(record, field) == value


@pytest.mark.parametrize(("first", "second"), [("x", "y"), ("", "y"), ("x", ""), (None, "y"), ("x", None)])
def test_no_row_takes_another_s_prompt(first: str | None, second: str | None) -> None:
    rows = [{"q": first, "a": "1", "g": 1}, {"q": second, "a": "2", "g": 1}]
    with pytest.raises(RecordError, match="record 1: prompt: expected the prompt of record 0, with the same g"):
        read_records(rows, columns={"prompt": "q", "completions": "a", "group_by": "g"})


@pytest.mark.parametrize("row", ["a text", 1, None, ["a"]])
def test_what_is_no_row(row: Any) -> None:
    with pytest.raises(RecordError, match="record 3: expected a row, a mapping of fields, got"):
        record_from_row(row, "record 3")


def test_flags_and_yaml_say_the_same(tmp_path: Path) -> None:
    words = ["--columns.prompt", "question", "--columns.completions", "[response_a, response_b]"]
    wanted = {"prompt": "question", "completions": ["response_a", "response_b"]}
    path = tmp_path / "run.yaml"
    path.write_text("columns: {prompt: question, completions: [response_a, response_b]}\n")
    for options in (read_flags(words), read_config(str(path))):
        assert split(options)[0].columns == wanted
    assert take_columns(["a", *words, "b"]) == (["a", "b"], wanted)
    assert take_columns(["--columns.prompt=null", *words[2:]]) == ([], {**wanted, "prompt": None})
    with pytest.raises(ValueError, match=r"--columns.prompt: expected a column, got none"):
        take_columns(["--columns.prompt", "--overwrite"])
