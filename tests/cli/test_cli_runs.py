"""Runs from the command line that end before they begin, hold nothing out, or cut what they read."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli import main as cli
from clha_fast.training.validation import evaluation_metrics
from tests.support.command_line import command, one_sentence
from tests.support.trainers import trainer


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = command(tmp_path, "--resume", max_steps=1)
    assert cli.main(words) == 2
    expected = f"clha-fast train: resume: expected a folder that holds a run, got {folder} (not there)\n"
    assert one_sentence(capsys) == expected
    folder.mkdir()
    assert cli.main(words) == 2
    assert f"got {folder} (empty)" in one_sentence(capsys)
    (folder / "notes.txt").write_text("")
    assert cli.main(words) == 2
    assert f"got {folder} with 1 entries (notes.txt) that are no run of this program" in one_sentence(capsys)
    (folder / "notes.txt").unlink()
    folder.rmdir()
    assert cli.main(command(tmp_path, max_steps=1)) == 0
    shutil.rmtree(folder / "checkpoint-1")
    capsys.readouterr()
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert f"{folder}, whose run has no checkpoint yet: training starts from the beginning" in out
    assert (folder / "checkpoint-1").is_dir()


def test_training_without_a_held_out_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, eval_fraction=0, max_steps=2)) == 0
    out = capsys.readouterr().out
    assert "training  16 prompts" in out
    assert "held out  no held-out set" in out
    assert "no held-out set: not evaluated" in out
    assert "ranking accuracy" not in out
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (found["before"], found["after"]) == ({}, {})
    assert [line["step"] for line in found["log"] if "loss" in line] == [2]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert cli.main(command(tmp_path, "--resume", eval_fraction=0, max_steps=2)) == 0


def test_token_statistics_and_an_entropy_bonus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--log_token_statistics", "--objective.name", "policy", "--objective.entropy_weight", "0.05")
    assert cli.main(command(tmp_path, *flags, max_steps=2)) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (line,) = [line for line in found["log"] if "loss" in line]
    for given, prefix in ((line, ""), (found["before"], "eval_"), (found["after"], "eval_")):
        assert 0 < given[f"{prefix}entropy"] < math.log(300)
        assert 0 <= given[f"{prefix}mean_token_accuracy"] <= 1
    capsys.readouterr()
    assert cli.main(command(tmp_path, "--overwrite", "--objective.entropy_weight", "0.05")) == 2
    assert "entropy_weight" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 3, "logging_steps": 500}, [3]),
        ({"max_steps": 5, "logging_steps": 2}, [2, 4, 5]),
        ({"max_steps": 4, "logging_steps": 2}, [2, 4]),
        ({"max_steps": 1, "logging_steps": 1}, [1]),
        ({"max_steps": 3, "logging_strategy": "no"}, []),
    ],
)
def test_the_last_step_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], steps: list[int]
) -> None:
    assert cli.main(command(tmp_path, eval_fraction=0, **settings)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/{settings['max_steps']}" for step in steps]
    assert all("loss " in line and "margin " in line for line in lines)
    log = json.loads((tmp_path / "run" / "metrics.json").read_text())["log"]
    assert [line["step"] for line in log if "loss" in line] == steps


def test_the_header_says_what_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, max_steps=1, max_length=4)) == 0
    lines = capsys.readouterr().out.splitlines()
    cut = [line for line in lines if "; cut to the length limits: prompts " in line]
    assert [line.split()[0] for line in cut] == ["training", "held"]
    assert "prompts 9 (100%), responses 29 (100%)" in cut[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--metric_for_best_model", "eval_acuracy"],
            "expected one of loss, rank_loss, sft_loss, rewards/accuracies, ",
        ),
        (["--report_to", "wandb"], "expected a reporter whose package is installed, got 'wandb'; pip install it"),
        (["--report_to", "wandbb"], "expected none or some of "),
        (["--per_device_train_batch_size", "0"], "expected a whole number of at least 1, got 0"),
        (["--per_device_eval_batch_size", "0"], "expected a whole number of at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "expected a whole number of at least 1, got 0"),
        (["--learning_rate", "-1"], "expected a finite number of at least 0, got -1.0"),
        (["--learning_rate", ".nan"], "expected a finite number of at least 0, got nan"),
        (["--num_train_epochs", "-1"], "expected a finite number of at least 0, got -1"),
        (["--deepspeed", "zero2.json"], "expected the package deepspeed to be installed, got none"),
        (["--optim", "adamw_torhc"], "expected one of transformers' OptimizerNames, got 'adamw_torhc'; did you mean"),
        (["--lr_scheduler_type", "cosin"], "got 'cosin'; did you mean 'cosine'?"),
        (["--fp16"], "expected False on a CPU (float32 would be computed; bf16 works there), got True"),
    ],
)
def test_settings_are_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    find = importlib.util.find_spec
    # Whether or not this machine has them.
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("deepspeed", "wandb") else find(name, *a)
    )
    assert cli.main(command(tmp_path, *flags)) == 2
    error = one_sentence(capsys)
    assert error.startswith(f"clha-fast train: {flags[0][2:]}: expected ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert cli.main(command(tmp_path, *flags)) == 2
        expected = f"output_dir: expected a folder, got {tmp_path / 'run'}, which is a file"
        assert expected in one_sentence(capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_the_trainer_names_the_metrics_there_are(tmp_path: Path) -> None:
    ours = trainer(tmp_path, metric_for_best_model="accuracy", eval_strategy="steps", eval_steps=1)
    expected = "^metric_for_best_model: expected one of loss, .*rewards/accuracies.*, got 'accuracy'$"
    with pytest.raises(ValueError, match=expected):
        ours.train()
    metrics = {name.removeprefix("eval_") for name in ours.evaluate()}
    assert set(evaluation_metrics()) <= metrics


@pytest.mark.parametrize(("flags", "way"), [(["--resume"], "a run is resumed with the options that it was"), ([], "")])
def test_a_command_without_a_file(capsys: pytest.CaptureFixture[str], flags: list[str], way: str) -> None:
    assert cli.main(["train", "--output_dir", "run", *flags]) == 2
    error = one_sentence(capsys).strip()
    assert "train_file: expected the path of a file with ranked responses, got nothing" in error
    assert way in error
    assert bool(way) == (";" in error)
