"""What became of the limits and of prompts is said once for each set, under its name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from clha_fast.data.prompts import PromptRecord
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from tests.support.chat_templates import SHAPES, chat_tokenizer
from tests.support.tiny import make_model, make_tokenizer

LONG = [PromptRecord("say " + "the cat sat on a mat and then a dog " * 4 + str(number)) for number in range(3)]
SHORT = [PromptRecord("say it")]
MESSAGES = [PromptRecord(({"role": "user", "content": "Why?"},))]


def zero(records: Any, answers: Any) -> list[list[float]]:
    return [[0.0 for _ in texts] for texts in answers]


def trainer(folder: Path, train: Any, held_out: Any, tokenizer: Any = None, **changes: Any) -> RolloutTrainer:
    given = {"max_completion_length": 8, "max_prompt_length": 16, **changes}
    args = RolloutConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given)
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    return RolloutTrainer(make_model(len(tokenizer)), args, zero, train, held_out, tokenizer)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [line.getMessage() for line in caplog.records if line.name == "clha_fast.training.prompt_data"]
    caplog.clear()
    return found


# The model has 128 positions.
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, "3 of 3 prompts were cut on the left to 16 tokens"),
        ({"max_prompt_length": 128}, "max_prompt_length is 120 and not 128, for the model has 128 positions"),
        (
            {"max_prompt_length": None, "max_completion_length": 500},
            "3 of 3 prompts were cut on the left to 32 tokens; max_completion_length is 96 and not 500, for the model "
            "has 128 positions",
        ),
    ],
)
def test_what_became_of_the_limits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: dict[str, Any], expected: str
) -> None:
    with caplog.at_level(logging.WARNING):
        ours = trainer(tmp_path, LONG, {"near": LONG}, **limits)
        assert said(caplog) == [f"train_dataset: {expected}", f"near: {expected}"]
        ours.evaluate(LONG)
        assert said(caplog) == [f"eval_dataset: {expected}"]
        ours.evaluate()
        assert not said(caplog)


@pytest.mark.parametrize("limits", [{}, {"max_prompt_length": None}, {"max_prompt_length": 120}])
def test_nothing_is_said_of_what_is_as_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: dict[str, Any]
) -> None:
    trainer(tmp_path, SHORT, SHORT, **limits)
    assert not said(caplog)


@pytest.mark.parametrize(("name", "says"), [("empty thoughts", True), ("chatml", False)])
def test_prompts_that_are_asked_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, says: bool
) -> None:
    trainer(tmp_path, MESSAGES, None, chat_tokenizer(SHAPES[name]))
    found = said(caplog)
    assert len(found) == says
    assert all("train_dataset: 1 of 1 prompts" in line and "asked as a server asks" in line for line in found)
