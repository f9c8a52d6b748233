"""`clha-fast demo`: a language model of the bundled answers, then their ranks; what it prints and leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from clha_fast.cli.demo import FIRST, SECOND
from clha_fast.data import read_records
from clha_fast.data.split import split_records
from clha_fast.evaluation.tables import answers_text
from clha_fast.experiments.language_model import answers_of

TINY = ["--model_config.num_hidden_layers", "1", "--model_config.hidden_size", "32", "--max_length", "32"]
FLAGS = [
    "--max_steps",
    "2",
    "--eval_sample_tokens",
    "4",
    "--memory_report",
    "false",
    "--use_cpu",
    "--eval_strategy",
    "no",
    *TINY,
]


def test_a_language_model_then_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_dir", str(tmp_path / "demo"), *FLAGS]
    for _ in range(2):  # the second one replaces the first
        assert cli.main(["demo", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("1. a language model of the answers") == 2
    assert out.count("ranking accuracy (kept pairs)") == 2
    assert out.count("log-probability of the better side") == 2
    train, _ = split_records(read_records(SECOND["train_file"]), SECOND["eval_fraction"], SECOND["seed"])
    assert f"{sum(len(record.completions) for record in train):,} answers" in out

    # The second part begins where the first one ended.
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("demo-language-model", "demo")
    )
    assert second["before"]["eval_logps/chosen"] != first["before"]["eval_target_nll"]
    assert first["after"]["eval_target_nll"] < first["before"]["eval_target_nll"]
    assert json.loads((tmp_path / "demo" / "run.json").read_text())["settings"]["model"].endswith("demo-language-model")
    assert (tmp_path / "demo" / "model.safetensors").exists()
    lines = [json.loads(line) for line in (tmp_path / "demo" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["index"] == 0] == [0, 2]
    assert f"question          {lines[0]['prompt'].strip()}\n" in out

    assert cli.main(["demo", *flags, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "resumed from" in out
    assert "1. a language model" not in out

    # A model of one's own has learned to write already.
    again = ["--output_dir", str(tmp_path / "own"), "--model", str(tmp_path / "demo"), *FLAGS[: -len(TINY)]]
    assert cli.main(["demo", *again, "--max_length", "32"]) == 0
    assert "1. a language model" not in capsys.readouterr().out
    assert not (tmp_path / "own-language-model").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    assert "usage: clha-fast demo" in capsys.readouterr().out


def test_no_held_out_prompt_is_in_the_language_model() -> None:
    train, held_out = split_records(read_records(SECOND["train_file"]), SECOND["eval_fraction"], SECOND["seed"])
    answers = answers_of(train)
    assert len(answers) == sum(len(record.completions) for record in train)
    assert {len(record.completions) for record in answers} == {1}
    assert not {record.prompt for record in answers} & {record.prompt for record in held_out}
    assert all(record.rewards is None for record in answers)
    assert FIRST["objective"] == {"name": "sft", "form": "token_mean"}


def test_answers_side_by_side() -> None:
    before = {"step": 0, "prompt": "Why?", "completion": " because\nso", "finished": False}
    after = {"step": 20, "prompt": "Why?", "completion": "", "finished": True}
    assert answers_text(before, after).splitlines() == [
        "question           Why?",
        "answer at step 0   because so ...",
        "answer at step 20  (empty)",
    ]
    assert answers_text(after, after).count("answer") == 1
