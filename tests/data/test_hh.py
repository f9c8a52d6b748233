"""Raw HH-RLHF transcripts: whole turns and the published first paragraphs, and what is left out for which reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data import hh
from clha_fast.data.prepare import Dropped, RawFile, find_files
from clha_fast.data.readers import read_records
from clha_fast.data.records import RecordError
from tests.support.raw_transcripts import (
    DISAGREE,
    HUMAN_INSIDE,
    LEFT_OUT,
    PARAGRAPHS,
    TWICE,
    hh_folder,
    row,
    write,
)

FILE = RawFile("f", "f", "helpful_base", "train")
PARSES = {"clean": hh.read_clean, "published": hh.read_published}


def reason(parse: str, given: Any) -> str:
    with pytest.raises(Dropped) as caught:
        PARSES[parse](given, "f:1", FILE)
    return str(caught.value)


def test_whole_turns() -> None:
    record = hh.read_clean(PARAGRAPHS, "f:1", FILE)
    assert record.prompt == (
        {"role": "user", "content": "How do I bake?\n\nI have flour."},
        {"role": "assistant", "content": "With an oven.\n\n\nHave you one?"},
        {"role": "user", "content": "Yes"},
    )
    assert record.completions == ("Heat it.\n\nThen mix.", "No idea.")
    assert (record.subset, record.source, record.rewards) == ("helpful_base", "f:1", None)


def test_clean_reads_what_the_reader_of_raw_files_reads() -> None:
    for given in (PARAGRAPHS, row("Grüße, 世界 👋"), row("a", "b\n\nc", "d", good="e\n\n\n\nf")):
        (expected,) = read_records([given])
        assert hh.read_clean(given, "record 0", FILE) == dataclasses.replace(expected, subset="helpful_base")


def test_published_keeps_the_first_paragraph_of_a_turn() -> None:
    record = hh.read_published(PARAGRAPHS, "f:1", FILE)
    assert record.prompt == "\n\nHuman: How do I bake?\n\nAssistant: With an oven.\n\nHuman: Yes\n\nAssistant:"
    assert record.completions == (" Heat it.", " No idea.")
    assert (record.subset, record.source) == ("helpful_base", "f:1")


def test_published_joins_turns_of_one_speaker_and_does_not_look_behind_the_colon() -> None:
    record = hh.read_published(TWICE, "f:1", FILE)
    assert (record.prompt, record.completions) == ("\n\nHuman: a\n\nAssistant:", (" b\nc", " b\nd"))
    glued = {"chosen": "\n\nHuman:Hi\n\nAssistant: a", "rejected": "\n\nHuman:Hi\n\nAssistant: b"}
    assert hh.read_published(glued, "f:1", FILE).prompt == "\n\nHuman: i\n\nAssistant:"


def test_published_takes_the_chosen_transcripts_prompt_unchecked() -> None:
    record = hh.read_published(DISAGREE, "f:1", FILE)
    assert record.prompt == "\n\nHuman: How are you?\n\nAssistant: Fine.\n\nHuman: And?\n\nAssistant:"
    assert record.completions == (" Good.", " Bad.")


@pytest.mark.parametrize("parse", PARSES)
@pytest.mark.parametrize(("why", "given"), [case for case in LEFT_OUT if not isinstance(case[1], str)])
def test_reasons(parse: str, why: str, given: Any) -> None:
    assert reason(parse, given) == why


def test_reasons_of_one_parse_alone() -> None:
    assert reason("clean", DISAGREE) == "the transcripts disagree before the last turn"
    assert reason("clean", TWICE) == "two turns of one speaker in a row"
    assert reason("clean", HUMAN_INSIDE) == "no Assistant turn at the end"
    assert reason("published", HUMAN_INSIDE) == "different numbers of turns"
    # The paragraphs that are left are the same.
    assert reason("published", row("Hi", good="Well.\n\nYes.", bad="Well.\n\nNo.")) == "identical answers"
    # What does not begin a piece after a blank line is no turn.
    assert hh.read_clean(row("Hi", good="As\nHuman: says"), "f:1", FILE).completions[0] == "As\nHuman: says"


@pytest.mark.parametrize("parse", PARSES)
def test_line_ends_of_another_system(parse: str) -> None:
    crlf = {name: text.replace("\n", "\r\n") for name, text in PARAGRAPHS.items()}
    assert PARSES[parse](crlf, "f:1", FILE) == PARSES[parse](PARAGRAPHS, "f:1", FILE)
    assert read_records([crlf]) == read_records([PARAGRAPHS])


def test_files_by_folder_and_name(tmp_path: Path) -> None:
    raw = hh_folder(tmp_path / "raw", 1, 1)
    write(raw / "red-team-attempts" / "red_team_attempts.jsonl", ["{}"])
    write(raw / ".cache" / "helpful-base" / "train.jsonl", ["{}"])
    (raw / "README.md").write_text("about")
    files, others = find_files([str(raw)], hh.known_file, hh.EXPECTED)
    assert {(file.name, file.subset, file.split) for file in files} == {
        ("harmless-base/train.jsonl.gz", "harmless_base", "train"),
        ("harmless-base/test.jsonl.gz", "harmless_base", "test"),
        ("helpful-base/train.jsonl", "helpful_base", "train"),
        ("helpful-base/test.jsonl", "helpful_base", "test"),
        ("helpful-online/train.jsonl.gz", "helpful_online", "train"),
        ("helpful-online/test.jsonl.gz", "helpful_online", "test"),
        ("helpful-rejection-sampled/train.jsonl.gz", "helpful_rejection", "train"),
        ("helpful-rejection-sampled/test.jsonl.gz", "helpful_rejection", "test"),
    }
    assert others == ["red-team-attempts/red_team_attempts.jsonl"]
    # One subset's folder, a glob, and a file twice.
    files, _ = find_files([str(raw / "helpful-base")], hh.known_file, hh.EXPECTED)
    assert [(file.subset, file.split) for file in files] == [("helpful_base", "test"), ("helpful_base", "train")]
    pattern = str(raw / "*" / "train.jsonl*")
    files, _ = find_files([pattern, str(raw / "helpful-base" / "train.jsonl")], hh.known_file, hh.EXPECTED)
    assert [file.subset for file in files] == ["harmless_base", "helpful_base", "helpful_online", "helpful_rejection"]


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "pairs.jsonl", [row("a")])
    with pytest.raises(
        ValueError, match=r"empty: expected train or test files of HH-RLHF .* got no file that could be"
    ):
        find_files([str(tmp_path / "empty")], hh.known_file, hh.EXPECTED)
    with pytest.raises(ValueError, match=r"other: expected train or test files .*, got pairs\.jsonl"):
        find_files([str(tmp_path / "other")], hh.known_file, hh.EXPECTED)
    with pytest.raises(ValueError, match=r"pairs\.jsonl: expected train or test files of HH-RLHF"):
        find_files([str(tmp_path / "other" / "pairs.jsonl")], hh.known_file, hh.EXPECTED)
    write(tmp_path / "raw" / "helpful-base" / "train.jsonl", [row("a")])
    write(tmp_path / "raw" / "helpful-base" / "train.jsonl.gz", [row("a")])
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz: expected one file of that name, got .*train\.jsonl, too"):
        find_files([str(tmp_path / "raw")], hh.known_file, hh.EXPECTED)
    with pytest.raises(FileNotFoundError):
        find_files([str(tmp_path / "nowhere")], hh.known_file, hh.EXPECTED)


def test_a_transcript_is_a_record_error_for_the_reader(tmp_path: Path) -> None:
    """The same rows through `read_records`, which has sentences instead of reasons."""
    with pytest.raises(RecordError, match="expected the messages of chosen before the last one"):
        read_records([DISAGREE])
