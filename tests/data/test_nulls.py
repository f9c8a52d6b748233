"""Nulls in tools and their calls: those with which tables fill up their rows are left out, those of a file are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.data import read_records, record_from_row
from tests.support.chat_templates import IM, Shape, chat_tokenizer

datasets = pytest.importorskip("datasets")


def row(name: str, arguments: Any, system: bool = False) -> dict[str, Any]:
    call = {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
    prompt = [
        {"role": "user", "content": f"What of {name}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12", "name": name},
    ]
    return {
        "prompt": [{"role": "system", "content": "Be kind."}, *prompt] if system else prompt,
        "completions": ["It is 12.", "Hot."],
    }


ROWS = [
    row("weather", {"city": "Rome", "at": {"hour": 3}}),
    row("stock", {"ticker": "X", "day": 3}, system=True),
    row("none", {"at": {"minute": 4}}),
]


def arguments(record: Any) -> list[Any]:
    calls = [call for message in record.prompt for call in message.get("tool_calls", [])]
    return [call["function"]["arguments"] for call in calls]


EXPECTED = [arguments(record) for record in read_records(ROWS)]


def sources(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    table.to_json(folder / "a.jsonl")
    return {
        "parquet": str(folder / "a.parquet"),
        "saved": str(folder / "saved"),
        "arrow": str(next((folder / "saved").glob("*.arrow"))),
        "jsonl of a table": str(folder / "a.jsonl"),
        "table": table,
        "stream": table.to_iterable_dataset(),
        "pyarrow": table.data.table,
        "pandas": table.to_pandas(),
        "columns": table.to_dict(),
        "rows": list(table),
    }


NAMES = ["parquet", "saved", "arrow", "jsonl of a table", "table", "stream", "pyarrow", "pandas", "columns", "rows"]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_call_itself(tmp_path: Path, name: str) -> None:
    assert EXPECTED == [[{"city": "Rome", "at": {"hour": 3}}], [{"ticker": "X", "day": 3}], [{"at": {"minute": 4}}]]
    source = sources(tmp_path, ROWS)[name]
    records = read_records(source)
    assert [arguments(record) for record in records] == EXPECTED
    assert [record.prompt for record in records] == [record.prompt for record in read_records(ROWS)]


def test_rows_that_are_tokenised_as_they_come() -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls or '' }}<|im_end|>{% endfor %}"
    collator = RankedCollator(chat_tokenizer(Shape(template, "", "", IM)))
    table = datasets.Dataset.from_list(ROWS)
    expected = [collator.tokenize_record(each)["prompt_ids"] for each in ROWS]
    assert [list(each["prompt_ids"]) for each in RankedDataset(table, collator)] == expected
    assert [collator.tokenize_record(each)["prompt_ids"] for each in table] == expected


def test_other_shapes_of_rows(tmp_path: Path) -> None:
    pairs = [
        {
            "chosen": [*each["prompt"], {"role": "assistant", "content": "It is 12."}],
            "rejected": [*each["prompt"], {"role": "assistant", "content": "Hot."}],
        }
        for each in ROWS
    ]
    records = read_records(sources(tmp_path, pairs)["parquet"])
    assert [arguments(record) for record in records] == EXPECTED
    asked = [{"q": each["prompt"], "s": "Be brief.", "a": each["completions"]} for each in ROWS]
    columns = {"prompt": "q", "completions": "a", "system": "s"}
    records = read_records(sources(tmp_path, asked)["parquet"], columns=columns)
    assert [arguments(record) for record in records] == EXPECTED


@pytest.mark.parametrize(
    "value", [{"city": "Rome", "unit": None}, {"at": {"hour": None}}, {"list": [1, None]}, '{"a": null}']
)
@pytest.mark.parametrize("more", [{}, {"tool_calls": None, "function_call": None, "refusal": None}])
def test_nulls_that_were_written_are_kept(tmp_path: Path, value: Any, more: dict[str, Any]) -> None:
    """Other turns of an assistant may say that they hold no call, as OpenAI's do."""
    written = row("weather", value)
    written["prompt"] += [{"role": "assistant", "content": "12 C", **more}, {"role": "user", "content": "Sure?"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(written) + "\n")
    for record in (*read_records(path), *read_records([written]), record_from_row(written)):
        assert arguments(record) == [value]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


OPTIONAL = {"type": ["string", "null"], "default": None, "enum": ["x", None]}
TOOLS = [
    [tool("f", a=OPTIONAL)],
    [tool("f", a=OPTIONAL, b={"type": "integer"}), tool("g", c={"anyOf": [{"const": None}, {"type": "string"}]})],
    [tool("f", a={"type": "object", "properties": {"b": {"default": None, "example": None}}})],
]


@pytest.mark.parametrize("tools", TOOLS)
def test_a_default_of_null_is_kept(tmp_path: Path, tools: list[dict[str, Any]]) -> None:
    written = {"prompt": [{"role": "user", "content": "Hi"}], "completions": ["a", "b"], "tools": tools}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(written) + "\n")
    for record in (*read_records(path), *read_records([written])):
        assert record.template == {"tools": tools}


@pytest.mark.parametrize("name", NAMES)
def test_what_fills_schemas_up_is_left_out(tmp_path: Path, name: str) -> None:
    described = {"type": "integer", "description": "How many.", "default": 3}
    tools = [
        [tool("f", a={"type": "string"})],
        [tool("g", b=described), tool("h", a={"type": "string", "description": "What."})],
    ]
    ask = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": ask, "completions": ["a", "b"], "tools": each} for each in tools]
    assert [record.template["tools"] for record in read_records(sources(tmp_path, rows)[name])] == tools
