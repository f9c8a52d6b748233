"""`clha-fast prepare`, from raw transcripts to a ranked file of three candidates, by the documented commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from clha_fast.data import read_records
from tests.support.command_line import one_sentence
from tests.support.raw_transcripts import DISAGREE, hh_folder, questions, write
from tests.support.reward_models import save_llama


def test_raw_transcripts_become_rankings_of_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, two, three = hh_folder(tmp_path / "raw", 3, 2), tmp_path / "two", tmp_path / "three"
    path = raw / "helpful-base" / "train.jsonl"
    path.write_text(path.read_text() + json.dumps(DISAGREE) + "\n")
    write(raw / "red-team-attempts" / "red.jsonl", ["{}"])
    (raw / "helpful-online" / "test.jsonl.gz").unlink()
    assert cli.main(["prepare", "hh-rlhf", str(raw), str(two), "--dev", "2"]) == 0
    out = capsys.readouterr().out
    assert "helpful_base       train 3 of 4 records kept; test 2 of 2 records kept" in out
    assert "1  the transcripts disagree before the last turn (first: helpful-base/train.jsonl:4)" in out
    assert "no files of        helpful_online test" in out
    assert "1 other files: red-team-attempts/red.jsonl" in out
    assert f"written            {two}/train.jsonl: 10 records, 10 prompts" in out
    assert "score" not in out

    records = read_records(two / "train.jsonl")
    rows = [
        {"prompt": r.as_dict()["prompt"], "answer": "the cat sat on a mat " * (k % 3 + 1)}
        for k, r in enumerate(records)
    ]
    extra = write(tmp_path / "answers.jsonl", rows[:-1])
    command = ["prepare", "hh-rlhf", str(raw), str(three), "--dev", "2", "--extra-candidate", f"{extra}:sampled"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "sampled: 9 used, 0 the same as another, 0 empty; 9 of its 9 prompts are here" in out
    assert "1  fewer than 3 different candidates" in out
    assert "stand last and are not ranked yet" in out
    model = save_llama(tmp_path / "reward_model")
    command = out.strip().splitlines()[-1].replace("PATH", model).split()
    assert command[:2] == ["clha-fast", "score"]
    assert cli.main(command[1:]) == 0

    ranked = read_records(three / "train.jsonl")
    assert [len(record.completions) for record in ranked] == [3] * 9
    for record, before in zip(ranked, records, strict=False):
        assert (record.prompt, record.subset) == (before.prompt, before.subset)
        assert record.rewards == tuple(sorted(record.rewards or (), reverse=True))
        assert set(before.completions) < set(record.completions)
    assert any(a.completions[:2] != b.completions for a, b in zip(ranked, records, strict=False))
    assert any("cat" in record.completions[0] for record in ranked)


def test_parses_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = hh_folder(tmp_path / "raw", 8, 2)
    out = tmp_path / "out"
    command = ["prepare", "hh-rlhf", str(raw), str(out)]
    files = sorted(map(str, raw.glob("*/*")))
    assert cli.main(["prepare", "hh-rlhf", *files, str(out), "--parse=published", "--dev", "0.3"]) == 0
    assert all(isinstance(record.prompt, str) for record in read_records(out / "train.jsonl"))
    assert json.loads((out / "prepare.json").read_text())["settings"]["parse"] == "published"
    capsys.readouterr()
    for more, message in (
        (["--dev", "2"], "exists already; expected a new folder, or --overwrite"),
        (["--overwrite", "--dev", "many"], "--dev: expected a fraction or a number of prompts, got 'many'"),
        (["--overwrite", "--dev", "0.99999"], "leaves none for training"),
        (["--overwrite", "--columns.prompt", "x"], "--columns.prompt: expected none for hh-rlhf, whose columns are"),
        (["--overwrite", "--length", "3"], "length: expected 2 without extra candidates"),
        (["--overwrite", "--extra-candidate", "nowhere.jsonl:x"], "nowhere.jsonl"),
    ):
        assert cli.main([*command, *more]) == cli.USER_ERROR
        assert message in one_sentence(capsys)
    for words, message in (
        (["prepare", "tldr", str(raw), str(tmp_path / "o"), "--parse", "clean"], "--parse: expected none for tldr"),
        (["prepare", "hh-rlhf", str(tmp_path / "reward"), str(tmp_path / "o")], "reward: No such file or directory"),
        (
            ["prepare", "tldr", str(raw), str(tmp_path / "o")],
            "tldr, test: expected at least one good record, got 8: no choice",
        ),
    ):
        assert cli.main(words) == cli.USER_ERROR
        assert message in one_sentence(capsys)
    assert cli.main(["prepare", "hh-rlhf", str(raw), "--overwrite", "--dev", "2", str(out)]) == 0
    assert all(isinstance(record.prompt, tuple) for record in read_records(out / "train.jsonl"))


def test_tldr_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "info": {"post": f"Post {k}", "title": "T", "subreddit": "s"},
            "summaries": [{"text": " a"}, {"text": " b"}],
            "choice": 1,
            "split": "train" if k < 9 else "valid2",
        }
        for k in range(12)
    ]
    write(tmp_path / "batch3.json", rows)
    assert cli.main(["prepare", "tldr", str(tmp_path / "batch*.json"), str(tmp_path / "out"), "--dev", "1"]) == 0
    out = capsys.readouterr().out
    assert "tldr               train 9 of 9 records kept; test 3 of 3 records kept" in out
    assert "no files of" not in out
    (record, *_) = read_records(tmp_path / "out" / "test.jsonl")
    assert (record.completions, record.subset) == ((" b", " a"), "tldr")


def test_convert_and_score_carry_the_subset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**given, "subset": f"part {k % 2}"} for k, given in enumerate(questions("x", 4))]
    rows[0].pop("subset")
    source = write(tmp_path / "rows.jsonl", rows)
    assert cli.main(["convert", str(source), str(tmp_path / "a.jsonl")]) == 0
    model = save_llama(tmp_path / "reward_model")
    words = ["score", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--reward-model", model, "--rank-by-reward"]
    assert cli.main(words) == 0
    for name in ("a", "b"):
        subsets = [record.subset for record in read_records(tmp_path / f"{name}.jsonl")]
        assert subsets == ["", "part 1", "part 0", "part 1"]


def test_columns_as_one_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `clha-fast train` takes them; with entries beside it, too."""
    rows = [{"q": f"say {k}", "a": f"the cat {k}", "b": f"a dog {k} ran"} for k in range(12)]
    source, model = str(write(tmp_path / "rows.jsonl", rows)), save_llama(tmp_path / "reward_model")
    ways = {
        "entries": ["--columns.prompt", "q", "--columns.completions", "[a, b]"],
        "mapping": ["--columns", "{prompt: q, completions: [a, b]}"],
        "equals": ["--columns={prompt: q, completions: [a, b]}"],
        "both": ["--columns", "{prompt: q}", "--columns.completions=[a, b]"],
    }
    made = []
    for name, columns in ways.items():
        out = tmp_path / name
        out.mkdir()
        capsys.readouterr()
        assert cli.main(["inspect", source, *columns]) == 0
        said = capsys.readouterr().out
        assert cli.main(["convert", source, str(out / "convert.jsonl"), *columns]) == 0
        assert cli.main(["score", *columns, source, str(out / "score.jsonl"), "--reward-model", model]) == 0
        assert cli.main(["prepare", "ranked", source, str(out / "three"), "--test", "0.2", *columns]) == 0
        files = ("convert.jsonl", "score.jsonl", "three/train.jsonl", "three/test.jsonl")
        made.append((said, *((out / file).read_bytes() for file in files)))
    assert made.count(made[0]) == len(ways)
    assert read_records(tmp_path / "mapping" / "convert.jsonl")[3].completions == ("the cat 3", "a dog 3 ran")
    capsys.readouterr()
    for columns, message in {
        ("--columns", "q"): "--columns: expected a mapping, such as '{prompt: question}', got 'q'",
        ("--columns=[q]",): "--columns: expected a mapping, such as '{prompt: question}', got '[q]'",
        ("--columns", "--format", "auto"): "--columns: expected a mapping, got none",
        ("--columns.prompt",): "--columns.prompt: expected a column, got none",
    }.items():
        assert cli.main(["inspect", source, *columns]) == cli.USER_ERROR
        assert message in one_sentence(capsys)
    words = ["prepare", "tldr", source, str(tmp_path / "o"), "--columns", "{prompt: q}"]
    assert cli.main(words) == cli.USER_ERROR
    assert "--columns.prompt: expected none for tldr" in one_sentence(capsys)
