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
    with pytest.raises(RecordError, match=r"record 1: completions: expected a prompt alone, as in the first row"):
        read_prompts([{"prompt": "a"}, {"prompt": "b", "completions": ["x"]}])
    with pytest.raises(RecordError, match=r"record 1: prompt: expected a prompt, got None"):
        read_prompts([{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(RecordError, match="unknown format"):
        read_prompts([{"prompt": "a", "other": 1}])


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
