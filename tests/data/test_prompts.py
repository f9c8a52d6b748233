"""Files of prompts alone, and what stands for a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data import RankedRecord, RecordError
from clha_fast.data.prompts import PromptRecord, answered, prompt_hash, read_prompts
from tests.support.tiny import make_rows


def test_prompts_alone(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "subset": "s"},
        {"prompt": [{"role": "user", "content": "Hi"}], "tools": [{"name": "t"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_prompts(path)
    assert isinstance(first, PromptRecord)
    assert (first.prompt, first.subset) == ("a", "s")
    assert second.prompt[0] == {"role": "user", "content": "Hi"}
    assert second.template == {"tools": [{"name": "t"}]}
    ranked = read_prompts(make_rows(3))
    assert all(isinstance(record, RankedRecord) for record in ranked)
    assert prompt_hash(ranked[0]) == prompt_hash(PromptRecord(f" {ranked[0].prompt}\n"))
    by_column = read_prompts([{"question": "q", "id": 3}], columns={"prompt": "question"})
    assert [record.prompt for record in by_column] == ["q"]
    with pytest.raises(RecordError, match=r"record 1: completions: expected a prompt alone, as in other rows"):
        read_prompts([{"prompt": "a"}, {"prompt": "b", "completions": ["x"]}])
    with pytest.raises(RecordError, match=r"record 1: prompt: expected a prompt, got None"):
        read_prompts([{"prompt": "a"}, {"prompt": None}])


BESIDE: list[dict[str, Any]] = [
    {"solution": "4"},
    {"answer": "4", "level": 3},
    {"ground_truth": ["4", "5"], "data_source": "x", "subset": "s"},
    {"chosen": "yes"},
    {"tests": {"in": 1}, "tags": ["a", "b"]},
]


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: "+".join(beside))
def test_columns_beside_a_prompt(beside: dict[str, Any], tmp_path: Path) -> None:
    """They are refused with the way out, or kept where they are asked for."""
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"say {k}", **beside, **({} if k else {"none": None})} for k in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = {name: value for name, value in beside.items() if name != "subset"}
    refused = rf"beside prompt {', '.join(extra)}; .*\(--columns.prompt prompt\) reads"
    for source in (rows, path):
        with pytest.raises(RecordError, match=refused):
            read_prompts(source)
        for found in (read_prompts(source, beside=True), read_prompts(source, columns={"prompt": "prompt"})):
            assert [record.prompt for record in found] == [row["prompt"] for row in rows]
            assert all(isinstance(record, PromptRecord) and record.extra == extra for record in found)
    assert read_prompts([{"prompt": "say 0"}, *rows[1:]], beside=True)[1].extra == extra, "in later rows alone"


def test_responses_are_read_where_columns_beside_are_taken() -> None:
    assert all(isinstance(record, RankedRecord) for record in read_prompts(make_rows(3), beside=True))
    with pytest.raises(RecordError, match=r"^record 1: prompt: expected a prompt, got None"):
        read_prompts([{"prompt": "a", "solution": "4"}, {"solution": "5"}], beside=True)


@pytest.mark.parametrize(
    ("prompt", "answer", "response"),
    [
        ("Assistant:", "yes", " yes"),
        ("TL;DR:", " yes", " yes"),
        ("TL;DR:", "\nyes", "\nyes"),
        ("Assistant: ", "yes", "yes"),
        ("Assistant:\n", "yes", "yes"),
        ("", "yes", "yes"),
        ([{"role": "user", "content": "Why?"}], "yes", "yes"),
    ],
)
def test_answers_in_the_form_of_responses(prompt: Any, answer: str, response: str) -> None:
    template = {} if isinstance(prompt, str) else {"tools": [{"name": "t"}]}
    record = PromptRecord(prompt, "f:3", template)
    found = answered(record, [answer, answer])
    assert found.completions == (response, response)
    assert (found.prompt, found.source, found.template) == (record.prompt, "f:3", record.template)


BAD = [{"prompt": 7}, {"prompt": None}, {"prompt": []}, {"question": "x"}, 7]


@pytest.mark.parametrize(
    ("bad", "place"), [*((bad, place) for bad in BAD for place in (0, 2)), ({"prompt": "p", "more": "x"}, 2)]
)
def test_bad_prompts_are_left_out_where_asked(bad: Any, place: int) -> None:
    rows: list[Any] = [{"prompt": "one", "subset": "a"}, {"prompt": "two"}, {"prompt": "three"}]
    good = read_prompts(rows)
    rows.insert(place, bad)
    with pytest.raises(RecordError) as caught:
        read_prompts(rows)
    assert bad != {"prompt": None} or str(caught.value) == f"record {place}: prompt: expected a prompt, got None"
    errors: list[RecordError] = []
    assert read_prompts(rows, errors=errors) == good
    (error,) = errors
    assert str(error).startswith(f"record {place}: ")


@pytest.mark.parametrize("count", [1, 99])
@pytest.mark.parametrize("good", [{"prompt": "one"}, {"prompt": "one", "chosen": "a", "rejected": "b"}])
def test_prompts_of_no_format_in_front_are_left_out_where_asked(good: Any, count: int) -> None:
    odd = {"prompt": "q", "rejected": "x", "note": 4}
    errors: list[RecordError] = []
    assert read_prompts([*[odd] * count, good], errors=errors) == read_prompts([good])
    assert [error.source for error in errors] == [f"record {number}" for number in range(count)]
    for rows, found in (([odd, good], None), ([odd] * 3, []), ([odd] * 100 + [good], [])):
        with pytest.raises(RecordError, match=r"^record 0: expected a prompt alone, or responses in a known format"):
            read_prompts(rows, errors=found)


def test_no_good_prompt_is_an_error() -> None:
    rows = [{"prompt": 7}, {"prompt": "\ud800"}]
    with pytest.raises(RecordError, match=r"^prompts: expected at least one good record, got 2 bad ones; the first: "):
        read_prompts(rows, errors=[], columns={"prompt": "prompt"})


@pytest.mark.parametrize("prompt", ["", " \n", [{"role": "user", "content": " "}]])
def test_prompts_without_text_are_said(prompt: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read_prompts([{"prompt": "say"}, {"prompt": prompt}])) == 2
    assert "1 of 2 prompts have no text, and are answered nevertheless (first: record 1)" in caplog.text


def test_of_ranked_records_prompts_alone_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "same", "completions": ["a", "a"]},
        {"prompt": "one", "completions": ["a"], "rewards": [1.0]},
        {"prompt": "turned", "completions": ["a", " "], "rewards": [1.0, 2.0]},
        {"prompt": "again", "completions": ["again a", "again b"], "who": "me"},
        {"prompt": " ", "completions": ["a", "b"]},
    ]
    assert [record.prompt for record in read_prompts(rows)] == [row["prompt"] for row in rows]
    said = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert said == [
        "records: nobody reads the columns who (1 of 5 records)",
        "1 of 5 prompts have no text, and are answered nevertheless (first: record 4)",
    ]
