"""From raw files to train, dev and test: what is split how, counted where, and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data import hh, tldr
from clha_fast.data.extra import ExtraCandidates
from clha_fast.data.prepare import SUMMARY_FILE, find_files, prepare
from clha_fast.data.readers import read_records
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.split import prompt_key
from tests.support.raw_transcripts import DISAGREE, LEFT_OUT, hh_folder, questions, row, write


def run(raw: Path, out: Path, **options: Any) -> dict[str, Any]:
    files, _ = find_files([str(raw)], hh.known_file, hh.EXPECTED)
    return prepare(files, hh.read_clean, out, **{"dev": 0.2, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def keys(path: Path) -> set[str]:
    return {prompt_key(record) for record in read_records(path)}


def test_four_subsets(tmp_path: Path) -> None:
    summary = run(hh_folder(tmp_path / "raw"), tmp_path / "out")
    assert names(tmp_path / "out") == ["dev.jsonl", "prepare.json", "test.jsonl", "train.jsonl"]
    parts = {split: read_records(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert len(parts["train"]) + len(parts["dev"]) == 160
    assert len(parts["test"]) == 20
    assert {record.subset for record in parts["test"]} == set(hh.SUBSETS.values())
    for split, records in parts.items():
        written = summary["written"][f"{split}.jsonl"]
        assert (written["records"], written["prompts"]) == (len(records), len(records))
        for subset, count in written["subsets"].items():
            assert count == sum(record.subset == subset for record in records)
    sets = [keys(tmp_path / "out" / f"{split}.jsonl") for split in parts]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 180
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text()) == summary
    assert set(summary["files"]) == {
        f"{folder}/{split}.jsonl{end}"
        for folder, end in (("harmless-base", ".gz"), ("helpful-base", ""), ("helpful-online", ".gz"))
        for split in ("train", "test")
    } | {f"helpful-rejection-sampled/{split}.jsonl.gz" for split in ("train", "test")}
    assert all(len(digest) == 64 for digest in summary["files"].values())
    assert summary["counts"]["helpful_online"]["test"] == {"read": 5, "kept": 5, "dropped": {}}


def test_a_prompt_is_for_development_whatever_else_there_is(tmp_path: Path) -> None:
    run(hh_folder(tmp_path / "raw"), tmp_path / "whole")
    run(tmp_path / "raw" / "helpful-base", tmp_path / "part")
    whole, part = keys(tmp_path / "whole" / "dev.jsonl"), keys(tmp_path / "part" / "dev.jsonl")
    assert part == whole & (part | keys(tmp_path / "part" / "train.jsonl"))
    run(tmp_path / "raw", tmp_path / "more", dev=0.4)
    assert whole < keys(tmp_path / "more" / "dev.jsonl")
    run(tmp_path / "raw", tmp_path / "number", dev=len(whole))
    assert keys(tmp_path / "number" / "dev.jsonl") == whole
    run(tmp_path / "raw", tmp_path / "none", dev=0)
    assert names(tmp_path / "none") == ["prepare.json", "test.jsonl", "train.jsonl"]


@pytest.mark.parametrize("dev", [-1, 1.0, 2.5, True, float("nan"), -0.5])
def test_development_sets_that_are_none(tmp_path: Path, dev: Any) -> None:
    with pytest.raises(ValueError, match="dev: expected a number of prompts, or a fraction between 0 and 1, got"):
        run(hh_folder(tmp_path / "raw", 2, 1), tmp_path / "out", dev=dev)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("each", "dev", "side"),
    [(2, 8, "training"), (2, 100, "training"), (2, 0.999999, "training"), (0, 0.01, "development"), (0, 1, "training")],
)
def test_a_side_that_would_be_empty(tmp_path: Path, each: int, dev: float, side: str) -> None:
    raw = hh_folder(tmp_path / "raw", 2, 1)
    if not each:  # one prompt in all
        raw = tmp_path / "one"
        write(raw / "helpful-base" / "train.jsonl", questions("x", 1))
        write(raw / "helpful-base" / "test.jsonl", questions("y", 1))
    prompts = 8 if each else 1
    with pytest.raises(ValueError, match=rf"dev: \S+ of {prompts} different prompts leaves none for {side}; give "):
        run(raw, tmp_path / "out", dev=dev)


@pytest.mark.parametrize(("each", "dev"), [(1, 0.01), (2, 1e-9), (3, 0.01)])
def test_a_fraction_is_at_least_one_prompt(tmp_path: Path, each: int, dev: float) -> None:
    raw = hh_folder(tmp_path / "raw", each, 1)
    run(raw, tmp_path / "small", dev=dev)
    run(raw, tmp_path / "one", dev=1)
    small, one = (keys(tmp_path / name / "dev.jsonl") for name in ("small", "one"))
    assert small == one
    assert len(small) == 1


def test_records_of_one_prompt_stay_together_and_repeated_ones_go(tmp_path: Path) -> None:
    again = [row(f"Question {k}?", good=f"Yes {k}.", bad=f"Never {k}.") for k in range(20)]
    rows = [row(f"Question {k}?", good=f"Yes {k}.", bad=f"No {k}.") for k in range(20)]
    write(tmp_path / "raw" / "helpful-base" / "train.jsonl", [*rows, *again, *rows[:7]])
    write(tmp_path / "raw" / "harmless-base" / "train.jsonl", rows[3:5] + questions("x", 1))
    # Blanks at its ends make no other prompt.
    same = [row("Question 0?  ", good="a", bad="b"), row("Question 1?", good="Yes 1.", bad="No 1.")]
    write(tmp_path / "raw" / "helpful-base" / "test.jsonl", [*same, *questions("y", 3)])
    summary = run(tmp_path / "raw", tmp_path / "out", dev=6)
    train, dev = (read_records(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev"))
    assert {prompt_key(record) for record in dev}.isdisjoint(map(prompt_key, train))
    assert len({prompt_key(record) for record in dev}) == summary["written"]["dev.jsonl"]["prompts"] == 6
    assert len(train) + len(dev) == 41
    repeated = "the same prompt and answers as another record"
    counts = summary["counts"]
    dropped = [counts[subset]["train"]["dropped"].get(repeated, 0) for subset in ("harmless_base", "helpful_base")]
    assert sum(dropped) == 9
    assert counts["helpful_base"]["test"]["dropped"] == {"a test prompt that the training files have, too": 2}
    assert keys(tmp_path / "out" / "test.jsonl") == set(map(prompt_key, read_records(questions("y", 3))))


def test_every_record_left_out_is_counted(tmp_path: Path) -> None:
    rows = [*questions("a", 3), *(given for _, given in LEFT_OUT), DISAGREE, *questions("a", 3, 3)]
    write(tmp_path / "raw" / "helpful-base" / "train.jsonl.gz", rows)
    summary = run(tmp_path / "raw", tmp_path / "out", dev=1)
    count = summary["counts"]["helpful_base"]["train"]
    wanted = {why: sum(why == other for other, _ in LEFT_OUT) for why, _ in LEFT_OUT}
    assert count["dropped"] == {**wanted, "the transcripts disagree before the last turn": 1}
    assert count["read"] == len(rows) == count["kept"] + sum(count["dropped"].values())
    assert count["kept"] == 6
    assert summary["first"]["no Assistant turn at the end"] == "helpful-base/train.jsonl.gz:7"
    assert summary["first"]["not JSON"] == f"helpful-base/train.jsonl.gz:{3 + len(LEFT_OUT)}"


def test_nothing_good_names_the_subset(tmp_path: Path) -> None:
    raw = hh_folder(tmp_path / "raw", 3, 1)
    write(raw / "helpful-online" / "test.jsonl.gz", [DISAGREE, DISAGREE, row("a", good="", bad="b")])
    with pytest.raises(
        ValueError, match=r"helpful_online, test: expected at least one good record, got 3: the .* \(2\), an empty"
    ):
        run(raw, tmp_path / "out")
    write(raw / "helpful-online" / "test.jsonl.gz", [])
    with pytest.raises(ValueError, match=r"helpful-online/test\.jsonl\.gz: expected at least one record, got none"):
        run(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected files to train on beside it, got test files alone"):
        run(raw / "helpful-base" / "test.jsonl", tmp_path / "out")


def test_a_damaged_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    raw = hh_folder(tmp_path / "raw", 400, 1)
    path = raw / "helpful-online" / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RecordError, match=r"helpful-online/train\.jsonl\.gz: after line \d+: damaged gzip data"):
        run(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    raw, out = hh_folder(tmp_path / "raw"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    run(raw, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        FileExistsError, match=r"train\.jsonl: exists already; expected a new folder, or overwrite=True"
    ):
        run(raw, out)
    (raw / "helpful-base" / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected at least one record"):
        run(raw, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (raw / "helpful-base" / "train.jsonl").unlink()
    run(raw, out, overwrite=True, dev=0)
    assert names(out) == ["notes.txt", "prepare.json", "test.jsonl", "train.jsonl"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    import resource
    import signal

    raw = hh_folder(tmp_path / "raw", 400, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run(raw, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def answers(path: Path, records: list[RankedRecord], text: str) -> Path:
    rows = [{"prompt": record.as_dict()["prompt"], "answer": text.format(k)} for k, record in enumerate(records)]
    return write(path, rows)


def test_one_more_candidate(tmp_path: Path) -> None:
    raw, out = hh_folder(tmp_path / "raw"), tmp_path / "two"
    run(raw, out)
    train = read_records(out / "train.jsonl")
    known, last = train[:100], train[100]
    rows = [{"prompt": r.as_dict()["prompt"], "answer": f" Maybe {k}.\n"} for k, r in enumerate(known)]
    rows[0]["answer"] = known[0].completions[1] + " "  # somebody's answer again
    rows[1]["answer"] = ""
    rows += [
        {"prompt": last.as_dict()["prompt"], "completions": ["Perhaps.", "Perhaps not."]},
        {"prompt": "Another one", "answer": "x"},
    ]
    extra = ExtraCandidates(f"{write(tmp_path / 'extra.jsonl', rows)}:base")
    summary = run(raw, tmp_path / "three", extras=[extra])
    assert names(tmp_path / "three") == ["dev.jsonl", "prepare.json", "test.jsonl", "train.unranked.jsonl"]
    found = read_records(tmp_path / "three" / "train.unranked.jsonl")
    assert [r.completions for r in found[:98]] == [(*r.completions, f"Maybe {k}.") for k, r in enumerate(known)][2:]
    assert found[98].completions == (*last.completions, "Perhaps.")
    assert len(found) == 99
    assert all((a.prompt, a.subset) == (b.prompt, b.subset) for a, b in zip(found, [*known[2:], last], strict=True))
    assert summary["extra_candidates"] == [
        {"name": "base", "prompts": 102, "prompts_matched": 101, "answers": 102, "used": 99, "repeated": 1, "empty": 1}
    ]
    short = [c["train"]["dropped"].get("fewer than 3 different candidates", 0) for c in summary["counts"].values()]
    assert sum(short) == len(train) - 99
    for split in ("dev", "test"):  # of which the file knows no prompt
        assert (out / f"{split}.jsonl").read_bytes() == (tmp_path / "three" / f"{split}.jsonl").read_bytes()
    run(raw, tmp_path / "short", extras=[ExtraCandidates(str(tmp_path / "extra.jsonl"))], keep_short=True)
    found = read_records(tmp_path / "short" / "train.unranked.jsonl")
    assert [record.completions[:2] for record in found] == [record.completions for record in train]
    assert [len(record.completions) for record in found[:102]] == [2, 2, *([3] * 99), 2]


def test_candidates_from_several_files(tmp_path: Path) -> None:
    raw = hh_folder(tmp_path / "raw", 4, 1)
    run(raw, tmp_path / "two", dev=0)
    records = read_records(tmp_path / "two" / "train.jsonl")
    first = write(
        tmp_path / "first.jsonl",
        [{"prompt": r.as_dict()["prompt"], "answer": f"{x}{k}"} for k, r in enumerate(records) for x in "ab"],
    )
    second = answers(tmp_path / "second.jsonl", records, "c{}")
    both = [str(first), str(second)]

    def lengthened(name: str, paths: list[str], **options: Any) -> list[tuple[str, ...]]:
        run(raw, tmp_path / name, dev=0, extras=[ExtraCandidates(path) for path in paths], **options)
        return [record.completions[2:] for record in read_records(tmp_path / name / "train.unranked.jsonl")]

    # A file's second answer comes after every file's first.
    assert lengthened("four", both) == [(f"a{k}", f"c{k}") for k in range(16)]
    assert lengthened("five", both, length=5) == [(f"a{k}", f"c{k}", f"b{k}") for k in range(16)]
    assert lengthened("one", both[:1], length=4) == [(f"a{k}", f"b{k}") for k in range(16)]
    with pytest.raises(
        ValueError, match=r"harmless_base, train: expected at least one good record, got 4: fewer than 6"
    ):
        lengthened("six", both, length=6)
    for length, paths in ((1, []), (3, []), (2, both)):
        with pytest.raises(ValueError, match=f"length: expected 2 without extra candidates, .* got {length} and"):
            lengthened("no", paths, length=length)
    with pytest.raises(
        ValueError, match=r"other\.jsonl: expected answers to prompts of this data, got 1 other prompts"
    ):
        lengthened("no", [str(write(tmp_path / "other.jsonl", [{"prompt": "x", "answer": "y"}]))])
    for given, message in (
        ([{"prompt": "x", "answer": 3}], r"bad\.jsonl:1: answer: expected a text, got 3"),
        ([{"answer": "x"}], r"bad\.jsonl:1: prompt: expected a text or a list of messages, got None"),
        ([{"prompt": "x", "answer": " "}], r"bad\.jsonl: expected answers, found none"),
        (["{"], r"bad\.jsonl:1: column"),
        (["[]"], r"bad\.jsonl: expected answers, found none"),
    ):
        with pytest.raises(RecordError, match=message):
            ExtraCandidates(str(write(tmp_path / "bad.jsonl", given)))


def test_extra_answers_begin_as_the_others_do(tmp_path: Path) -> None:
    """Behind "Assistant:" every answer of the published form stands after a blank."""
    raw = hh_folder(tmp_path / "raw", 4, 1)
    files, _ = find_files([str(raw)], hh.known_file, hh.EXPECTED)
    prepare(files, hh.read_published, tmp_path / "two", dev=0)
    records = read_records(tmp_path / "two" / "train.jsonl")
    extra = ExtraCandidates(str(answers(tmp_path / "extra.jsonl", records, "c{}")))
    prepare(files, hh.read_published, tmp_path / "three", dev=0, extras=[extra])
    found = read_records(tmp_path / "three" / "train.unranked.jsonl")
    assert [record.completions for record in found] == [(*r.completions, f" c{k}") for k, r in enumerate(records)]


def comparison(k: int, choice: Any = 0, **changes: Any) -> dict[str, Any]:
    return {
        "info": {"id": f"t{k}", "post": f"My cat {k} sleeps.\n\nWhy?", "title": "Cats", "subreddit": "cats"},
        "summaries": [{"text": f" Cat {k} sleeps.", "policy": "ref"}, {"text": "A cat.\n", "policy": "sup"}],
        "choice": choice,
        "worker": "w",
        **changes,
    }


def test_tldr(tmp_path: Path) -> None:
    article = {"id": "c", "article": "News.", "site": "x"}
    texts = (
        [{"text": "a"}, {"text": ""}],
        [{"text": "a"}, {"text": " a "}],
        [{"text": "a"}],
        [{"text": 3}, {"text": "a"}],
    )
    write(
        tmp_path / "raw" / "batch3.json",
        [
            *(comparison(k, k % 2, split="train") for k in range(30)),
            *(comparison(k, 1, split="valid1") for k in range(28, 33)),
            comparison(99, split="train", info=article),
            comparison(99, 2),
            comparison(99, None),
            comparison(99, True),
            *(comparison(99, summaries=list(two)) for two in texts),
        ],
    )
    write(tmp_path / "raw" / "valid.json.gz", [comparison(k) for k in range(40, 43)])
    write(tmp_path / "raw" / "batch4.json.gz", [comparison(k) for k in range(50, 53)])
    files, _ = find_files([str(tmp_path / "raw")], tldr.known_file, tldr.EXPECTED)
    summary = prepare(files, tldr.read, tmp_path / "out", dev=4)
    train, dev, test = (read_records(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (29, 4, 6)
    records = {record.completions: record for record in [*train, *dev]}
    record = records[(" Cat 4 sleeps.", " A cat.")]
    assert record.prompt == "SUBREDDIT: r/cats\n\nTITLE: Cats\n\nPOST: My cat 4 sleeps.\n\nWhy?\n\nTL;DR:"
    assert record.subset == "tldr"
    assert (" A cat.", " Cat 5 sleeps.") in records
    counts = summary["counts"]["tldr"]
    assert counts["test"]["dropped"] == {"a test prompt that the training files have, too": 2}
    assert counts["train"]["dropped"] == {
        "no choice between two summaries": 3,
        "an article, not a post": 1,
        "an empty answer": 1,
        "identical answers": 1,
        "not as expected: choice": 1,
        "not as expected: summaries[0].text": 1,
    }
