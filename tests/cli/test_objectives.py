"""Every objective of the table by `clha-fast train`: flags, files, what is printed, written and resumed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clha_fast.cli import main as cli
from clha_fast.cli import options as cli_options
from clha_fast.cli.options import OptionError, read_flags
from clha_fast.evaluation import memory
from clha_fast.objectives import OBJECTIVES, PROOptions
from clha_fast.training.config import CLHAConfig
from tests.support.command_line import SETTINGS, command, one_sentence
from tests.support.comparing import add_to_table
from tests.support.tiny import make_rows

SMALL: dict[str, Any] = {
    "model_config": {**SETTINGS["model_config"], "num_hidden_layers": 1},
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "plot": False,
}


@pytest.fixture(autouse=True)
def _one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_table(monkeypatch)


def words(folder: Path, *flags: str, **changes: Any) -> list[str]:
    """A command on rows with all that a file can hold, but reference log-probabilities."""
    data = folder / "train.jsonl"
    if not data.exists():
        rows = [{**row, "advantages": [reward / 4 for reward in row["rewards"]]} for row in make_rows(12)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return command(folder, *flags, **{**SMALL, **changes})


@pytest.mark.parametrize("name", [*OBJECTIVES, "comparing"])
def test_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(words(tmp_path, "--objective", name)) == 0
    out = capsys.readouterr().out
    loss = next(line for line in out.splitlines() if line.startswith("loss "))
    assert loss.split()[1].rstrip(":;") == ("published" if name == "clha" else name)
    assert ("reference " in out) == ("reference_logps" in OBJECTIVES[name]().needs)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lines = [line for line in metrics["log"] if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    for own in OBJECTIVES[name]().metric_names:
        assert f"\n{own} " in out
        assert f"eval_{own}" in metrics["after"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"\n- {name}\n" in card
    assert ("arXiv:2403.16649" in card) == (name == "clha")
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert identity.get("objective", "clha") == name


def test_header_and_card_of_an_objective_that_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--objective", "comparing", "--objective.beta", "5e-2", "--per-device-train-batch-size=3"]
    assert cli.main(words(tmp_path, *flags, normalizer="global")) == 0
    out = capsys.readouterr().out
    assert "\nloss      comparing: beta 0.05, must True; means over each optimiser step\n" in out
    assert "\nreference a frozen copy of the model as it is at the start\n" in out
    training = next(line for line in out.splitlines() if line.startswith("training"))
    assert "noise" not in training
    assert "SFT" not in training
    assert "reward_margin" not in out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "with the objective comparing (on ranked responses)" in card
    assert "| reference log-probabilities | a frozen copy of the model as it is at the start |" in card
    assert "| beta | 0.05 |" in card
    assert "preset" not in card


def test_the_header_of_chains_counts_them_apart_from_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: a record of one response is one chain, any other four; those between best and worst are in none."""
    rows = [{"prompt": "a b", "completions": ["c d", "e f", "g", "h", "i"][:size]} for size in (1, 2, 3, 5)]
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"eval_fraction": None, "eval_file": str(tmp_path / "held.jsonl"), "max_completion_length": 1}
    with caplog.at_level("WARNING"):
        assert cli.main(words(tmp_path, "--objective", "coh", **given)) == 0
    out = capsys.readouterr().out
    said = (
        "4 prompts, 11 responses (1 to 5 a prompt), made into 13 chains; responses between best and worst, in no chain"
    )
    cut = "4 (36%); cut to the length limits: prompts 0 (0%), chains 13 (100%)"
    for name in ("training", "held out"):
        assert f"\n{name:<9} {said} {cut}" in out
    assert "held out before training: loss " in out
    assert "pairs" not in out.split("held out before")[0]
    assert "13 of 13 chains were cut" in caplog.text


def test_a_file_says_the_same_as_flags(tmp_path: Path) -> None:
    ways: list[tuple[list[str], Any]] = [
        (["--objective", "pro", "--objective.form", "paper", "--objective.sft-weight", "1e-1"], "clha"),
        ([], {"name": "pro", "form": "paper", "sft_weight": 0.1}),
        (["--objective={name: pro, form: paper, sft_weight: 0.1}"], {"name": "sft", "form": "token_mean"}),
        (["--objective.form=paper"], {"name": "pro", "form": "published", "sft_weight": "1e-1"}),
        (["--objective.name", "pro", "--objective.sft_weight", ".1"], {"name": "pro", "form": "paper"}),
        (['--objective={"name": "pro", "form": "paper", "sft_weight": 0.1}'], None),
    ]
    for flags, objective in ways:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"objective": objective, "output_dir": str(tmp_path)}))
        options = cli_options.merge(cli_options.read_config(str(tmp_path / "run.yaml")), read_flags(flags))
        args = CLHAConfig(**cli_options.split(options)[1], use_cpu=True)
        assert args.loss_options() == PROOptions("paper", 0.1)
        assert args.objective == {"name": "pro", "form": "paper", "sft_weight": 0.1}


def test_flags_of_objectives() -> None:
    assert read_flags(["--objective", "sft"]) == {"objective": {"name": "sft"}}
    assert read_flags(["--objective.beta", "1", "--objective", "dpo"]) == {"objective": {"name": "dpo", "beta": 1}}
    base = {"objective": "dpo"}
    assert cli_options.merge(base, {"objective": {"beta": 1}}) == {"objective": {"name": "dpo", "beta": 1}}
    base = {"objective": {"name": "dpo", "beta": 1}}
    assert cli_options.merge(base, {"objective": {"name": "pro"}}) == {"objective": {"name": "pro"}}
    assert cli_options.merge(base, {"objective": "dpo"}) == base
    # The file's settings of CLHA are those of an objective that the flags replace.
    base = {"preset": "paper", "margin": 1.0, "seed": 3}
    assert cli_options.merge(base, {"objective": "pro", "sft_weight": 1.0}) == {
        "seed": 3,
        "objective": {"name": "pro"},
        "sft_weight": 1.0,
    }
    assert cli_options.merge(base, {"objective": "clha"}) == {**base, "objective": {"name": "clha"}}
    assert cli_options.merge({**base, "objective": "clha"}, {"seed": 4}) == {**base, "objective": "clha", "seed": 4}
    with pytest.raises(OptionError, match=r"^--deepspeed\.stage: expected either a value or entries of deepspeed"):
        read_flags(["--deepspeed", "a.json", "--deepspeed.stage", "2"])


def test_a_run_goes_on_however_its_objective_is_spelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And compares with the weights that it began with, which are drawn again from the seed."""
    run = tmp_path / "run"
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_fraction": 0}
    assert cli.main(words(tmp_path, "--objective.beta", "0.4", objective="comparing", **settings)) == 0
    whole = load_file(run / "model.safetensors")
    assert (run / "checkpoint-2" / "reference.json").exists()
    shutil.rmtree(run / "checkpoint-4")
    given: dict[str, Any] = {"objective": {"name": "comparing", "beta": 0.4, "must": True}, **settings}
    assert cli.main(words(tmp_path, "--resume", **given)) == 0
    assert "resumed from" in capsys.readouterr().out
    resumed = load_file(run / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    given["objective"] = {"name": "comparing", "beta": 0.5}
    assert cli.main(words(tmp_path, "--resume", **given)) == 2
    error = capsys.readouterr().err
    assert "objective was {'beta': 0.4, 'name': 'comparing'}, is {'beta': 0.5, 'name': 'comparing'}" in error


def test_the_best_model_by_an_objectives_own_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    given |= {"load_best_model_at_end": True}
    assert cli.main(words(tmp_path, objective="sft", metric_for_best_model="target_nll", **given)) == 0
    capsys.readouterr()
    assert cli.main(words(tmp_path, "--overwrite", objective="pro", metric_for_best_model="target_nll", **given)) == 2
    assert "metric_for_best_model: expected one of loss, " in one_sentence(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "por"], "objective: expected one of clha, pro, "),
        (["--objective", "sft", "--objective.fomr", "x"], "objective: unknown setting 'fomr'; did you mean 'form'?"),
        (["--objective", "pro", "--margin", "1"], "margin: expected none with --objective pro, for it is a setting of"),
        (
            ["--objective.form", "paper"],
            "objective: expected a name or a mapping with a name and settings, got {'form': 'paper'} without a name; "
            "give --objective and one of those that have form: pro, dpo, sft\n",
        ),
        (["--objective.beta", "0.1"], "; give --objective and one of those that have beta: dpo, simpo, ipo, hinge, "),
        (["--objective.gamma", "1", "--objective.beta", "2"], "without a name; give --objective simpo\n"),
        (["--objective.margin=1", "--objective.preset=paper"], "without a name; give --objective clha\n"),
        (["--objective.bta", "1"], "without a name; no objective has 'bta'; did you mean 'beta'?"),
        (["--objective.gamma", "1", "--objective.alpha", "2"], "; no objective has all of gamma, alpha\n"),
        (
            ["--reference", "copy"],
            "reference: expected None with the objective 'clha', which reads no refer",
        ),
        (
            ["--objective", "comparing", "--reference", "file"],
            "reference: expected records with reference_logps for",
        ),
        (["--objectiv", "pro"], "unknown option 'objectiv'; did you mean 'objective'?"),
        (["--beta", "0.1"], "beta: expected none with --objective clha, which has none, got"),
        (["--loss_type", "dpo"], "loss_type: expected one of sigmoid, hinge, ipo, got 'dpo'"),
        (["--ref_model", "x"], "unknown option 'ref_model'; here it is --reference"),
    ],
)
def test_objectives_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(words(tmp_path, *flags)) == 2
    assert message in one_sentence(capsys)
    assert not list((tmp_path / "run").glob("*"))


def test_help_lists_every_objective_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in OBJECTIVES:
        assert f"          {name}" in out
    assert "pro --objective.form published --objective.sft_weight 0.05\n" in out
    assert "--reference file|adapter|copy|MODEL" in out


@pytest.mark.parametrize("name", [*OBJECTIVES, "comparing"])
@pytest.mark.parametrize("variant", memory.VARIANTS)
def test_the_memory_report_runs_the_objective(name: str, variant: str) -> None:
    objective = OBJECTIVES[name]()
    shapes = memory.LossShapes(12, 8, 32, [3, 2, 4], [2, 1], rewards=[4.0, 0.0, 1.0], options=objective.encoded)
    inputs = memory._inputs(shapes)
    leaves = {key: inputs[key] for key in ("hidden", "weight")}
    memory._run(variant, inputs, shapes)
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    assert leaves["weight"].grad.any()
