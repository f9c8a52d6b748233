"""Ranked files split by prompt: every prompt in one file, whatever else there is, and candidates cut to a length."""

from __future__ import annotations

import json

import pytest

from clha_fast.cli.main import main
from clha_fast.data import read_records
from clha_fast.data.parts import of_length, split_files
from clha_fast.data.records import RankedRecord


def write(path, start, count, size=4, subset=None):
    lines = []
    for number in range(start, start + count):
        row = {
            "prompt": f"question {number}",
            "completions": [f"answer {number} {k}" for k in range(size)],
            "rewards": [float(size - k) for k in range(size)],
        }
        lines.append(json.dumps({**row, **({"subset": subset} if subset else {})}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def prompts(folder):
    return {name: [r.prompt for r in read_records(str(folder / f"{name}.jsonl"))] for name in ("train", "dev", "test")}


def test_no_prompt_is_in_two_files_and_none_moves_when_others_come(tmp_path):
    one = write(tmp_path / "one.jsonl", 0, 120)
    again = write(tmp_path / "again.jsonl", 60, 120, size=2, subset="own")
    split_files([one], tmp_path / "a", dev=0.2, test=0.3)
    split_files([one, again], tmp_path / "b", dev=0.2, test=0.3)
    small, large = prompts(tmp_path / "a"), prompts(tmp_path / "b")
    for name, found in small.items():
        assert set(found) <= set(large[name])
    sets = [set(found) for found in large.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 180
    assert 0.15 < len(set(large["dev"])) / 180 < 0.25
    assert 0.2 < len(set(large["test"])) / 180 < 0.4
    subsets = {record.subset for record in read_records(str(tmp_path / "b" / "train.jsonl"))}
    assert subsets == {"one", "own"}


@pytest.mark.parametrize("target", [0, 2, 3, 4])
@pytest.mark.parametrize(("length", "chosen"), [(2, (0, 4)), (3, (0, 2, 4)), (4, (0, 1, 3, 4)), (5, (0, 1, 2, 3, 4))])
def test_best_worst_and_even_steps_between(length, chosen, target):
    record = RankedRecord(
        "q",
        tuple("abcde"),
        (5.0, 4.0, 3.0, 2.0, 1.0),
        sft_index=target,
        signals={"reference_logps": (-1.0, -2.0, -3.0, -4.0, -5.0)},
        subset="s",
    )
    found = of_length(record, length)
    if target not in chosen:
        assert found is None
        return
    assert found.completions == tuple("abcde"[k] for k in chosen)
    assert found.rewards == tuple(5.0 - k for k in chosen)
    assert found.signals["reference_logps"] == tuple(-1.0 - k for k in chosen)
    assert (found.completions[found.sft_index], found.subset) == ("abcde"[target], "s")


def test_records_whose_target_is_left_out_are_counted(tmp_path):
    rows = [{"prompt": f"question {k}", "completions": ["a", "b", "c"], "sft_index": k % 3} for k in range(60)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = split_files([str(source)], tmp_path / "out", dev=0.2, test=0.2, length=2)
    counts = summary["counts"]["rows"].values()
    assert sum(count["dropped"].get("sft_index is none of 2 candidates", 0) for count in counts) == 20
    targets = [r.completions[r.sft_index] for p in summary["written"] for r in read_records(tmp_path / "out" / p)]
    assert sorted(targets) == ["a"] * 20 + ["c"] * 20


def test_records_that_are_too_short_are_left_out_and_counted(tmp_path, capsys):
    long, short = write(tmp_path / "long.jsonl", 0, 80), write(tmp_path / "short.jsonl", 200, 40, size=2)
    command = [
        "prepare",
        "ranked",
        long,
        short,
        str(tmp_path / "out"),
        "--dev",
        "0.2",
        "--test",
        "0.2",
        "--length",
        "3",
    ]
    assert main(command) == 0
    assert "40  fewer than 3 candidates" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert (
        sum(count["dropped"].get("fewer than 3 candidates", 0) for count in summary["counts"]["short"].values()) == 40
    )
    assert {len(r.completions) for r in read_records(str(tmp_path / "out" / "train.jsonl"))} == {3}
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_bad_records_are_left_out_and_counted(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", 0, 60)
    with open(good, "a") as file:
        file.write(json.dumps({"prompt": "x", "completions": ["a", ""]}) + "\n{broken\n")
    assert main(["prepare", "ranked", good, str(tmp_path / "out"), "--dev", "0.2", "--test", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "bad 0 of 2 records kept" in out
    assert f"not as expected: completions[1] (first: {good}:61)" in out


def test_columns_of_other_names(tmp_path):
    rows = [{"question": f"q {k}", "a": f"x {k}", "b": f"y {k}", "s": [k + 2.0, k + 1.0]} for k in range(40)]
    source = tmp_path / "own.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = ["--columns.prompt", "question", "--columns.completions=[a, b]", "--columns.rewards", "s"]
    assert main(["prepare", "ranked", str(source), *flags, str(out), "--dev", "0.2", "--test", "0.2"]) == 0
    found = [r for name in ("train", "dev", "test") for r in read_records(str(out / f"{name}.jsonl"))]
    got = {(r.prompt, r.completions, r.rewards) for r in found}
    assert got == {(f"q {k}", (f"x {k}", f"y {k}"), (k + 2.0, k + 1.0)) for k in range(40)}
    columns = {"prompt": "question", "completions": ["a", "b"], "rewards": "s"}
    assert json.loads((out / "prepare.json").read_text())["settings"]["columns"] == columns


@pytest.mark.parametrize(
    ("flags", "columns", "names"),
    [
        ([], {}, ("prompt", "completions", "rewards")),
        (["--length", "2"], {}, ("prompt", "completions", "rewards")),
        ([], {"prompt": "q", "completions": "a", "rewards": "s"}, ("q", "a", "s")),
    ],
)
@pytest.mark.parametrize("flag", ["--rank-by-reward", "--rank_by_reward"])
def test_by_reward(tmp_path, flags, columns, names, flag):
    """As if `convert --rank-by-reward` had come first: which candidates --length takes depends on it."""
    prompt, answers, scores = names
    rows = [
        {prompt: f"question {k}", answers: [f"a {k}", f"b {k}", f"c {k}"], scores: [1.0, float(k % 4), 2.0 - k % 3]}
        for k in range(40)
    ]
    source, ordered = tmp_path / "rows.jsonl", tmp_path / "ordered" / "rows.jsonl"
    ordered.parent.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [word for field, column in columns.items() for word in (f"--columns.{field}", column)]
    assert main(["convert", str(source), str(ordered), flag, *named]) == 0
    flags = ["--test", "0.2", "--dev", "0.2", *flags]
    assert main(["prepare", "ranked", str(ordered), str(tmp_path / "two"), *flags]) == 0
    assert main(["prepare", "ranked", str(source), str(tmp_path / "one"), flag, *named, *flags]) == 0
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert all(list(r.rewards) == sorted(r.rewards, reverse=True) for r in read_records(tmp_path / "one" / name))
    assert json.loads((tmp_path / "one" / "prepare.json").read_text())["settings"]["rank_by_reward"] is True


def test_raw_files_have_no_rewards_to_rank_by(tmp_path, capsys):
    for data in ("hh-rlhf", "tldr"):
        assert main(["prepare", data, str(tmp_path), str(tmp_path / "out"), "--rank-by-reward"]) == 2
        said = f"--rank-by-reward: expected none for {data}, whose files have no rewards, got it"
        assert said in capsys.readouterr().err


def test_development_is_at_least_one_prompt(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", 0, 30)
    assert main(["prepare", "ranked", source, str(tmp_path / "few"), "--test", "0.2", "--dev", "1e-9"]) == 0
    few = prompts(tmp_path / "few")
    split_files([source], tmp_path / "many", dev=0.3, test=0.2)
    many = prompts(tmp_path / "many")
    assert len(few["dev"]) == 1
    assert set(few["dev"]) < set(many["dev"])
    assert sorted(few["test"]) == sorted(many["test"])
    one = write(tmp_path / "b.jsonl", 0, 1)
    assert main(["prepare", "ranked", one, str(tmp_path / "one"), "--test", "1e-9"]) == 2
    assert "dev: expected at least one record, got none of 1; give more prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--test", "0.2", "--dev", "0.9"], "leave prompts to train on"),
        (["--test", "0.2", "--dev", "30"], "dev: expected a fraction of the prompts between 0 and 1"),
        (["--test", "0.2", "--dev", "0.1", "--length", "1"], "length: expected at least 2 candidates, got 1"),
        (["--test", "0.2", "--dev", "0.1", "--length", "9"], "train: expected at least one record, got none of 30"),
        (["--dev", "0.1"], "--test: expected the fraction"),
        (["--test", "0.2", "--parse", "clean"], "--parse: expected none for ranked files"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_writes_nothing(tmp_path, capsys, words, said):
    source = write(tmp_path / "a.jsonl", 0, 30)
    assert main(["prepare", "ranked", source, str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
