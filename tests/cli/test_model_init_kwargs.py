"""What `from_pretrained` is given from a file or the command line: it arrives, or is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli import main as cli
from clha_fast.cli.names import ELSEWHERE, option_names, unknown
from clha_fast.cli.options import read_flags
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.models.init_kwargs import check_init_kwargs
from tests.support.command_line import command, one_sentence, write_rows
from tests.support.tiny import make_model, make_tokenizer

LOADED: dict[str, Any] = {"model_config": None, "build_tokenizer": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("given", [{"attention_dropout": 0.3}, {"rms_norm_eps": 1e-3, "trust_remote_code": True}])
def test_they_reach_the_model(tmp_path: Path, saved: str, given: dict[str, Any]) -> None:
    options = RunOptions(train_file=str(write_rows(tmp_path / "train.jsonl")), model=saved, eval_fraction=0)
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True, "model_init_kwargs": given}
    run = Run(options, settings).prepare()
    assert {name: getattr(run.trainer.model.config, name, True) for name in given} == given
    assert run.changed["model_init_kwargs"] == given


def test_a_run_and_what_resumes_it(tmp_path: Path, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(tmp_path, "--model", saved, **{**LOADED, "max_steps": 1, "eval_fraction": 0})
    assert cli.main([*words, "--model_init_kwargs.attention_dropout", "0.3"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--resume"]) == 2
    assert "model_init_kwargs" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nonsense", "3"], "model_init_kwargs: expected arguments of from_pretrained or fields of the model's config"),
        (["dtype", "bfloat16"], "model_init_kwargs: expected no dtype, which here is --dtype\n"),
        (["torch_dtype", "bfloat16"], "expected no torch_dtype, which here is --dtype\n"),
        (["attn_implementation", "eager"], "which here is --attn_implementation\n"),
        (["revision", "main"], "expected no revision, which here is --model DIR after `hf download NAME --revision"),
        (["load_in_4bit", "true"], "which here is --model_init_kwargs.quantization_config '{load_in_4bit: true}'\n"),
    ],
)
def test_refused_in_a_sentence(
    tmp_path: Path, saved: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    name, value = flags
    words = command(tmp_path, "--model", saved, f"--model_init_kwargs.{name}", value, **LOADED)
    assert cli.main(words) == 2
    assert message in one_sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_refused_where_none_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, "--model_init_kwargs.attention_dropout", "0.1")) == 2
    assert "model_init_kwargs: expected none beside model_config" in one_sentence(capsys)
    with pytest.raises(ValueError, match="model_init_kwargs: expected a mapping, arguments of from_pretrained, got 3"):
        check_init_kwargs(3, True)
    assert check_init_kwargs(None, False) == {}


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_every_way_that_is_named_is_one(name: str) -> None:
    """The hint begins with an option, is given, and what it shows as entries of a mapping can be read."""
    known = option_names()
    assert known is not None
    text = str(unknown(name, "command line", known | {"overwrite", "resume"}))
    assert f"here it is {ELSEWHERE[name]}" in text
    flag, _, value = ELSEWHERE[name].partition(" '")
    if value:
        read_flags([flag, value.partition("'")[0]])


@pytest.mark.parametrize(
    "name", ["load_in_4bit", "load_in_8bit", "quantization_config", "bnb_4bit_quant_type", "use_bnb_nested_quant"]
)
def test_weights_in_four_bits_from_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command_name in ("train", "rlhf"):
        assert cli.main([command_name, f"--{name}", "true"]) == 2
        assert "here it is --model_init_kwargs.quantization_config '{load_in_" in one_sentence(capsys)
    assert cli.main(["reward-model", "train", f"--{name}", "true"]) == 2
    assert "here it is" not in one_sentence(capsys)  # whose models are classifiers, loaded without
