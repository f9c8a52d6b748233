"""Rows as data sets are published: two responses and a preference, several with scores, trees; the rest is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data import RankedRecord, RecordError, read_records, record_from_row


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TALK = (user("Hi"), assistant("Hello."), user("Why?"))
SHP = {
    "post_id": "x",
    "history": "Why?",
    "human_ref_A": "a",
    "human_ref_B": "b",
    "labels": 1,
    "score_A": 9,
    "score_B": 4,
}
WEBGPT = {"question": {"dataset": "eli5", "full_text": "Why?"}, "answer_0": "b", "answer_1": "a", "score_0": -0.5,
          "score_1": 0.5}  # fmt: skip
HELP3 = {"context": list(TALK), "response1": "b", "response2": "a", "overall_preference": 2, "domain": "general"}
HELP2 = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -1}
ARENA = {"conversation_a": [*TALK, assistant("b")], "conversation_b": [*TALK, assistant("a")], "winner": "model_b"}
ARENA_TEXTS = {"prompt": '["Why?"]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 1,
               "winner_model_b": 0, "winner_tie": 0}  # fmt: skip
TLDR = {"info": {"subreddit": "tifu", "title": "T", "post": "Long."}, "choice": 1,
        "summaries": [{"text": "b", "policy": "x"}, {"text": "a", "policy": "y"}]}  # fmt: skip
PKU = {"prompt": "Why?", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0}
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "message_id": "m0", "text": "Hi", "role": "prompter",
        "replies": [
            {"text": "b", "role": "assistant", "rank": 1, "replies": []},
            {"text": "a", "role": "assistant", "rank": 0, "replies": [
                {"text": "Why?", "role": "prompter", "message_id": "m1", "replies": [
                    {"text": "x", "role": "assistant", "rank": None},
                    {"text": "z", "role": "assistant", "rank": 4},
                    {"text": "y", "role": "assistant", "rank": 2},
                ]},
            ]},
        ],
    },
}  # fmt: skip

SCORED = (("b", 0), ("a", 5), ("c", 0))

# format, row as published, record it means
PUBLISHED: dict[str, tuple[str, dict[str, Any], RankedRecord]] = {
    "shp": ("shp", SHP, RankedRecord("Why?", ("a", "b"), (9.0, 4.0))),
    "shp, B": ("shp", {**SHP, "labels": 0}, RankedRecord("Why?", ("b", "a"), (4.0, 9.0))),
    "webgpt": ("webgpt", WEBGPT, RankedRecord("Why?", ("a", "b"), (0.5, -0.5))),
    "helpsteer 3": ("helpsteer", HELP3, RankedRecord(TALK, ("a", "b"))),
    "helpsteer 2": ("helpsteer", HELP2, RankedRecord("Why?", ("a", "b"))),
    "arena": ("arena", ARENA, RankedRecord(TALK, ("a", "b"))),
    "arena, texts": ("arena", ARENA_TEXTS, RankedRecord("Why?", ("a", "b"))),
    "tldr": ("tldr", TLDR, RankedRecord("SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:", ("a", "b"))),
    "tldr, news": (
        "tldr",
        {**TLDR, "info": {"article": "Long.", "post": None}, "choice": 0},
        RankedRecord("Article: Long.\n\nTL;DR:", ("b", "a")),
    ),
    "pku": ("pku", PKU, RankedRecord("Why?", ("a", "b"))),
    "stack, paired": (
        "stack_paired",
        {"qid": 1, "question": "Why?", "response_j": "a", "response_k": "b"},
        RankedRecord("Why?", ("a", "b")),
    ),
    "stack, scored": (
        "stack_exchange",
        {"qid": 1, "question": "Why?", "answers": [{"text": t, "pm_score": s} for t, s in SCORED]},
        RankedRecord("Why?", ("a", "b", "c"), (5.0, 0.0, 0.0)),
    ),
    "generations": (
        "generations",
        {"instruction": "Why?", "generations": ["b", "a"], "ratings": [2, 4.5], "model_name": "m"},
        RankedRecord("Why?", ("a", "b"), (4.5, 2.0)),
    ),
    "generations, input and rating": (
        "generations",
        {"input": "Why?", "generations": ["a", "b"], "rating": [5, 1]},
        RankedRecord("Why?", ("a", "b"), (5.0, 1.0)),
    ),
    "simpo": (
        "simpo",
        {"prompt": "Why?", "all_generated_responses": ["b", "c", "a"], "all_rm_scores": [0.25, 0.125, 0.5],
         "chosen": [user("Why?"), assistant("a")], "rejected": [user("Why?"), assistant("c")]},
        RankedRecord((user("Why?"),), ("a", "b", "c"), (0.5, 0.25, 0.125)),
    ),
    "oasst": ("oasst", {"prompt": {**TREE["prompt"], "replies": [  # type: ignore[dict-item]
        {"text": "b", "rank": 1}, {"text": "a", "rank": 0}]}}, RankedRecord((user("Hi"),), ("a", "b"))),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("detected", [True, False])
def test_rows_as_they_are_published(tmp_path: Path, case: str, detected: bool) -> None:
    name, row, expected = PUBLISHED[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert read_records(path, "auto" if detected else name) == [expected, expected]
    assert record_from_row(row) == expected


def test_a_tree_gives_a_record_for_every_ranked_place(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    bare = {"prompt": {"text": "Alone", "replies": [{"text": "a", "rank": 0}]}}
    records = read_records([TREE, bare])
    asked = (user("Hi"), assistant("a"), user("Why?"))
    assert records == [RankedRecord((user("Hi"),), ("a", "b")), RankedRecord(asked, ("y", "z"))]
    assert [record.source for record in records] == ["record 0: m0", "record 0: m1"]
    assert "records: 1 trees have no message with two ranked replies" in caplog.text
    with pytest.raises(RecordError, match=r"expected one message with ranked replies \(read_records takes trees\)"):
        record_from_row(TREE)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({**WEBGPT, "score_0": 0.5}, r"score_0: expected a preference .*\(a tie has no order; skip such records\)"),
    ({**WEBGPT, "question": {"id": 3}}, "question.full_text: expected a text, got None"),
    ({**HELP3, "overall_preference": 0}, "overall_preference: expected a preference"),
    ({**HELP3, "response2": ""}, "response2: expected a response that is not empty"),
    ({**ARENA, "winner": "tie (bothbad)"}, r"winner: expected a preference .*got 'tie \(bothbad\)'"),
    ({**ARENA, "conversation_b": [*TALK[:2], user("How?"), assistant("a")]},
     "conversation_b: expected the messages of conversation_a before the last one"),
    ({**ARENA_TEXTS, "winner_model_a": 0, "winner_tie": 1}, "winner_tie: expected a preference"),
    ({**ARENA_TEXTS, "response_b": '["a", "b"]'}, "response_b: expected one turn"),
    ({**ARENA_TEXTS, "response_b": "[null]"}, r"response_b: expected one turn .*got \[None\]"),
    ({**ARENA_TEXTS, "response_a": '["a", null]'}, r"response_a: expected one turn .*got \['a', None\]"),
    ({**ARENA_TEXTS, "prompt": "[null]"}, r"prompt: expected one turn .*got \[None\]"),
    ({**PKU, "better_response_id": -1}, "better_response_id: expected a preference"),
    ({**SHP, "labels": 2}, "labels: expected 1 .*got 2"),
    ({**SHP, "score_B": None}, "score_B: expected a number, got None"),
    ({**TLDR, "choice": None, "summaries": []}, "unknown format"),
    ({"instruction": "q", "generations": ["a", "b"], "ratings": [1, None]}, r"ratings\[1\]: expected a number, got N"),
    ({"prompt": "q", "completion": "a", "label": True}, "completion: expected several responses of one prompt, .*KTO"),
    ({"prompt": "Other.", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
     "prompt: expected a text that the messages of chosen repeat .*got 'Other.'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_ties_labels_and_other_rows_without_an_order(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=f"^record: {message}"):
        record_from_row(row)


def test_the_way_out_that_kto_rows_are_told_works() -> None:
    rows = [{"prompt": "q", "completion": text, "label": text == "b"} for text in "ab"]
    with pytest.raises(RecordError, match=r"--columns.completions completion --columns.rewards label --col"):
        read_records(rows)
    columns = {"completions": "completion", "rewards": "label", "group_by": "prompt"}
    with pytest.raises(RecordError, match="prompt"):
        read_records(rows, columns={**columns, "group_by": "promt"})
    assert read_records(rows, rank_by_reward=True, columns=columns) == [RankedRecord("q", ("b", "a"), (1.0, 0.0))]


ODD: tuple[Any, ...] = (
    3,
    -0.5,
    True,
    "x",
    "",
    "[",
    [],
    ["a"],
    [1, 2],
    [None],
    [{}],
    [{"role": "user"}],
    {},
    {"replies": [1]},
)


@pytest.mark.parametrize("case", PUBLISHED)
def test_odd_values_are_told_in_a_sentence_and_never_end_in_a_traceback(case: str) -> None:
    _, row, _ = PUBLISHED[case]
    for name in row:
        for value in ODD:
            for changed in ({**row, name: value}, {key: item for key, item in row.items() if key != name}):
                errors: list[RecordError] = []
                try:
                    read_records([changed, row], errors=errors)
                except RecordError as error:
                    errors.append(error)
                assert all("expected" in str(error) or "unknown format" in str(error) for error in errors)
