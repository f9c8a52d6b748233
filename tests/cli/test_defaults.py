"""The defaults in the help of `train` are those that a run has."""

from __future__ import annotations

import re
from pathlib import Path

from clha_fast.cli.defaults import defaults_text
from clha_fast.cli.options import CONFIG_HINTS, RUN_HINTS
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.training.config import CLHAConfig


def shown() -> dict[str, str]:
    return dict(re.findall(r"--(\w+) (\([\w ]+\)|\S+)", defaults_text()))


def test_every_option_is_there_with_what_a_run_has(tmp_path: Path) -> None:
    found = shown()
    assert set(found) == {*CONFIG_HINTS, *RUN_HINTS, "plot", "memory_report"}
    run = Run(RunOptions(train_file="x", model="y"), {"output_dir": str(tmp_path)})
    loss = run.args.loss_options()
    for name in (
        "learning_rate",
        "per_device_train_batch_size",
        "logging_steps",
        "save_steps",
        "seed",
        "num_train_epochs",
    ):
        assert found[name] == str(getattr(run.args, name)), name
    for name in ("margin", "reward_margin", "noise_rule", "reduction", "sft", "sft_weight", "sft_factor"):
        assert found[name] == str(getattr(loss, name)), name
    assert (found["optim"], found["report_to"]) == (str(getattr(run.args.optim, "value", run.args.optim)), "none")
    assert (found["eval_fraction"], found["plot"], found["model"]) == ("0.1", "true", "(none)")


def test_a_batch_is_as_large_as_the_trainer_s(tmp_path: Path) -> None:
    args = Run(RunOptions(train_file="x", model="y"), {"output_dir": str(tmp_path)}).args
    trainer = CLHAConfig(output_dir=str(tmp_path))
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "num_train_epochs"):
        assert getattr(args, name) == getattr(trainer, name), name
