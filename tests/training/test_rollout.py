"""Rollouts: what is sampled is what is trained, its log-probabilities are the sampler's, and the reward rises."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, MiniMaxConfig, MixtralConfig

from clha_fast.batching.batch import CandidateBatch
from clha_fast.data.prompts import Prompted, PromptRecord, read_prompts
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.generation.backend import EncodedPrompt, GenerationSettings
from clha_fast.training import prompt_data
from clha_fast.training.prompt_data import PromptDataset
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from tests.support.chat_templates import SHAPES, chat_tokenizer
from tests.support.power_cuts import CutAfter, PowerCut, dropout_model, weights
from tests.support.tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
PROMPTS: list[Prompted] = [PromptRecord(f"say {number}") for number in range(10)]


def vowels(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """A reward that can be computed: it likes an e."""
    return [[float(text.count("e")) for text in texts] for texts in answers]


@pytest.mark.parametrize("name", ["no generation prompt", "empty thoughts", "chatml"])
def test_responses_beside_a_prompt_play_no_part(name: str) -> None:
    """Nor where the template has no generation prompt: the header of the answer is there all the same."""
    tokenizer = chat_tokenizer(SHAPES[name])
    messages = ({"role": "user", "content": "Why?"},)
    ranked = RankedRecord(messages, ("<think>\nHm.\n</think>\n\nYes.", "<think>\nSo.\n</think>\n\nno"))
    settings = GenerationSettings()
    alone = PromptDataset([PromptRecord(messages)], tokenizer, settings).prompts
    assert PromptDataset([ranked], tokenizer, settings).prompts == alone
    assert tokenizer.decode(alone[0].ids).endswith("<|im_start|>assistant\n")


def trainer(
    folder: Path, model: Any = None, reward: Any = vowels, callbacks: Any = (), **changes: Any
) -> RolloutTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 16,
        "answers_per_prompt": 5,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return RolloutTrainer(
        make_model(len(TOKENIZER)) if model is None else model,
        RolloutConfig(**{**settings, **changes}),
        reward,
        PROMPTS,
        PROMPTS[:3],
        TOKENIZER,
        callbacks=list(callbacks),
    )


def rollout(ours: RolloutTrainer, *steps: list[int]) -> list[CandidateBatch]:
    drawn = [[{"prompts": torch.tensor(numbers)}] for numbers in steps]
    return [CandidateBatch.from_dict(batch) for step in ours._rollout(drawn) for batch in step]


def eager_logps(model: Any, batch: CandidateBatch, temperature: float) -> torch.Tensor:
    logits = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.row_index] / temperature
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def test_reward_rises(tmp_path: Path) -> None:
    ours = trainer(tmp_path, max_steps=40, rollout_steps=2, logging_steps=10, per_device_train_batch_size=5)
    before = ours.evaluate()
    ours.train()
    after = ours.evaluate()
    seen = [line["reward"] for line in ours.state.log_history if "loss" in line]
    assert len(seen) == 4
    assert seen[0] < 1 < 3 < seen[-1]
    assert seen == sorted(seen)
    assert before["eval_reward"] < 1 < 3 < after["eval_reward"]
    assert after["eval_reward"] == sum(after["rewards"]) / 3
    assert any(line.get("clip_share", 0) > 0 for line in ours.state.log_history)


def test_a_second_call_trains_on_answers_of_its_own(tmp_path: Path) -> None:
    """The first call samples for two steps and makes one; what is left are answers of a policy that was."""
    judged: list[int] = []

    def reward(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        judged.append(len(records))
        return vowels(records, answers)

    ours = trainer(tmp_path, reward=reward, max_steps=1, rollout_steps=2, logging_steps=1)
    for calls in (1, 2):
        ours.train()
        assert len(judged) == calls
        assert ours.state.global_step == 1
        (line,) = [line for line in ours.state.log_history if "loss" in line]
        assert line["ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_trained_is_what_was_sampled(tmp_path: Path, temperature: float) -> None:
    judged: list[tuple[str, str]] = []

    def reward(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        judged.extend(
            (str(record.prompt), text) for record, texts in zip(records, answers, strict=True) for text in texts
        )
        return vowels(records, answers)

    ours = trainer(tmp_path, reward=reward, temperature=temperature, drop_inert=False)
    (batch,) = rollout(ours, [3, 7])
    assert batch.candidates_per_prompt.tolist() == [5, 5]
    assert [prompt for prompt, _ in judged] == ["say 3"] * 5 + ["say 7"] * 5
    rows = batch.targets.split(batch.candidate_lengths.tolist())
    assert len({tuple(row.tolist()) for row in rows}) > 7
    for row, (_, text) in zip(rows, judged, strict=True):
        assert TOKENIZER.decode(row, skip_special_tokens=True).strip() == text
        assert 1 not in row[:-1].tolist()
        assert len(row) == 6 or row[-1] == 1
    assert batch.rewards is not None
    assert batch.rewards.tolist() == [float(text.count("e")) for _, text in judged]
    assert batch.old_logps is not None
    with torch.no_grad():
        expected = eager_logps(ours.model.eval(), batch, temperature)
    torch.testing.assert_close(batch.old_logps, expected, rtol=1e-5, atol=1e-5)


def test_first_step_by_hand(tmp_path: Path) -> None:
    """rho is 1: the loss is -sum A_i |y_i| / tokens, its slope -A_i / tokens a token."""
    ours = trainer(tmp_path, drop_inert=False)
    drawn = iter([{"prompts": torch.tensor([1, 2])}])
    samples, _ = ours.get_batch_samples(drawn, 1, torch.device("cpu"))
    batch = CandidateBatch.from_dict(samples[0])
    assert batch.rewards is not None
    rewards = batch.rewards.double().split([5, 5])
    assert all(len(own.unique()) > 1 for own in rewards)
    advantages = torch.cat([(own - own.mean()) / (own.std() + 1e-4) for own in rewards])
    lengths = batch.candidate_lengths
    expected = -float((advantages * lengths).sum() / lengths.sum())
    ours.current_gradient_accumulation_steps = 1
    ours.accelerator.gradient_state._set_sync_gradients(True)
    loss = ours.training_step(ours.model, samples[0])
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    by_hand = -(eager_logps(ours.model, batch, 1.0) * advantages.repeat_interleave(lengths)).sum() / lengths.sum()
    names = [name for name, _ in ours.model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(by_hand, list(ours.model.parameters())), strict=True))
    norm = sum(float(grad.norm()) ** 2 for grad in gradients.values()) ** 0.5
    assert norm > 0.01
    for name, weight in ours.model.named_parameters():
        assert weight.grad is not None
        assert float((weight.grad - gradients[name]).norm()) < 1e-4 * norm, name


def test_the_sampler_is_the_policy_until_it_is_updated(tmp_path: Path) -> None:
    """Dropout would part them; with three steps a rollout the later ones are off. An epoch has 5: 3, 2, and anew."""
    ours = trainer(tmp_path, dropout_model(), max_steps=6, rollout_steps=3)
    ours.train()
    lines = [line for line in ours.state.log_history if "loss" in line]
    assert [line["old_kl"] > 1e-7 for line in lines] == [False, True, True, False, True, False]
    assert [lines[step]["ratio"] for step in (0, 3, 5)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert ours.model.config.attn_pdrop == 0.1  # what is saved is the model as it came


def test_shared_rows_are_the_same_run(tmp_path: Path) -> None:
    padded, shared = (trainer(tmp_path / name, layout=name, rollout_steps=2) for name in ("padded", "shared"))
    curves = []
    for ours in (padded, shared):
        ours.train()
        curves.append([line["loss"] for line in ours.state.log_history if "loss" in line])
    assert shared.layout == "shared"
    assert shared.largest_batch is not None
    assert shared.largest_batch.segments is not None
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-5)


def test_reference(tmp_path: Path) -> None:
    ours = trainer(tmp_path, objective={"name": "policy", "kl_weight": 0.5}, reference="copy")
    ours.train()
    found = [line["reference_kl"] for line in ours.state.log_history if "loss" in line]
    assert found[0] == pytest.approx(0, abs=1e-7)
    assert found[-1] > 1e-4


# 10 prompts, 2 a batch: 5 steps an epoch, so that its last rollout is shorter; a cut at 4 has one step's answers left.
@pytest.mark.parametrize(
    "changes", [{"layout": "shared"}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}]
)
def test_resumed_in_the_middle_of_a_rollout(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"max_steps": 8, "rollout_steps": 3, "save_strategy": "steps", "save_steps": 4, **changes}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    half = trainer(tmp_path / "half", callbacks=[CutAfter(4)], **settings)
    with pytest.raises(PowerCut):
        half.train()
    torch.manual_seed(1234)
    rest = trainer(tmp_path / "half", **settings)
    rest.train(resume_from_checkpoint=True)
    expected = weights(whole.model)
    assert not torch.equal(expected["lm_head.weight"], weights(half.model)["lm_head.weight"])
    for name, tensor in weights(rest.model).items():
        assert torch.equal(tensor, expected[name]), name
    for name in ("reward", "loss", "ratio"):
        assert [line.get(name) for line in rest.state.log_history] == [
            line.get(name) for line in whole.state.log_history
        ], name


def test_stop_texts(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    prompt = EncodedPrompt((0, 5), ("Human:",), (1,), 0)
    for text, expected in (("joy Human: rain", ("joy", True)), ("joy", ("joy", False)), ("Human:", ("", True))):
        assert ours._text(prompt, TOKENIZER(text, add_special_tokens=False)["input_ids"]) == expected
    assert ours._text(prompt, [*TOKENIZER("joy", add_special_tokens=False)["input_ids"], 1]) == ("joy", True)
    assert ours._text(prompt, [1]) == ("", True)


def test_equal_rewards_train_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ours = trainer(tmp_path, reward=lambda records, answers: [[1.0] * len(texts) for texts in answers], max_steps=2)
    before = weights(ours.model)
    ours.train()
    for name, tensor in weights(ours.model).items():
        assert torch.equal(tensor, before[name]), name
    assert "nothing was trained" not in caplog.text, "steps were taken"
    trainer(tmp_path, max_steps=0).train()
    assert "train: nothing was trained; no step was asked for" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 9])
def test_samples_are_the_answers_that_were_judged(tmp_path: Path, count: int) -> None:
    """Of the first prompts (there are three), at every evaluation; training is the same without."""
    when: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
    plain = trainer(tmp_path / "plain", **when)
    plain.evaluate()
    plain.train()
    ours = trainer(tmp_path, eval_samples=count, **when)
    found = {0: ours.evaluate()["rewards"]}
    ours.train()
    found[4] = ours.evaluate()["rewards"]
    path = tmp_path / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    places = range(min(count, 3))
    assert [(line["step"], line["index"]) for line in lines] == [(s, place) for s in (0, 2, 4) for place in places]
    for line in lines:
        assert line["prompt"] == f"say {line['index']}"
        assert line["reward"] == vowels([], [[line["completion"]]])[0][0]
        assert line["reward"] == found.get(line["step"], {line["index"]: line["reward"]})[line["index"]]
    answered = ours._answer(ours.eval_dataset, places, 1, 0.0)
    assert [line["completion"] for line in lines if line["step"] == 4] == list(answered.texts)
    assert [line["finished"] for line in lines if line["step"] == 4] == list(answered.finished)
    assert [line["tokens"] for line in lines if line["step"] == 4] == [
        len(f["completion_ids"][0]) for f in answered.features
    ]
    for name, tensor in weights(ours.model).items():
        assert torch.equal(tensor, weights(plain.model)[name]), name
    before = path.read_bytes()
    ours.predict(PROMPTS[5:7])
    assert path.read_bytes() == before
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda r, a: [[0.0] for _ in a],
            r"reward: expected 2 lists of 5 numbers, one an answer, got lists of \[1, 1\]",
        ),
        (lambda r, a: None, "reward: expected 2 lists of 5 numbers, one an answer, got None"),
        (lambda r, a: [["good"] * len(t) for t in a], r"reward: expected 2 lists of 5 numbers, .* got \[\['good'"),
        (lambda r, a: [[math.nan] * len(t) for t in a], "reward: expected finite numbers"),
    ],
)
def test_rewards_that_are_refused(tmp_path: Path, reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, reward=reward).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft"}, "objective: expected policy with the advantages of the group, got 'sft'"),
        ({"objective": {"name": "policy", "advantages": "given"}}, "objective: expected policy with the advantages of"),
        ({"answers_per_prompt": 1}, "answers_per_prompt: expected a whole number of at least 2, got 1"),
        ({"rollout_steps": 0}, "rollout_steps: expected a whole number of at least 1, got 0"),
        ({"max_completion_length": None}, "max_completion_length: expected a number of tokens"),
        ({"max_length": 10}, "max_length: expected None where answers are sampled, got 10"),
        ({"eval_sample_tokens": 9}, "eval_sample_tokens: expected 64 where answers are sampled, got 9"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected random or sequential"),
        ({"fsdp": True}, "args: expected one process without FSDP or DeepSpeed"),
        ({"margin": 2.0}, "margin: expected none with objective='policy'"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def rows_trainer(folder: Path, train: Any, held_out: Any, **given: Any) -> RolloutTrainer:
    settings: dict[str, Any] = {"use_cpu": True, "max_steps": 1, "max_completion_length": 3, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": False}
    args = RolloutConfig(output_dir=str(folder), **settings)
    return RolloutTrainer(make_model(len(TOKENIZER)), args, vowels, train, held_out, TOKENIZER, **given)


@pytest.mark.parametrize("kind", [list, tuple, datasets.Dataset.from_list])
def test_rows_are_prompts_too(tmp_path: Path, kind: Any) -> None:
    rows = [{"prompt": f"say {number}"} for number in range(6)]
    chats = [{"prompt": [{"role": "user", "content": "say 3"}]}, {"prompt": [{"role": "user", "content": "say 4"}]}]
    ours = rows_trainer(tmp_path, kind(rows), {"text": kind(rows[:2]), "chat": kind(chats)})
    ours.train()
    assert ours.state.global_step == 1
    found = ours.evaluate()
    assert {name: len(own) for name, own in found["rewards"].items()} == {"text": 2, "chat": 2}
    assert {"eval_text_reward", "eval_chat_reward", "eval_chat_empty_share"} <= {*found}
    assert len(ours.evaluate(kind(rows[1:4]))["rewards"]) == 3
    assert ours.evaluate("chat")["rewards"] == found["rewards"]["chat"]
    with pytest.raises(ValueError, match=r"prompts: expected records or rows, .* got the path 'prompts.jsonl'"):
        rows_trainer(tmp_path, "prompts.jsonl", None)


@pytest.mark.parametrize("columns", [{"prompt": "prompt"}, {"prompt": "question"}])
def test_columns_beside_a_mapped_prompt_are_left_out(columns: dict[str, str]) -> None:
    rows = [{columns["prompt"]: f"{number} and 1", "answer": "2"} for number in range(3)]
    assert [record.prompt for record in read_prompts(rows, columns=columns)] == ["0 and 1", "1 and 1", "2 and 1"]


@pytest.mark.parametrize("prefix", ["A good one:", "Yes. "])
def test_answers_begin_with_the_prefix(tmp_path: Path, prefix: str) -> None:
    judged: list[str] = []

    def reward(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        judged.extend(text for texts in answers for text in texts)
        return vowels(records, answers)

    ours = rows_trainer(tmp_path, PROMPTS, PROMPTS[:2], answer_prefix=prefix)
    ours.reward = reward
    (batch,) = rollout(ours, [1, 2])
    assert all(TOKENIZER.decode(ids).endswith(prefix) for ids in (p.ids for p in ours.train_dataset.prompts))
    ours.evaluate([{"prompt": "another"}])
    assert judged
    assert not any(prefix.strip() in text for text in judged)
    assert batch.targets.numel() <= 8 * 3  # the prefix is no part of what is trained


@pytest.mark.parametrize("noise", [0.1, 5.0])
def test_noise_in_embeddings_is_refused(tmp_path: Path, noise: float) -> None:
    with pytest.raises(ValueError, match="neftune_noise_alpha: expected None where answers are sampled, got"):
        trainer(tmp_path, neftune_noise_alpha=noise)


def mixture(kind: type[Any], **changes: Any) -> Any:
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**sizes, **heads, "pad_token_id": 2, **changes}))


@pytest.mark.parametrize("kind", [MixtralConfig, MiniMaxConfig])
@pytest.mark.parametrize("noise", [0.5, 0.0])
def test_a_forward_that_draws_is_refused(tmp_path: Path, kind: type[Any], noise: float) -> None:
    """Whatever it is that draws: the ratio of a policy with itself would not be 1."""
    ours = trainer(tmp_path, mixture(kind, router_jitter_noise=noise), max_steps=1)
    if noise:
        with pytest.raises(ValueError, match="model: expected one whose forward draws nothing in training"):
            ours.train()
    else:
        ours.train()
        assert ours.state.log_history[0]["ratio"] == pytest.approx(1, abs=1e-5)


def test_what_the_rewards_of_a_prompt_say(tmp_path: Path) -> None:
    """Their spread, prompts that train nothing, and what the reward itself has counted."""

    class Counted:
        def __init__(self) -> None:
            self.metrics: dict[str, float] = {}

        def __call__(self, records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
            self.metrics = {"judge_cut_share": 0.25}
            return [[1.0] * 5 if record.prompt == "say 1" else [0.0, 0.0, 0.0, 0.0, 5.0] for record in records]

    ours = trainer(tmp_path, reward=Counted(), max_steps=1)
    found = ours._answer(ours.train_dataset, [1, 2, 1, 1], 5, 1.0).metrics
    assert found["equal_rewards_share"] == 0.75
    assert found["reward_std"] == pytest.approx(5**0.5 / 4)
    assert found["judge_cut_share"] == 0.25
    ours.reward = lambda records, answers: [[1.0] * len(texts) for texts in answers]
    ours.train()
    (line,) = [line for line in ours.state.log_history if "loss" in line]
    assert (line["equal_rewards_share"], line["reward_std"]) == (1.0, 0.0)
    assert "eval_reward_std" not in ours.evaluate()


def test_a_prompt_that_cannot_be_judged_says_when(tmp_path: Path) -> None:
    def reward(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        raise RecordError("in:7: prompt: expected another", source="in:7", field="prompt")

    with pytest.raises(RecordError, match="step 0: in:7: prompt: expected another"):
        trainer(tmp_path, reward=reward).train()


@pytest.mark.parametrize("column", ["solution", "answer"])
def test_a_reward_function_sees_the_columns_beside_a_prompt(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(prompt_data.logger, "warning_once", said.append)
    rows = [{"prompt": f"say {k}", column: k} for k in range(3)]

    def solved(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[float(record.extra[column])] * len(own) for record, own in zip(records, answers, strict=True)]

    args = trainer(tmp_path).args
    ours = RolloutTrainer(make_model(len(TOKENIZER)), args, solved, rows, {"one": rows[:2]}, TOKENIZER)
    assert ours.evaluate()["rewards"] == {"one": [0.0, 1.0]}
    assert len(ours.train_dataset) == 3
    assert len(set(said)) == 1
    assert said[0].startswith(f"prompts: the columns {column} are no part of them; a reward function finds them in ")


def test_rows_that_are_no_prompts_are_left_out() -> None:
    rows = [{"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}]
    with pytest.raises(RecordError, match=r"^record 1: prompt: expected .* skip_bad_records=True leaves it out"):
        PromptDataset(rows, TOKENIZER, GenerationSettings())
    found = PromptDataset(rows, TOKENIZER, GenerationSettings(), skip_bad_records=True)
    assert [record.prompt for record in found.records] == ["a", "b"]
    assert [error.source for error in found.skipped] == ["record 1"]
    with pytest.raises(RecordError, match=r"at least one good record, got 1 bad ones; the first: record 0: "):
        PromptDataset(rows[1:2], TOKENIZER, GenerationSettings(), skip_bad_records=True)
