"""What a row holds and nobody reads: refused where a field would be derived instead of it, said otherwise, once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.stream import RankedStream
from clha_fast.data import RankedRecord, RecordError, convert, read_records
from tests.support.tiny import make_tokenizer

PAIR = {"chosen": "The answer is four.", "rejected": "The answer is five."}
TALK = [{"role": "user", "content": "Why?"}]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "clha_fast.data"]


# columns with the prompt in them, the mapping that reads it
PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"post": "A long post."}, "--columns.prompt post"),
    ({"task_input": "x", "source": "hh"}, "--columns.prompt task_input"),
    ({"instruction": "Add", "input": "1 2"}, "--columns.prompt '[instruction, input]'"),
    ({"source": "Once upon a time there was an article."}, "--columns.prompt source"),
    ({"user_query": "x", "id": "7"}, "--columns.prompt user_query"),
    ({"history": TALK}, "--columns.prompt history"),
    ({"conversations": [{"from": "human", "value": "Why?"}]}, "--columns.prompt conversations"),
    ({"Prompt": "Why?"}, "--columns.prompt Prompt"),
]


@pytest.mark.parametrize(("more", "way"), PROMPTS, ids=[way for _, way in PROMPTS])
def test_no_prompt_is_derived_while_a_column_may_hold_it(more: dict[str, Any], way: str) -> None:
    with pytest.raises(RecordError, match=r"^record 0: prompt: expected a column of that name, got .*nobody") as caught:
        read_records([{**PAIR, **more}])
    assert f"({way})" in str(caught.value)
    assert "(--columns.prompt null)" in str(caught.value)
    errors: list[RecordError] = []
    with pytest.raises(RecordError, match=r"got 2 bad ones; the first: record 0: prompt"):
        read_records([{**PAIR, **more}] * 2, errors=errors)


@pytest.mark.parametrize("more", [{"id": "a-7", "source": "hh-rlhf"}, {"chosen_model": "gpt-4"}, {"n": 3}, {"x": ""}])
def test_what_describes_a_row_is_no_prompt(more: dict[str, Any]) -> None:
    assert read_records([{**PAIR, **more}]) == [RankedRecord("The answer is", (" four.", " five."))]


@pytest.mark.parametrize("name", ["messages", "context"])
def test_conversations_that_lack_what_came_before(name: str) -> None:
    sides = {side: [*TALK, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(RecordError, match=f"prompt: expected a column of that name, got {name}"):
        read_records([{**sides, name: [{"role": "user", "content": "Earlier."}]}])
    # The same turns once more, or a text, are no other prompt.
    for same in (sides["chosen"], TALK, "a note"):
        assert read_records([{**sides, name: same}])[0].prompt == tuple(TALK)


NEAR = [
    "chosen_score",
    "score-chosen",
    "chosenRating",
    "rating_chosen",
    "reward_chosen",
    "rm_score_chosen",
    "Chosen Reward",
]


@pytest.mark.parametrize("name", NEAR)
def test_scores_of_a_pair_under_any_spelling(name: str) -> None:
    other = name.replace("chosen", "rejected").replace("Chosen", "Rejected")
    row = {"prompt": "q", "chosen": "a", "rejected": "b", name: 2, other: 1}
    assert read_records([row]) == [RankedRecord("q", ("a", "b"), (2.0, 1.0))]
    with pytest.raises(RecordError, match=f"{other}: expected a number, got None"):
        read_records([{**row, other: None}])


def test_two_pairs_of_scores_are_refused_unless_one_is_the_format_s_own() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 5, "rejected-rating": 3}
    more = {**row, "rm_score_chosen": 0.5, "rm_score_rejected": 0.25}
    with pytest.raises(RecordError, match=r"expected one pair of columns with scores, .*--columns.rewards '\[chosen-r"):
        read_records([more])
    mapping = {"rewards": ["rm_score_chosen", "rm_score_rejected"]}
    assert read_records([more], columns=mapping)[0].rewards == (0.5, 0.25)
    assert read_records([{**row, "score_chosen": 1, "score_rejected": 0}])[0].rewards == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "field"),
    [("all_rm_scores", "rewards"), ("model_ratings", "rewards"), ("rewardScores", "rewards"), ("human_rank", "ranks")],
)
def test_columns_that_look_like_rewards_are_refused(name: str, field: str) -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], name: [1, 2, 3]}
    with pytest.raises(RecordError, match=f'^record 0: {name}: unknown field, expected "{field}", .*--columns.{field}'):
        read_records([row])
    assert read_records([row], columns={field: name})[0].completions == ("a", "b", "c")
    # With rewards of its own the column is another one.
    assert read_records([{**row, "rewards": [3, 2, 1]}])[0].rewards == (3.0, 2.0, 1.0) or field == "ranks"


ROWS = [
    {"prompt": "p", "completions": ["a", "b"], "topic": "x", "note": None},
    {"prompt": "q", "completions": ["a", "b"], "topic": "y", "note": "kept"},
]
SENTENCE = "nobody reads the columns topic, note (1 of 2 records)"


def test_unread_columns_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    read_records(path)
    convert(path, tmp_path / "out.jsonl")
    assert [text.partition(";")[0] for text in said(caplog)] == [f"{path}: {SENTENCE}"] * 2
    caplog.clear()
    read_records(tmp_path / "out.jsonl")
    assert said(caplog) == []


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("table", [False, True])
def test_rows_given_to_a_dataset_or_stream_are_no_exception(
    caplog: pytest.LogCaptureFixture, num_proc: int, table: bool
) -> None:
    caplog.set_level(logging.WARNING)
    rows: Any = ROWS
    if table:
        rows = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    collator = RankedCollator(make_tokenizer())
    RankedDataset(rows, collator, num_proc=num_proc)
    assert [text.partition(";")[0] for text in said(caplog)] == [f"records: {SENTENCE}"]
    caplog.clear()
    for _ in range(2):
        stream = RankedStream(rows, collator)
    list(stream), list(stream)
    names = [text.partition(";")[0].partition("columns ")[2] for text in said(caplog)]
    assert names == ["topic", "note"]


def test_what_nested_objects_hold_beside_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    answers = [{"response": text, "overall_score": 1, "custom_system_prompt": "x"} for text in "ab"]
    read_records([{"instruction": "q", "completions": answers}])
    assert "nobody reads the columns completions.custom_system_prompt" in said(caplog)[0]


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio", "pixel_values"])
def test_what_is_no_text_is_refused(name: str) -> None:
    row = {"prompt": "p", "completions": ["a", "b"]}
    with pytest.raises(RecordError, match=f"^record 0: {name}: expected rows of text alone"):
        read_records([{**row, name: ["x"]}])
    assert len(read_records([{**row, name: None}, {**row, name: []}])) == 2
