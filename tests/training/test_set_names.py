"""`evaluate` takes the name of one of the trainer's own sets; another text is refused with the names there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clha_fast.data.prompts import PromptRecord
from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from clha_fast.training.trainer import CLHAConfig, CLHATrainer
from tests.support.reward_models import llama
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
PROMPTS = [PromptRecord(f"say {number}") for number in range(3)]


def ranked(folder: Path, sets: Any) -> Any:
    args = CLHAConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True)
    return CLHATrainer(make_model(len(TOKENIZER)), args, eval_dataset=sets(make_rows(3)), processing_class=TOKENIZER)


def reward(folder: Path, sets: Any) -> Any:
    args = RewardConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True)
    return RewardTrainer(llama(), args, eval_dataset=sets(make_rows(3)), processing_class=TOKENIZER)


def rollout(folder: Path, sets: Any) -> Any:
    args = RolloutConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_completion_length=3)

    def zero(records: Any, answers: Any) -> Any:
        return [[0.0 for _ in texts] for texts in answers]

    return RolloutTrainer(make_model(len(TOKENIZER)), args, zero, PROMPTS, sets(PROMPTS), TOKENIZER)


@pytest.mark.parametrize("made", [ranked, reward, rollout])
def test_names_of_sets(tmp_path: Path, made: Any) -> None:
    alone = made(tmp_path, lambda rows: rows)
    for name in ("near", "far.jsonl"):
        with pytest.raises(ValueError, match=rf"^eval_dataset: expected None, .* or rows, .* got '{name}'$"):
            alone.evaluate(name)
    named = made(tmp_path, lambda rows: {"near": rows, "far": rows[:2]})
    for name, end in (("x", ""), ("nea", "; did you mean 'near'\\?")):
        with pytest.raises(ValueError, match=rf"^eval_dataset: expected a name .*'near', 'far'.* got '{name}'{end}$"):
            named.evaluate(name)
    assert "eval_model_preparation_time" in (found := named.evaluate("far")) or "eval_reward" in found
