"""What is suggested in place of a name that there is not, and that commands which are named are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from clha_fast.cli.main import COMMANDS
from clha_fast.messages import nearest
from tests.support.helpers import ROOT

CALL = re.compile(r"(?:clha-fast|-m clha_fast) ([a-z][a-z0-9-]*)")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.M | re.S)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("evaluate", "eval"),  # by its letters nearer to ablate
        ("evaluation", "eval"),
        ("comparison", "compare"),
        ("tarin", "train"),
        ("trains", "train"),
        ("conv", "convert"),
        ("rewardmodel", "reward-model"),
        ("table", "table2"),
        ("xyz", None),
    ],
)
def test_the_nearest_command(name: str, meant: str | None) -> None:
    assert nearest(name, COMMANDS) == ("" if meant is None else f"; did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("optimizer", ["optim", "minimizer"], "optim"),
        ("peft", ["preset", "peft_config"], "peft_config"),
        ("hidden_sise", ["hidden", "hidden_size"], "hidden_size"),  # a letter wrong: no beginning beats it
        ("eval_stepz", ["eval_st", "eval_steps"], "eval_steps"),
        ("a", ["another_name_altogether"], None),
        ("anything", [], None),
    ],
)
def test_a_beginning_before_mere_likeness(name: str, known: list[str], meant: str | None) -> None:
    assert nearest(name, known) == ("" if meant is None else f"; did you mean {meant!r}?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_names_are_there(page: Path) -> None:
    assert unknown_commands(CODE.findall(page.read_text("utf-8"))) == []


def test_commands_that_scripts_and_messages_name_are_there() -> None:
    folders = ("clha_fast", "benchmarks", "examples")
    texts = [text for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) for text in strings(path)]
    others = [ROOT / "Makefile", *(ROOT / "examples").glob("*.yaml"), *(ROOT / "clha_fast").rglob("*.yaml")]
    texts += [line for path in others for line in path.read_text("utf-8").splitlines()]
    assert sum(bool(CALL.search(text)) for text in texts) > 50
    assert unknown_commands(texts) == []


def test_a_command_that_is_not_there_is_seen() -> None:
    page = "`clha-fast evaluate` or\n```\npython -m clha_fast trian --x\n```\nclha-fast reads them; `clha-fast eval`.\n"
    assert unknown_commands(CODE.findall(page)) == ["evaluate", "trian"]


def unknown_commands(texts: list[str]) -> list[str]:
    """Words behind the command's name, comments of a shell or of YAML left out, that are none of its commands."""
    code = (re.sub(r" # .*", "", text) for text in texts)
    return [word for text in code for word in CALL.findall(text) if word not in COMMANDS]


def strings(path: Path) -> Iterator[str]:
    """Messages and docstrings of a module: its string literals."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
