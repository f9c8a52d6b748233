"""Settings that do nothing for want of another one: each is said by name, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging

import clha_fast
from clha_fast.cli import main as cli
from clha_fast.cli.demo import FIRST, SECOND
from clha_fast.cli.options import split
from clha_fast.cli.runs import idle_line
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.hf import CLHAConfig, RewardConfig, RolloutConfig
from clha_fast.training import switches
from clha_fast.training.switches import SWITCHES, idle_settings
from tests.support.command_line import command

EXAMPLES = Path(clha_fast.__file__).parents[1] / "examples"
CONFIGS = (CLHAConfig, RewardConfig, RolloutConfig)
# A setting with a value, and beside what it does something; all on a CPU.
ON: dict[str, tuple[Any, dict[str, Any]]] = {
    "eval_steps": (3, {"eval_strategy": "steps"}),
    "eval_delay": (2, {"eval_strategy": "epoch"}),
    "metric_for_best_model": ("eval_runtime", {"eval_strategy": "epoch"}),
    "greater_is_better": (False, {"metric_for_best_model": "eval_loss", "eval_strategy": "epoch"}),
    "save_steps": (7, {"save_strategy": "steps"}),
    "logging_steps": (7, {"logging_strategy": "steps"}),
    "hub_model_id": ("me/x", {"push_to_hub": True}),
    "hub_private_repo": (True, {"push_to_hub": True}),
    "hub_strategy": ("end", {"push_to_hub": True}),
    "hub_always_push": (True, {"push_to_hub": True}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"gradient_checkpointing": True}),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {"activation_checkpointing": True}),
    "warmup_steps": (9, {"lr_scheduler_type": "constant_with_warmup"}),
    "per_device_train_batch_size": (3, {}),
    "eval_sample_tokens": (9, {"eval_samples": 1}),
    "eval_sample_temperature": (0.5, {"eval_samples": 2}),
}
# What switches something off that is on unless told.
OFF: dict[str, dict[str, Any]] = {
    "save_steps": {"save_strategy": "epoch"},
    "logging_steps": {"logging_strategy": "no"},
    "warmup_steps": {"lr_scheduler_type": "constant"},
    "per_device_train_batch_size": {"max_tokens_per_batch": 100},
}
# Settings of one kind of run alone, or with switches of it.
OWN = {
    "per_device_train_batch_size": (CLHAConfig,),
    **dict.fromkeys(("eval_sample_tokens", "eval_sample_temperature"), (CLHAConfig,)),
}
CASES = [
    (config, name)
    for config in CONFIGS
    for name in ON
    if name in config.__dataclass_fields__ and config in OWN.get(name, CONFIGS)
]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of these settings."""
    found: list[str] = []
    monkeypatch.setattr(switches.logger, "warning_once", found.append)
    return found


def made(config: type[Any], **settings: Any) -> Any:
    return config(**{"output_dir": "out", "report_to": "none", "use_cpu": True, **settings})


@pytest.mark.parametrize(("config", "name"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_a_setting_without_its_switch_is_said(config: type[Any], name: str, said: list[str]) -> None:
    value, beside = ON[name]
    made(config, **{name: value}, **beside)
    assert said == []
    off = OFF.get(name, {})
    made(config, **{name: value}, **off)
    assert len(said) == 1
    switch = SWITCHES[name][0]
    assert said[0].startswith(f"{name}: acts with {switch.name}="), said
    assert said[0].endswith(f"give both, or leave {name} out")
    made(config, **off)
    made(config, **beside)
    assert len(said) == 1, "untouched fields say nothing"


@pytest.mark.parametrize("given", [{"version": 2}, "fsdp.json"], ids=["mapping", "file"])
def test_a_configuration_of_fsdp_without_it(given: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(idle_settings({"fsdp_config": given}, CLHAConfig)) == ["fsdp_config"]
    zeros = {"min_num_params": 0, "xla": False}  # what older releases put there
    for settings in ({"fsdp": True, "fsdp_config": given}, {"fsdp_config": {}}, {"fsdp_config": zeros}):
        assert idle_settings(settings, CLHAConfig) == {}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert idle_settings({"fsdp_config": given}, CLHAConfig) == {}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_strategy": "steps", "logging_steps": 5},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "greater_is_better": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda settings: "+".join(settings) or "none",
)
def test_what_transformers_fills_in_is_not_said(
    config: type[Any], settings: dict[str, Any], tmp_path: Path, said: list[str]
) -> None:
    """Nor in copies, however they are made, and with the evaluation switched off in them."""
    args = made(config, **settings)
    dataclasses.replace(args)
    config(**json.loads(json.dumps(args.to_dict())))
    off = {"eval_strategy": "no", "load_best_model_at_end": False, "lr_scheduler_type": "linear"}
    dataclasses.replace(args, **off)
    assert said == []


def test_it_is_said_once_and_in_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    printed: list[str] = []
    logger = logging.get_logger(switches.__name__)
    monkeypatch.setattr(logger, "warning", lambda text, *_, **__: printed.append(text))
    for place in (1, 0, 0):
        args = made(CLHAConfig)
        monkeypatch.setattr(type(args), "process_index", property(lambda _, place=place: place))
        switches.say_idle(args, {"eval_steps": f"said once {place}"})
    assert printed == ["said once 0"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_sample_tokens", 9),
        ("eval_sample_temperature", 0.5),
        ("eval_drop_inert", True),
        ("truncation_mode", "keep_end"),
    ],
)
def test_rollouts_refuse_what_they_have_no_use_for(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .* where answers are sampled, got "):
        made(RolloutConfig, **{name: value})


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--eval_steps", "2"), ["eval_steps"]),
        (("--metric_for_best_model", "eval_loss", "--eval_delay", "1"), ["eval_delay", "metric_for_best_model"]),
        (("--save_strategy", "epoch", "--save_steps", "1"), ["save_steps"]),
        (
            ("--eval_sample_tokens", "3", "--eval_sample_temperature", "1"),
            ["eval_sample_tokens", "eval_sample_temperature"],
        ),
        (("--logging_first_step", "true"), []),
    ],
)
def test_the_command_says_it(
    tmp_path: Path, words: tuple[str, ...], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tmp_path, "--max_steps", "1", "--eval_fraction", "0", "--plot", "false", *words)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unused")]
    assert len(lines) == bool(names)
    assert [
        part.split()[0].rstrip(":") for part in "".join(lines).removeprefix("unused").split(", or leave ")[1:]
    ] == names


@pytest.mark.parametrize(
    "settings",
    [FIRST, SECOND, {"save_strategy": "no", "logging_strategy": "epoch"}]
    + [yaml.safe_load((EXAMPLES / name).read_text()) for name in ("alpacaeval.yaml", "smollm2.yaml")],
    ids=["demo 1", "demo 2", "nothing saved", "alpacaeval", "smollm2"],
)
def test_our_own_settings_all_have_a_part(settings: dict[str, Any], said: list[str]) -> None:
    _, config, _ = split(settings)
    run = Run(RunOptions(train_file="x", model="y"), {**config, "output_dir": "out", "use_cpu": True})
    assert idle_line(run) == {}
    assert said == []


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 2**32), ("seed", 1.5), ("data_seed", 2**63)])
def test_seeds_that_no_generator_takes(config: type[Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number from "):
        made(config, **{name: value})
    made(config, seed=2**32 - 1, data_seed=-1)
