"""Where rollouts end: rewards that are no numbers, answers that are not the policy's, checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from clha_fast.data.prompts import Prompted, PromptRecord
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from tests.support.power_cuts import trainer as ranked_trainer
from tests.support.reward_models import spread
from tests.support.tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
PROMPTS: list[Prompted] = [PromptRecord(f"say {number}", f"prompts.jsonl:{number}") for number in range(4)]


def zero(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    return [[0.0 for _ in texts] for texts in answers]


class Deaf(LlamaForCausalLM):
    """Reads padding as text, whatever the mask says."""

    def forward(self, *args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def rwkv() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    return RwkvForCausalLM(RwkvConfig(vocab_size=len(TOKENIZER), **sizes))


def deaf() -> Any:
    return Deaf(make_model(len(TOKENIZER)).config)


@pytest.mark.parametrize("make", [rwkv, deaf])
@pytest.mark.parametrize("size", [1, 4])
def test_answers_that_depend_on_their_company_are_refused(tmp_path: Path, make: Any, size: int) -> None:
    """Sampled beside a longer prompt, they would not be the policy's that trains on them."""
    args = RolloutConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=1,
        save_strategy="no",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=size,
        answers_per_prompt=2,
        max_completion_length=2,
    )
    prompts = [PromptRecord("a cat"), PromptRecord("the cat sat on a mat and then a dog ran over it with some joy")]
    ours = RolloutTrainer(spread(make()), args, zero, prompts, prompts, TOKENIZER)
    if size == 1:
        ours.train()
        assert ours.state.global_step == 1
        return
    told = "^per_device_eval_batch_size: expected 1 for (Deaf|RwkvForCausalLM), which reads padding as text .*, got"
    with pytest.raises(ValueError, match=f"{told} 4$"):
        ours.train()
    with pytest.raises(ValueError, match=f"{told} 2$"):
        ours.evaluate()


def trainer(folder: Path, reward: Any = zero, **changes: Any) -> RolloutTrainer:
    given = {"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-2, **changes}
    args = RolloutConfig(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        answers_per_prompt=3,
        max_completion_length=3,
        **given,
    )
    return RolloutTrainer(make_model(len(TOKENIZER)), args, reward, PROMPTS, {"near": PROMPTS}, TOKENIZER)


@pytest.mark.parametrize(
    ("prompt", "answer", "value"), [(0, 0, math.nan), (1, 2, math.inf), (3, 1, -math.inf), (2, 0, math.nan)]
)
def test_a_reward_that_is_not_finite_is_named(tmp_path: Path, prompt: int, answer: int, value: float) -> None:
    ours = trainer(tmp_path)
    answers = [[f"answer {number} {place}" for place in range(3)] for number in range(4)]
    rewards = zero(PROMPTS, answers)
    rewards[prompt][answer] = value
    ours.reward = lambda records, texts: rewards
    with pytest.raises(ValueError, match=r"^reward: expected finite numbers, got ") as error:
        ours._judge(PROMPTS, answers)
    said = f"got {value} for answer {answer} of 3, 'answer {prompt} {answer}', to prompt {prompt} of 4 "
    assert said + f"(prompts.jsonl:{prompt}: 'say {prompt}') at step 0" in str(error.value)


@pytest.mark.parametrize("resumed", [True, "checkpoint-3", Path("checkpoint-3")])
def test_a_checkpoint_without_the_answers_that_wait(tmp_path: Path, resumed: Any) -> None:
    ranked_trainer(tmp_path, max_steps=3, eval_strategy="no").train()
    ours = trainer(tmp_path)
    before = ours.model.state_dict()["lm_head.weight"].clone()
    given = resumed if resumed is True else type(resumed)(tmp_path / resumed)
    with pytest.raises(ValueError, match=rf"without it; .*{re.escape('without resume_from_checkpoint')}$") as error:
        ours.train(resume_from_checkpoint=given)
    assert "checkpoint-3" in str(error.value)
    assert "rollout.pt" in str(error.value)
    assert ours.model.state_dict()["lm_head.weight"].equal(before), "refused before anything is loaded"


@pytest.mark.parametrize("best", [1, 2, 3])
def test_an_evaluation_names_the_step_of_its_weights(tmp_path: Path, best: int) -> None:
    """`best` is the step at which greedy answers, one a prompt, are liked."""
    ours = trainer(tmp_path)

    def reward(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        liked = len(answers[0]) == 1 and ours.state.global_step == best
        return [[float(place + 10 * liked) for place in range(len(texts))] for texts in answers]

    more: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "near_reward"}
    ours = trainer(tmp_path, reward, **more)
    ours.train()
    assert ours.state.best_global_step == best
    alone, several = ours.evaluate("near"), ours.evaluate()
    expected = None if best == 3 else best
    assert (alone.get("eval_step"), several.get("eval_near_step")) == (expected, expected)


@pytest.mark.parametrize("rows", [PROMPTS, [{"prompt": "say 7"}], [{"prompt": "say 8", "solution": 2}] * 3])
@pytest.mark.parametrize("prefix", ["test", "late"])
def test_predictions_are_the_rewards_of_an_evaluation(tmp_path: Path, rows: Any, prefix: str) -> None:
    def lengths(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        pairs = zip(records, answers, strict=True)
        return [[float(len(record.prompt) + len(text)) for text in own] for record, own in pairs]

    ours = trainer(tmp_path, lengths)
    expected = ours.evaluate(rows)
    del expected["epoch"]  # which a line of the log has
    logged = len(ours.state.log_history)
    found = ours.predict(rows, metric_key_prefix=prefix)
    assert found.predictions.tolist() == expected.pop("rewards")
    assert found.label_ids is None
    assert found.metrics == {name.replace("eval", prefix, 1): value for name, value in expected.items()}
    assert len(ours.state.log_history) == logged


@pytest.mark.parametrize(("rows", "said"), [(None, "^test_dataset: expected prompts"), ("p.jsonl", "got the path 'p")])
def test_what_cannot_be_predicted_is_named(tmp_path: Path, rows: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).predict(rows)
