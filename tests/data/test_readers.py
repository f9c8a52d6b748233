"""Every published format from a file of its own, detection, and the one sentence that a broken file gets."""

import gzip
import json

import pytest

from clha_fast.data import FORMATS, RankedRecord, RecordError, iter_records, read_records, record_from_row
from tests.data.test_published import PUBLISHED


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TURNS = ["<|prompter|>Hi", "<|assistant|>Hello.", "<|prompter|>How so?", "<|assistant|>"]
DIALOGUE = (user("Hi"), assistant("Hello."), user("How so?"))
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How so?\n\nAssistant: "

# format, row as published, record it means
CASES = {
    "canonical": (
        "canonical",
        {"prompt": "Why?", "completions": ["b", "a"], "rewards": [1, 2.5], "ranks": [2, 1], "id": 7},
        RankedRecord("Why?", ("a", "b"), (2.5, 1.0)),
    ),
    "canonical, messages": (
        "canonical",
        {"prompt": [user("Why?")], "completions": [[assistant("a")], "b"], "sft_index": 1},
        RankedRecord((user("Why?"),), ("a", "b"), None, 1),
    ),
    "trl, explicit": (
        "trl",
        {"prompt": "Why?", "chosen": " a", "rejected": " b", "score_chosen": 1, "score_rejected": 2},
        RankedRecord("Why?", (" a", " b"), (1.0, 2.0)),
    ),
    "trl, implicit text": (
        "trl",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        RankedRecord("The sky is", (" blue.", " black.")),
    ),
    "trl, implicit text, new line": (
        "trl",
        {"chosen": "Blue?\nYes", "rejected": "Blue?\nYesterday"},
        RankedRecord("Blue?\n", ("Yes", "Yesterday")),
    ),
    "trl, explicit messages": (
        "trl",
        {"prompt": [user("Why?")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        RankedRecord((user("Why?"),), ("a", "b")),
    ),
    "trl, messages repeated": (
        "trl",
        {"prompt": list(DIALOGUE), "chosen": [*DIALOGUE, assistant("a")], "rejected": [*DIALOGUE, assistant("b")]},
        RankedRecord(DIALOGUE, ("a", "b")),
    ),
    "trl, implicit messages": (
        "trl",
        {"chosen": [*DIALOGUE, assistant("a")], "rejected": [*DIALOGUE, assistant("b")]},
        RankedRecord(DIALOGUE, ("a", "b")),
    ),
    "ultrafeedback, binarized": (
        "trl",
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant("a")],
            "rejected": [user("Why?"), assistant("b")],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        RankedRecord((user("Why?"),), ("a", "b"), (8.5, 3.0)),
    ),
    "trl, text prompt before messages": (
        "trl",
        {"prompt": "Why?", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        RankedRecord((user("Why?"),), ("a", "b")),
    ),
    "pro, chosen first even when its reward is lower": (
        "pro",
        {"prefix": [TURNS, TURNS], "suffix": ["a", "b"], "reward": [-1.5, 0.5], "sft_index": 0},
        RankedRecord(DIALOGUE, ("a", "b"), (-1.5, 0.5)),
    ),
    "pro, one prefix, no rewards": (
        "pro",
        {"prefix": TURNS[:1], "suffix": ["a", "b", "c"], "sft_index": 2},
        RankedRecord((user("Hi"),), ("a", "b", "c"), None, 2),
    ),
    "rrhf": (
        "rrhf",
        {"query": "Why?", "responses": ["low", "tie 1", "tie 2"], "scores": [-1, 2, 2]},
        RankedRecord("Why?", ("tie 1", "tie 2", "low"), (2.0, 2.0, -1.0)),
    ),
    "hh": (
        "hh",
        {"chosen": HH + "A: yes\n\nindeed", "rejected": HH + "no"},
        RankedRecord(DIALOGUE, ("A: yes\n\nindeed", "no")),
    ),
    "nectar": (
        "nectar",
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How so?\n\nAssistant: ",
            "answers": [{"answer": "b", "model": "m", "rank": 2.0}, {"answer": "a", "model": "n", "rank": 1.0}],
        },
        RankedRecord(DIALOGUE, ("a", "b")),
    ),
    "nectar, plain prompt": (
        "nectar",
        {"prompt": "Why?", "answers": [{"answer": "a", "rank": 0}, {"answer": "b", "rank": 1}]},
        RankedRecord("Why?", ("a", "b")),
    ),
    "ultrafeedback": (
        "ultrafeedback",
        {
            "instruction": "Why?",
            "completions": [{"response": "b", "overall_score": 3}, {"response": "a", "overall_score": 8.5}],
        },
        RankedRecord("Why?", ("a", "b"), (8.5, 3.0)),
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("detected", [True, False])
def test_formats(tmp_path, case, detected):
    name, row, expected = CASES[case]
    path = write(tmp_path / "rows.jsonl", [row, row])
    records = read_records(path, "auto" if detected else name)
    assert records == [expected, expected]
    assert [record.source for record in records] == [f"{path}:1", f"{path}:2"]
    assert record_from_row(row) == expected


def test_every_format_has_a_case():
    assert {name for name, _, _ in (*CASES.values(), *PUBLISHED.values())} == set(FORMATS)


def test_rank_by_reward_moves_the_sft_target_along():
    row = {"prefix": [TURNS, TURNS], "suffix": ["a", "b"], "reward": [-1.5, 0.5], "sft_index": 0}
    assert read_records([row], rank_by_reward=True) == [RankedRecord(DIALOGUE, ("b", "a"), (0.5, -1.5), 1)]


ROW = {"prompt": "Why?", "completions": ["a", "b"]}
RECORD = RankedRecord("Why?", ("a", "b"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_json_list_and_lines_are_told_apart_by_content(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_text("\n" + json.dumps([ROW, ROW], indent=2))
    assert read_records(path) == [RECORD, RECORD]
    assert read_records(write(path, [ROW])) == [RECORD]


def test_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert read_records(path) == [RECORD]


def test_truncated_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(f"{json.dumps(ROW)}\n".encode() * 50)[:-12])
    errors = []
    records = read_records(path, errors=errors)
    assert records == [RECORD] * len(records)
    assert [error.source for error in errors] == [str(path)]
    assert "damaged gzip data" in str(errors[0])


def test_blank_lines_byte_order_mark_and_line_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = json.dumps({**ROW, "prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"\n  \n{text}\r\n\n{json.dumps(ROW)}".encode())
    records = read_records(path)
    assert [record.prompt for record in records] == ["one\u2028two\x85three", "Why?"]
    assert [record.source for record in records] == [f"{path}:3", f"{path}:5"]


def test_files_with_marks_put_one_behind_another(tmp_path):
    line = b"\xef\xbb\xbf" + json.dumps(ROW).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([line, line, json.dumps(ROW).encode(), line]))
    assert read_records(tmp_path / "rows.jsonl") == [RECORD] * 4


def test_tables_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**ROW, "rewards": [1.0, 0.0]}, {"prompt": "More?", "completions": ["c"], "rewards": None}]
    table = datasets.Dataset.from_list(rows)
    expected = [RankedRecord("Why?", ("a", "b"), (1.0, 0.0)), RankedRecord("More?", ("c",))]
    records = read_records(table)
    assert records == expected
    assert records[1].source == "record 1"
    path = tmp_path / "rows.parquet"
    table.to_parquet(str(path))
    records = read_records(path)
    assert records == expected
    assert records[1].source == f"{path}: row 1"


def test_table_of_messages_fills_missing_keys_with_none():
    datasets = pytest.importorskip("datasets")
    messages = [[user("q") | {"name": "x"}], [user("q")]]
    table = datasets.Dataset.from_list([{"prompt": prompt, "completions": ["a"]} for prompt in messages])
    assert [record.prompt for record in read_records(table)] == [tuple(prompt) for prompt in messages]


BROKEN = [
    ('{"prompt": "Why?", "completions": ["a", "b', 43, "completions", "the JSON ends too early"),
    ('{"prompt": "Why?", "completions": ["a", ', 40, "completions", "the JSON ends too early"),
    ('{"prompt": "Why?", "completions": ["a"], "rewards": [1.0, 2', 60, "rewards", "the JSON ends too early"),
    ('{"prompt": "Why?", "completions": ["a" "b"]}', 40, "completions", "malformed JSON (Expecting ',' delimiter)"),
    ('{"prompt": "Why?", "completions": ["a"], "rewards": [1.0, ?]}', 59, "rewards", "malformed JSON"),
    ('{"prompt": [{"role": "user", "content": x}]}', 41, "prompt", "malformed JSON"),
    ('{"prompt": "Why?"} {"prompt": "Why?"}', 20, None, "malformed JSON (Extra data)"),
    ('{"prompt": "a, b: {", "compl', 29, None, "the JSON ends too early"),
    ('{"prompt": "a", "prompt": "b", "completions": ["a", ', 52, "completions", "the JSON ends too early"),
    ('{"prompt": [{"role": "user", "role": "a"}], "completions": x}', 60, "completions", "malformed JSON"),
    ('{"prompt": "Why?", completions: ["a"]}', 20, None, "malformed JSON (Expecting property name"),
    ("not json", 1, None, "malformed JSON"),
    ('{"a": ' + "[" * 100_000, 1, None, "JSON nested too deeply"),
    ('{"prompt": "p", "completions": ["a"], "rewards": [' + "1" * 5000 + "]}", 1, None, "malformed JSON"),
]


@pytest.mark.parametrize(("line", "column", "field", "why"), BROKEN, ids=[str(n) for n in range(len(BROKEN))])
def test_broken_lines_name_file_line_column_and_field(tmp_path, line, column, field, why):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{line}\n{json.dumps(ROW)}\n")
    place = f'in field "{field}"' if field else "outside any field"
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:3: column {column}, {place}: {why}")
    errors = []
    assert read_records(path, errors=errors) == [RECORD, RECORD]
    assert [str(error) for error in errors] == [str(caught.value)]


def test_invalid_utf8_names_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "Why?", "completions": ["a \xe2\x28"]}')
    with pytest.raises(
        RecordError, match=r'rows.jsonl:1: column 39, in field "completions": invalid UTF-8 \(byte 0xe2'
    ):
        read_records(path)


def test_a_record_cut_anywhere_is_one_clear_error(tmp_path):
    line = json.dumps({**ROW, "prompt": 'Wörum "so"? \\ 🙂', "rewards": [1.5, -2e-3]}, ensure_ascii=False).encode()
    path = tmp_path / "rows.jsonl"
    for end in range(1, len(line)):
        path.write_bytes(f"{json.dumps(ROW)}\n".encode() + line[:end])
        errors = []
        assert read_records(path, errors=errors) == [RECORD]
        assert [error.source for error in errors] == [f"{path}:2"]
        assert str(errors[0]).startswith(f"{path}:2: column ")


def test_broken_list_names_line_and_field(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n[{"prompt": "Why?",\n "completions": ["a"]},\n {"prompt": "Wh')
    with pytest.raises(RecordError, match=r'rows.json:4: column 16, in field "prompt": the JSON ends too early'):
        read_records(path, errors=[])


def test_rows_that_are_no_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n[1]\n")
    with pytest.raises(RecordError, match=r"rows.jsonl:2: expected a JSON object, got \[1\]"):
        read_records(path)
    with pytest.raises(RecordError, match=r"record 0: expected a JSON object, got 'text'"):
        read_records(["text"])


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_no_record_at_all(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(RecordError, match=r"rows.jsonl: expected at least one record, found none"):
        read_records(path)


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        (
            {"meta": {"q": "?", "id": 1}, "cands": [{"txt": "a", "quality": 2}]},
            "cands.quality, cands.txt, meta.id, meta.q",
        ),
        ({"turns": [{"role": "user", "content": "?"}], "out": ["a", "b"], "no": []}, "no, out, turns"),
        ({"x": {}, "y": None}, r"x, y \(empty\)"),
    ],
)
def test_unknown_format_lists_nested_columns_as_a_mapping_has_them(row: dict[str, object], seen: str) -> None:
    with pytest.raises(RecordError, match=f"unknown format, its fields are: {seen}. Say which is which"):
        read_records([row])


def test_unknown_format_lists_seen_fields_and_known_formats():
    with pytest.raises(RecordError) as caught:
        read_records([{"question": "?", "answer": "!"}], errors=[])
    assert str(caught.value).startswith(
        "record 0: unknown format, its fields are: answer, question. Say which is which"
    )
    assert str(caught.value).endswith(f"read as they are: {', '.join(FORMATS)}")
    assert "--columns.completions COLUMN --columns.group_by COLUMN where each row has one response" in str(caught.value)
    with pytest.raises(ValueError, match=r"format: expected auto or one of canonical, .*, got 'csv'"):
        read_records([ROW], "csv")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        read_records(tmp_path / "nothing.jsonl")


def test_records_come_one_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\nbroken\n")
    assert next(iter_records(path)) == RECORD


WRONG = [
    ({"completions": ["a"], "prompt": "p", "reward": [1]}, 'reward: unknown field, expected "rewards"'),
    ({"completions": ["a"], "prompt": "p", "labels": [True]}, 'labels: unknown field, expected "ranks"'),
    ({"completions": [[user("a")]], "prompt": "p"}, "completions[0]: expected a text or one assistant message"),
    ({"completions": "a", "prompt": "p"}, "completions: expected a list, got 'a'"),
    ({"chosen": "a", "rejected": "b"}, "prompt: expected a prompt that chosen and rejected begin with"),
    ({"chosen": "p a", "rejected": [user("a")]}, "rejected: expected the same form as chosen"),
    ({"prompt": "p", "chosen": "a", "rejected": ""}, "rejected: expected a response that is not empty, got ''"),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1},
        "score_rejected: expected a number, got None",
    ),
    ({"chosen": [user("q"), user("a")], "rejected": [user("q")]}, "chosen: expected an assistant message at the end"),
    (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
        "rejected: expected the messages of chosen before the last one",
    ),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "chosen before its last message: expected at least"),
    (
        {"prompt": [user("q")], "chosen": [user("r"), assistant("a")], "rejected": [user("r"), assistant("b")]},
        "chosen: expected the messages of prompt before the last one",
    ),
    ({"prefix": [TURNS, TURNS[:1]], "suffix": ["a", "b"]}, "prefix[1]: expected the turns of prefix[0]"),
    ({"prefix": [TURNS], "suffix": ["a", "b"]}, "prefix: expected 2 lists, one a suffix, got 1"),
    ({"prefix": ["Hi"], "suffix": ["a"]}, "prefix[0]: expected a turn that begins with <|prompter|>"),
    ({"prefix": [], "suffix": ["a"]}, "prefix: expected at least one message, got []"),
    ({"prefix": [TURNS, TURNS], "suffix": ["a", ""]}, "suffix[1]: expected a response that is not empty, got ''"),
    ({"prefix": TURNS, "suffix": ["a", "b"], "reward": [1.0]}, "reward: expected 2 numbers, one a completion, got 1"),
    ({"query": "q", "responses": ["a"], "scores": None}, "scores: expected a value, got None"),
    ({"query": "q", "responses": ["a"], "scores": [float("nan")]}, "scores[0]: expected a finite number"),
    ({"query": 1, "responses": ["a"], "scores": [1]}, "query: expected a text or a list of messages, got 1"),
    ({"chosen": HH + "a", "rejected": HH.replace("How", "Why") + "b"}, "rejected: expected the messages of chosen"),
    ({"chosen": HH + "a", "rejected": HH}, "rejected: expected a response that is not empty"),
    ({"chosen": HH + "a\n\nHuman: ok", "rejected": HH + "b"}, "chosen: expected an assistant message at the end"),
    (
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
        "answers.rank: expected a perm",
    ),
    ({"prompt": "p", "answers": [{"answer": "a"}]}, "answers[0].rank: expected a value, got None"),
    ({"prompt": "p", "answers": ["a"]}, "answers[0]: expected an object with answer and rank, got 'a'"),
    (
        {"instruction": "q", "completions": [{"response": "", "overall_score": 1}]},
        "completions[0].response: expected a response that is not empty",
    ),
    (
        {"instruction": "q", "completions": [{"response": "a", "overall_score": "N/A"}]},
        "completions[0].overall_score: expected a number, got 'N/A'",
    ),
]


def test_a_field_that_is_not_there() -> None:
    with pytest.raises(RecordError, match=r"^record 0: prompt: expected a value, got nothing$"):
        read_records([{"completions": ["a", "b"]}], format="canonical")


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[message.partition(" ")[0] for _, message in WRONG])
def test_bad_rows_are_told_in_the_file_s_own_words(row, message):
    with pytest.raises(RecordError) as caught:
        read_records([row])
    assert str(caught.value).startswith(f"record 0: {message}")
    assert caught.value.source == "record 0"
    assert message.startswith(f"{caught.value.field}: ")
