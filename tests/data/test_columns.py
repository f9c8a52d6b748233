"""Content in parts, and columns that other libraries read: used, refused or warned of, never left out unsaid."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RecordError, read_records, record_from_row
from tests.support.tiny import make_tokenizer

ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one ", "image": None}, {"type": "text", "text": "two"}]
    prompt = [{"role": "user", "content": parts}]
    plain = [{"role": "user", "content": "one two"}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    record = record_from_row({"prompt": prompt, "completions": [answer, "no"]})
    assert record == record_from_row({"prompt": plain, "completions": ["yes", "no"]})
    chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    assert record_from_row({"chosen": chosen, "rejected": rejected}) == record


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "image": "x"}, r"f:3: prompt\[0\].content\[0\]: expected a part .*\"text\".*, got .*image"),
        ("text", r"f:3: prompt\[0\].content\[0\]: expected a part"),
        ({"type": "text"}, r"f:3: prompt\[0\].content\[0\].text: expected a text, got None"),
    ],
)
def test_other_parts_are_refused(part: Any, message: str) -> None:
    row = {"prompt": [{"role": "user", "content": [part]}], "completions": ["a", "b"]}
    with pytest.raises(RecordError, match=f"^{message}"):
        record_from_row(row, "f:3")


@pytest.mark.parametrize(("name", "value", "nothing"), [("system", "be kind", "")])
def test_columns_that_would_change_the_prompt_are_refused(tmp_path: Path, name: str, value: Any, nothing: Any) -> None:
    with pytest.raises(RecordError, match=f"^f:3: {name}: expected no such column .*, got "):
        record_from_row({**ROW, name: value}, "f:3")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROW, name: value}) + "\n")
    with pytest.raises(RecordError, match=f"rows.jsonl:1: {name}: expected no such column"):
        read_records(path)
    for empty in (None, nothing):
        assert record_from_row({**ROW, name: empty}) == record_from_row(ROW)


def test_a_margin_column_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"^margin: this column is not used; .* margin \* \(j - i\)"):
        assert record_from_row({**ROW, "margin": 0.5}) == record_from_row(ROW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record_from_row({**ROW, "margin": None})


TEMPLATE = (
    "{% if tools %}T{{ tools | map(attribute='name') | join(',') }} {% endif %}"
    "{% for message in messages %}{% if loud and message.role == 'user' %}! {% endif %}"
    "{{ message.content }}{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
)


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    row = {**ROW, "tools": [{"name": "f", "more": None}, {"name": "g"}], "chat_template_kwargs": {"loud": True}}
    record = record_from_row(row)
    assert record.template == {"loud": True, "tools": [{"name": "f"}, {"name": "g"}]}
    assert record_from_row(record.as_dict()) == record
    feature = RankedCollator(tokenizer).tokenize_record(record)
    assert tokenizer.decode(feature["prompt_ids"]) == "Tf,g ! q "
    assert [tokenizer.decode(ids) for ids in feature["completion_ids"]] == ["a</s>", "b</s>"]
    plain = RankedCollator(tokenizer).tokenize_record(record_from_row(ROW))
    assert tokenizer.decode(plain["prompt_ids"]) == "q "
    # Each without what it needs.
    tokenizer.chat_template = TEMPLATE.replace("tools", "t")
    with pytest.raises(RecordError, match=r"^record: tools: expected a chat template that writes tools"):
        RankedCollator(tokenizer).tokenize_record(record)
    tokenizer.chat_template = None
    with pytest.raises(RecordError, match=r"^record: tools: expected a tokenizer with a chat template"):
        RankedCollator(tokenizer).tokenize_record(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": "f"}, "tools: expected a list of tools"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs: expected a mapping"),
        ({"chat_template_kwargs": {"tokenize": True}}, "variables of the chat template's own, got 'tokenize'"),
        ({"prompt": "q", "tools": [{"name": "f"}]}, "tools: expected messages as prompt"),
        ({"prompt": "q", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: expected messages as prompt"),
    ],
)
def test_template_columns_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record_from_row({**ROW, **changes})
