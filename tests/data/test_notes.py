"""What is right and still worth knowing: counted over a file, said in one sentence each."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.cli import main as cli
from clha_fast.cli.data import convert as convert_command
from clha_fast.data import RankedRecord, RecordError, convert, make_record, read_records
from clha_fast.data.notes import Notes
from clha_fast.data.split import split_records
from tests.support.command_line import one_sentence
from tests.support.tiny import make_tokenizer


def counted(rewards: list[list[float] | None], texts: list[str] | None = None) -> Notes:
    notes = Notes("f")
    for values in rewards:
        answers = texts or [str(k) for k in range(len(values or [0, 0]))]
        notes.see(make_record("p", answers, rewards=values))
    return notes


@pytest.mark.parametrize(
    ("rewards", "pairs", "against"),
    [
        ([[3, 2, 1]], 3, 0),
        ([[1, 2, 3]], 3, 3),
        ([[1, 1]], 0, 0),
        ([[2, 1], [1, 2]], 2, 1),
        ([[2, 1], [1, 2], [0, 5]], 3, 2),
        ([[1, 3, 2, 2]], 5, 3),
        ([None, None], 0, 0),
    ],
)
def test_pairs_against_their_rewards(rewards: list[list[float] | None], pairs: int, against: int) -> None:
    notes = counted(rewards)
    assert (notes.pairs, notes.reversed) == (pairs, against)
    said = [text for text in notes.sentences() if "ranked against" in text]
    assert bool(said) == (2 * against > pairs)
    if said:
        assert said == [
            f"f: {against} of {pairs} pairs are ranked against their rewards (first: record); rank_by_reward=True "
            "(--rank_by_reward) orders them by reward"
        ]


@pytest.mark.parametrize(
    ("pairs", "against", "said"),
    [
        *((99, 49, False), (99, 50, True), (100, 40, False), (100, 41, True), (100, 50, True)),
        *((10_000, 4_900, False), (10_000, 4_901, True), (346, 146, False)),
    ],
)
def test_an_order_by_chance(pairs: int, against: int, said: bool) -> None:
    """Two standard deviations of a fair coin's; people who rank agree with a reward model in more pairs than that."""
    notes = counted([[2, 1]] * (pairs - against) + [[1, 2]] * against)
    found = [text for text in notes.sentences() if "ranked against" in text]
    assert bool(found) == said
    assert ("about as many as in an order by chance" in "".join(found)) == (said and 2 * against <= pairs)


@pytest.mark.parametrize("seed", range(5))
def test_rewards_of_no_order_are_said(seed: int) -> None:
    rng = random.Random(seed)
    drawn = [[rng.gauss(0, 1) for _ in range(rng.randint(2, 5))] for _ in range(50)]
    notes = counted([*drawn, *(values[::-1] for values in drawn)])  # half of the pairs, to the pair
    assert any("ranked against their rewards" in text for text in notes.sentences())


@pytest.mark.parametrize(
    ("prompt", "answers", "said"),
    [
        ("", ["a", "b"], "f: 1 of 1 records have a prompt without any text, which their responses answer"),
        (" \n", ["a", "b"], "f: 1 of 1 records have a prompt without any text, which their responses answer"),
        (
            [{"role": "user", "content": ""}],
            ["a", "b"],
            "f: 1 of 1 records have a prompt without any text, which their",
        ),
        ("", ["a text alone"], "f: 1 of 1 records have one response, which ranks nothing"),
        ([{"role": "system", "content": " "}, {"role": "user", "content": "p"}], ["a", "b"], ""),
        ("p", [" ", "b"], "f: 1 of 1 records have a response of blanks alone, which is ranked nevertheless"),
        (
            "p",
            ["a", "\n\t", "\u3000"],
            "f: 1 of 1 records have a response of blanks alone, which is ranked nevertheless",
        ),
        ("p", [" a", "b\n"], ""),
    ],
)
def test_texts_that_say_nothing(prompt: Any, answers: list[str], said: str) -> None:
    notes = Notes("f")
    read_records([{"prompt": prompt, "completions": answers}], notes=notes)
    assert "; ".join(notes.sentences()).startswith(said)
    assert len(notes.sentences()) == bool(said)


def test_single_and_equal_responses() -> None:
    assert counted([[1.0]], ["a"]).sentences() == [
        "f: 1 of 1 records have one response, which ranks nothing (first: record)"
    ]
    (said,) = counted([None, None], ["a", "b", "a"]).sentences()
    assert said == "f: 2 of 2 records have two equal responses, which are ranked nevertheless (first: record)"
    assert counted([[2, 1]]).sentences() == []


def test_each_count_says_where_its_first_record_is() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 0]},
        {"prompt": "p", "completions": ["a"], "rewards": [1]},
        {"prompt": "p", "completions": ["a", "a"], "rewards": [1, 0]},
        {"prompt": "p", "completions": [" ", "a"], "rewards": [0, 1]},
        {"prompt": " ", "completions": ["a", "b"], "rewards": [0, 1]},
    ]
    notes = Notes("f")
    read_records([*rows, *rows], notes=notes)
    assert notes.first == {
        **{"single": "record 1", "equal": "record 2", "blank": "record 3", "silent": "record 4"},
        "reversed": "record 3",
    }
    for name, said in (("single", 1), ("equal", 2), ("blank", 3), ("silent", 4)):
        assert getattr(notes, name) == 2, name
        assert sum(f"(first: record {said})" in sentence for sentence in notes.sentences()) == 1, name
    later = Notes("f")
    read_records(rows, notes=later)
    later.first = dict.fromkeys(later.first, "record 7")
    notes.merge(later)
    assert "record 7" not in notes.first.values(), "parts are merged in their order"


def test_merged_counts_are_those_of_one() -> None:
    parts = [counted([[1, 2]]), counted([[3, 1, 2], None])]
    for part in parts:
        part.unread.update(["x"])
    merged = Notes("f")
    for part in parts:
        merged.merge(Notes(**json.loads(json.dumps(part.as_dict()))))
    whole = counted([[1, 2], [3, 1, 2], None])
    whole.unread.update(["x", "x"])
    assert merged == whole


def test_convert_leaves_bad_records_out_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"prompt": "p", "completions": ["a", "b"], "rewards": [0, 1]},
        {"prompt": "q", "completions": ["a", ""]},
        {"prompt": "r", "completions": ["c"], "rewards": [2]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = (
        r":2: completions\[1\]: expected a response that is not empty.*; where others are good, skip_bad_records=True "
    )
    with pytest.raises(RecordError, match=said):
        convert_command([str(path), str(out)])
    for words, why in (
        (["inspect", str(path)], "inspect always leaves bad records out, says how many there are and names the first"),
        (["prepare", "ranked", str(path), str(out), "--test", "0.2"], "prepare always leaves bad records out, and"),
    ):
        for flag in ("--skip-bad-records", "--skip_bad_records"):
            with pytest.raises(SystemExit):
                cli.main([*words, flag])
            error = one_sentence(capsys)
            assert error.startswith(f"clha-fast {words[0]}: --skip-bad-records: expected none, for {why}"), error
    for flag in ("--skip-bad-records", "--skip_bad_records"):
        assert convert_command([str(path), str(out), flag, "--overwrite"]) == 0
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed[0].endswith("2 records, 3 responses, 2 records with rewards")
    assert printed[1] == "1 of 1 pairs are ranked against their rewards"
    assert printed[2].startswith(f"1 bad records left out, the first: {path}:2: completions[1]")
    assert f"{path}: 1 of 2 records have one response, which ranks nothing" in caplog.text
    errors: list[RecordError] = []
    with pytest.raises(RecordError, match=r"expected at least one good record, got 1 bad ones; the first: record 0"):
        convert(rows[1:2], tmp_path / "none.jsonl", errors=errors)
    assert not (tmp_path / "none.jsonl").exists()


def test_nothing_left_says_why() -> None:
    bad = [{"prompt": "p", "completions": [""]}] * 3
    with pytest.raises(RecordError, match=r"got none \(all 3 are bad, the first: record 0: completions\[0\]"):
        RankedDataset(bad, RankedCollator(make_tokenizer()), skipped=[])
    records = [RankedRecord("one prompt", ("a", "b"))] * 20
    with pytest.raises(ValueError, match=r"eval_fraction: 0.1 of 20 records with 1 different prompts leaves none for "):
        split_records(records, 0.1, 0)
    assert read_records([record.as_dict() for record in records]) == records
