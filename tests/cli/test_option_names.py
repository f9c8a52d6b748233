"""Options that there are not, and settings that cannot be made, are refused before anything is imported or written."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from clha_fast.cli import names
from clha_fast.cli.options import HINTS
from clha_fast.training.config import CLHAConfig
from tests.support import forked
from tests.support.command_line import command, one_sentence
from tests.support.helpers import ROOT


def test_names_read_from_source_are_the_options() -> None:
    assert names.option_names() == set(HINTS)
    assert not set(HINTS) & set(names.ELSEWHERE)


REFUSED = [
    (["--torch-dtype", "bfloat16"], "command line: unknown option 'torch_dtype'; here it is --dtype"),
    (["--model_name_or_path=x"], "'model_name_or_path'; here it is --model"),
    (["--seed", "1", "--use_peft"], "here it is --peft_config.r 16"),
    (["--lora_target_modules", "all"], "here it is --peft_config.target_modules"),
    (["--dataset_name", "a/b"], "here it is --train_file, with the path of a file"),
    (["--weigth_decay", "1"], "did you mean 'weight_decay'?"),
]


def test_refused_without_importing_transformers() -> None:
    """One after the other in a process that has imported nothing before; what one imported the next would show."""
    code = "import sys; from clha_fast.cli.main import main\n"
    code += f"for words in {[words for words, _ in REFUSED]}:\n"
    code += "    print(main(['train', *words])); assert 'transformers' not in sys.modules, words"
    done = forked.run("bare", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * len(REFUSED)
    for (_, message), line in zip(REFUSED, done.stderr.splitlines(), strict=True):
        assert message in line


def test_names_in_a_file_and_of_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("max_seq_length: 9\n")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}"]):
        assert cli.main(["train", *words]) == 2
        assert "run.yaml: unknown option 'max_seq_length'; here it is --max_length\n" in one_sentence(capsys)
    names.check_names(["--model-config.hidden-size", "3", "--plot=false", "--config", "/nowhere", "stray"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--lr_scheduler_type", "cosine_with_min_lr"],
            "lr_scheduler_kwargs: expected what the schedule 'cosine_w",
        ),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_kwargs: expected what the schedule 'warmup_sta"),
        (["--lr_scheduler_kwargs.cycles", "3"], "lr_scheduler_kwargs: expected what the schedule 'linear' takes"),
        (["--optim", "galore_adamw"], "optim: expected an optimizer that can be made here, got 'galore_adamw' ("),
        (["--optim", "schedule_free_radam"], "optim: expected an optimizer that can be made here"),
    ],
)
def test_what_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(command(tmp_path, *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "inverse_sqrt", "polynomial", "cosine_with_restarts"])
def test_schedules_that_can_be_made(tmp_path: Path, name: str) -> None:
    CLHAConfig(str(tmp_path), lr_scheduler_type=name, use_cpu=True)
    CLHAConfig(
        str(tmp_path), lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6}, use_cpu=True
    )


def test_commands_that_take_columns_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    found = re.search(r"says the same to\n(.*?) of its references", page, re.S)
    assert found is not None
    named = re.findall(r"`([a-z -]+)`", found[1])
    assert len(named) > 8
    for words in (name.split() for name in named):
        with contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
        assert "--columns" in capsys.readouterr().out, words
