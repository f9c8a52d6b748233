"""Responses that say more than their content, or repeat their prompt: refused, taken off, or said."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from clha_fast.data import RankedRecord, RecordError, read_records, record_from_row

ASK = [{"role": "user", "content": "Why?"}]


def answer(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "Yes.", **more}]


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_content": "Hm."},
        {"thinking": "Hm."},
        {"tool_calls": [{"type": "function"}]},
        {"content": None, "tool_calls": [{"type": "function"}]},
        {"content": "", "function_call": {"name": "f"}},
    ],
)
def test_a_response_is_its_content_alone(more: dict[str, Any]) -> None:
    key = next(name for name in more if name != "content")
    with pytest.raises(RecordError, match=rf"^record: completions\[1\]\[0\].{key}: expected a response of content"):
        record_from_row({"prompt": ASK, "completions": [answer(), answer(**more)]})
    pair = {"chosen": [*ASK, *answer()], "rejected": [*ASK, *answer(**more)]}
    with pytest.raises(RecordError, match=rf"^record: rejected\[1\].{key}: expected a response of content alone"):
        record_from_row(pair)
    empty = dict.fromkeys(more) | {"content": "No."}
    assert record_from_row({**pair, "rejected": [*ASK, *answer(**empty)]}).completions == ("Yes.", "No.")


def test_other_keys_of_a_response_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    read_records([{"chosen": [*ASK, *answer(model="m")], "rejected": [*ASK, *answer(content="No.")]}])
    assert "nobody reads the columns chosen.model" in caplog.text


LONG = "Write a poem about rain."
ENDS = (" Drip.", "\nDrop.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": LONG, "chosen": LONG + " Drip.", "rejected": LONG + "\nDrop."},
        {"prompt": LONG, "completions": [LONG + " Drip.", LONG + "\nDrop."]},
        {"query": LONG, "responses": [LONG + "\nDrop.", LONG + " Drip."], "scores": [1, 2]},
        {"instruction": LONG, "completions": [{"response": LONG + t, "overall_score": 1} for t in ENDS]},
    ],
)  # fmt: skip
def test_a_repeated_prompt_is_taken_off(row: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (record,) = read_records([row])
    assert (record.prompt, record.completions) == (LONG, (" Drip.", "\nDrop."))
    assert "1 of 1 records had responses that repeat the prompt, which was taken off them" in caplog.text


def test_a_prompt_that_may_begin_an_answer_by_chance_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    row = {"prompt": "Hi", "completions": ["Hi there.", "Hi."]}
    assert read_records([row]) == [RankedRecord("Hi", ("Hi there.", "Hi."))]
    assert "1 of 1 records have responses that begin with their short prompt, which was left" in caplog.text
    caplog.clear()
    # One of them alone repeats: an answer like any other.
    row = {"prompt": LONG, "completions": [LONG + " Drip.", "Drop."]}
    assert read_records([row])[0].completions == (LONG + " Drip.", "Drop.")
    assert not caplog.text
    read_records([row, {**row, "prompt": "Why?"}, {**row, "completions": ["Drip.", "Drop."]}])
    assert not caplog.text
    read_records([row, row, {**row, "completions": ["Drip.", "Drop."]}])
    assert "2 of 3 records have responses that begin with the prompt, beside others that do not: it was" in caplog.text
    with pytest.raises(RecordError, match=r"completions\[1\]: expected a response that is not empty"):
        read_records([{"prompt": LONG, "completions": [LONG + " Drip.", LONG]}])
