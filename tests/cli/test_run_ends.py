"""What a run leaves and says at its end, once and under the right numbers; and how its options may be spelled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM

from clha_fast.cli import main as cli
from clha_fast.cli import merge as cli_merge
from clha_fast.cli import rank as cli_rank
from clha_fast.cli import runs as cli_runs
from clha_fast.cli.options import OptionError, read_config
from clha_fast.cli.text import with_dashes
from clha_fast.errors import out_of_memory
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.objectives.clha import PRESETS, CLHAOptions
from tests.support import forked
from tests.support.command_line import SETTINGS, command, one_sentence, write_rows
from tests.support.tiny import make_rows
from tests.support.trainers import trainer


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 7, "save_steps": 7},  # inside the second epoch, of 5 steps as the first
        {"max_steps": 5, "save_steps": 5},
        {"max_steps": 4, "save_steps": 4, "gradient_accumulation_steps": 2},
        {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
    ],
)
def test_a_finished_run_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    assert cli.main(command(tmp_path, **changes)) == 0
    folder = tmp_path / "run"
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    last = max(int(name.split("-")[1]) for name in os.listdir(folder) if name.startswith("checkpoint-"))
    with caplog.at_level("WARNING"):
        assert cli.main(command(tmp_path, "--resume", **changes)) == 0
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert f"step {last + 1}/" not in capsys.readouterr().out
    assert f"nothing was trained; the run that was resumed is finished, at step {last} of {last}" in caplog.text


def test_a_finished_run_of_the_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "rows": make_rows(20)}
    trainer(tmp_path, **settings).train()
    again = trainer(tmp_path, **settings)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    longer = trainer(tmp_path, **{**settings, "max_steps": 7})
    assert longer.train(resume_from_checkpoint=True).global_step == 7
    none = trainer(tmp_path, rows=make_rows(4), max_steps=-1, num_train_epochs=0)
    with caplog.at_level("WARNING"):
        none.train()
    assert "nothing was trained; no step was asked for" in caplog.text


@pytest.mark.parametrize("changes", [{"eval_strategy": "steps", "eval_steps": 4}, {}])
def test_the_evaluation_at_the_end_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    assert cli.main(command(tmp_path, **changes)) == 0
    out = capsys.readouterr().out
    assert out.count("(held out)") == len(changes)  # at steps 4 and 8 of training, or never
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lines = [line for line in found["log"] if line.get("step") == 8 and "eval_loss" in line]
    assert len(lines) == 1
    assert found["after"]["eval_loss"] == lines[0]["eval_loss"]


def test_the_best_model_has_its_own_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoil(cli_runs.Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step > 4:
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.mul_(3)

    monkeypatch.setattr(cli_runs, "Progress", Spoil)
    words = command(
        tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, learning_rate=1e-3
    )
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    best = found["after"]["eval_step"]
    assert best in (2, 4)
    line = next(line for line in found["log"] if line["step"] == best and "eval_loss" in line)
    assert found["after"]["eval_loss"] == pytest.approx(line["eval_loss"], rel=1e-6)
    assert f"after (best, step {best})" in capsys.readouterr().out
    assert f"## Held out, after step {best}\n" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("cache", [True, False])
def test_saved_configurations_keep_use_cache(tmp_path: Path, cache: bool) -> None:
    changes: dict[str, Any] = {"model_config": {**SETTINGS["model_config"], "use_cache": cache}, "max_steps": 2}
    assert cli.main(command(tmp_path, save_steps=2, **changes)) == 0
    for folder in ("run", "run/checkpoint-2"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["use_cache"] is cache


def test_events_land_in_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = command(tmp_path, "--report-to", "tensorboard", max_steps=1)
    assert cli.main(words) == 0
    assert os.listdir(tmp_path / "here") == []
    assert list((tmp_path / "run" / "runs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("fraction", [0, 0.0, None])
def test_no_fraction_beside_an_evaluation_file(tmp_path: Path, fraction: Any) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", 5, seed=4)
    train = write_rows(tmp_path / "train.jsonl", 9)
    options = RunOptions(str(train), str(held_out), fraction, model="x")
    run = Run(options, {"output_dir": str(tmp_path / "run"), "use_cpu": True})
    run.split(*run.read())
    assert (len(run.train_records), len(run.held_out)) == (9, 5)
    with pytest.raises(ValueError, match=r"^eval_fraction: expected none \(or 0\) beside eval_file, got both"):
        RunOptions(str(train), str(held_out), 0.2, model="x").check()


def test_env_needs_no_transformers() -> None:
    code = "import sys; sys.modules.update(transformers=None, accelerate=None, tokenizers=None)\n"
    code += "from clha_fast.cli.main import main; sys.exit(main(['env']))"
    assert "backend " in forked.output("bare", code)


def test_every_option_takes_dashes_and_underscores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--reward_model=a_b", "--batch-size", "3", "--max_length", "x_y", "--", "--a_b"]
    assert with_dashes(words) == ["--reward-model=a_b", "--batch-size", "3", "--max-length", "x_y", "--", "--a_b"]
    source = str(write_rows(tmp_path / "rows.jsonl", 3))
    for number, flag in enumerate(("--rank_by_reward", "--rank-by-reward")):
        assert cli.main(["convert", source, str(tmp_path / f"{number}.jsonl"), flag]) == 0
    for flag in ("--batch_size", "--batch-size"):
        assert cli.main(["score", source, str(tmp_path / "out"), "--reward_model", "/nowhere", flag, "0"]) == 2
        assert "--batch-size: expected a positive whole number, got 0" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("learning-rate: 1\nmax_steps: 3\n")
    assert read_config(str(tmp_path / "run.yaml")) == {"learning_rate": 1.0, "max_steps": 3}
    (tmp_path / "run.yaml").write_text("learning-rate: 1\nlearning_rate: 3\n")
    with pytest.raises(OptionError, match=r"learning_rate: expected once, got 1.0 and 3 .with dashes and with under"):
        read_config(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("max_length: expected at most 9, got 10", "--max-length: expected at most 9, got 10"),
        ("model: expected a folder, got 'x'", "MODEL: expected a folder, got 'x'"),
        ("reward_model: expected a folder", "MODEL: expected a folder"),
        ("dtype: expected one of a, b", "--dtype: expected one of a, b"),
        ("x: exists already; give overwrite=True", "x: exists already; give --overwrite"),
        ("Llama: no; layout='packed' may run", "Llama: no; --layout packed may run"),
        ("resume: expected another (batch_size was 2, is 3)", "--resume: expected another (--batch-size was 2, is 3)"),
        ("rows: give max_length.", "rows: give --max-length."),
        # Paths, calls, mappings, text in quotes and other things' names are not the command's.
        ("/max_length/batch_size.jsonl: max_length_x", "/max_length/batch_size.jsonl: max_length_x"),
        ("a:1: RankedCollator(layout='padded') takes it", "a:1: RankedCollator(layout='padded') takes it"),
        ("a: {'max_length': 3} f(max_length=3)", "a: {'max_length': 3} f(max_length=3)"),
        ("a: the label and the format of model x", "a: the label and the format of model x"),
    ],
)
def test_messages_name_the_options_of_the_command(
    message: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr(cli_rank, "read", fails)
    assert cli.main(["rank", "model", "file", str(tmp_path / "out")]) == 2
    assert one_sentence(capsys) == f"clha-fast rank: {said}\n"


def test_messages_of_commands_whose_options_are_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their keys in a file are the settings' names, and their flags the same behind dashes."""
    cases = {
        ("train", "--objective", "sft", "--sft_factor", "one"): "leave it out, or --objective clha ('sft' has",
        ("rlhf", "--reward_model", "x", "--preset", "paper"): "with --objective policy, for it is a setting of CLHA's, "
        "got 'paper'; leave it out ('policy' has",
        ("rlhf", "--reward_model", "x", "--reduction", "sum"): "sets its own (--objective.reduction sum)",
    }
    for words, expected in cases.items():
        assert cli.main([*words, "--train_file", "x", "--model", "y", "--output_dir", str(tmp_path / "z")]) == 2
        assert expected in one_sentence(capsys)


def test_a_checker_sees_a_misspelled_preset() -> None:
    assert get_type_hints(CLHAOptions.preset)["name"].__args__ == tuple(PRESETS)


def test_out_of_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_merge, "merge", lambda words: torch.empty(2**48))
    assert cli.main(["merge", "a", "b"]) == 1
    said = one_sentence(capsys)
    assert said.startswith("clha-fast merge: out of memory (")
    assert "can't allocate memory: you tried to allocate" in said
    assert "`clha-fast plan` says what a step needs" in said
    with pytest.raises(RuntimeError, match="allocate"):
        cli.main(["merge", "a", "b", "--traceback"])
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    monkeypatch.setattr(cli_merge, "merge", lambda words: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.main(["merge", "a", "b"])


def test_a_hub_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(command(tmp_path, push_to_hub=True, hub_token="hf_none")) == 2
    assert "push_to_hub: expected a repository that can be made on the Hub, got an error" in one_sentence(capsys)
    assert not (tmp_path / "run").exists()
