"""The training of reward models: the loss by hand, pairs that are there, rows read as scoring reads them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

from clha_fast.data import read_records
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.rewards.rows import token_rows
from clha_fast.training.reward_data import PairCollator, PairedDataset
from clha_fast.training.reward_trainer import (
    METRICS,
    RewardConfig,
    RewardTrainer,
    bradley_terry,
    prepare,
    prompt_results,
)
from clha_fast.training.validation import SPEEDS
from tests.support.preferences import keyword_rows
from tests.support.reward_models import alone, bert, gpt2, llama
from tests.support.tiny import make_model, make_tokenizer
from tests.support.trainers import Features


def settings(folder: Path, **changes: Any) -> RewardConfig:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return RewardConfig(**{**given, **changes})


def trainer(folder: Path, model: Any = None, rows: Any = None, tokenizer: Any = None, **changes: Any) -> RewardTrainer:
    return RewardTrainer(
        llama() if model is None else model,
        settings(folder, **changes),
        train_dataset=keyword_rows(6) if rows is None else rows,
        eval_dataset=keyword_rows(7, seed=1),
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
    )


@pytest.mark.parametrize("form", [" {}", "{}"])
@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list, lambda rows: iter(read_records(rows))])
def test_all_that_is_saved_says_how_responses_begin(tmp_path: Path, form: str, make: Any) -> None:
    rows = [
        {**row, "completions": [form.format(text.strip()) for text in row["completions"]]} for row in keyword_rows(6)
    ]
    rows = [{**row, "prompt": row["prompt"].strip()} for row in rows]
    ours = trainer(tmp_path, rows=make(rows), max_steps=1, save_strategy="steps", save_steps=1)
    ours.train()
    ours.save_model(str(tmp_path / "final"))
    found = [load_reward_model(str(tmp_path / name), device="cpu") for name in ("checkpoint-1", "final")]
    assert [judge.blank for judge in found] == [form == " {}"] * 2
    assert found[0].fingerprint() == found[1].fingerprint()
    (tmp_path / "final" / "reward_model.json").write_text(json.dumps({"responses_begin_with_blank": form == "{}"}))
    other = load_reward_model(str(tmp_path / "final"), device="cpu")
    assert other.fingerprint() != found[1].fingerprint(), "it reads answers otherwise"


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_loss_by_hand() -> None:
    """n = 2, n = 3 with one pair left out, and n = 3 whole, in one batch."""
    rewards = torch.tensor([2.0, -1.0, 0.5, 0.25, 3.0, 1.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    better, worse = torch.tensor([0, 2, 3, 5, 5, 6]), torch.tensor([1, 4, 4, 6, 7, 7])
    losses = bradley_terry(rewards, better, worse, torch.tensor([1, 2, 3]))
    expected = [
        -log_sigmoid(3.0),
        -(log_sigmoid(-2.5) + log_sigmoid(-2.75)) / 2,
        -(log_sigmoid(1.0) + log_sigmoid(3.0) + log_sigmoid(2.0)) / 3,
    ]
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(expected, rel=1e-15)
    assert float(
        bradley_terry(torch.zeros(2), torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    ) == pytest.approx(math.log(2))
    # d/dx of -log sigmoid(x) is sigmoid(x) - 1.
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)

    def slope(x: float) -> float:
        return 1 / (1 + math.exp(-x)) - 1

    by_hand = [
        slope(3.0),
        -slope(3.0),
        slope(-2.5) / 2,
        slope(-2.75) / 2,
        -(slope(-2.5) + slope(-2.75)) / 2,
        (slope(1.0) + slope(3.0)) / 3,
        (slope(2.0) - slope(1.0)) / 3,
        -(slope(3.0) + slope(2.0)) / 3,
    ]
    assert gradient.tolist() == pytest.approx(by_hand, rel=1e-14)
    inputs = (better, worse, torch.tensor([1, 2, 3]))
    assert torch.autograd.gradcheck(lambda r: bradley_terry(r, *inputs), rewards)


@pytest.mark.parametrize("size", [3, 20])
def test_evaluation_leaves_no_prompt_out(tmp_path: Path, size: int) -> None:
    """`dataloader_drop_last` is of training; 7 prompts are held out."""
    model = llama()
    own, dropping = (
        trainer(tmp_path, model, dataloader_drop_last=drop, per_device_eval_batch_size=size) for drop in (False, True)
    )
    expected, found = own.evaluate(), dropping.evaluate()
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        assert found[name] == expected[name]
    assert len(dropping.predict(dropping.eval_dataset).predictions) == len(dropping.eval_dataset)


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_batches_that_are_not_concatenated(tmp_path: Path, size: int) -> None:
    """Of 8 prompts: full batches alone, a last one that is smaller, one batch."""
    model, rows = llama(), keyword_rows(8, seed=1)
    whole, parts = (
        trainer(tmp_path, model, rows, per_device_eval_batch_size=size, eval_do_concat_batches=joined)
        for joined in (True, False)
    )
    expected, found = (ours.predict(ours.train_dataset) for ours in (whole, parts))
    assert isinstance(found.predictions, list)
    assert prompt_results(found.predictions) == prompt_results(expected.predictions)
    for name in METRICS:
        assert found.metrics[f"test_{name}"] == expected.metrics[f"test_{name}"]


def test_rows_will_do_in_evaluation(tmp_path: Path) -> None:
    """As in the constructor: the tokens are the same, so the figures are."""
    ours = trainer(tmp_path, max_length=20)
    cut = llama()
    for rows in (keyword_rows(5, seed=2), keyword_rows(9, seed=3)):
        again = trainer(tmp_path, cut, rows, max_length=20)
        expected = again.evaluate(again.train_dataset)
        kinds = (rows, iter(rows), datasets.Dataset.from_list(rows), Features(rows))
        for found in (*map(ours.evaluate, kinds), ours.predict(rows).metrics):
            kind = "test" if "test_loss" in found else "eval"
            assert [found[f"{kind}_{name}"] for name in METRICS] == [expected[f"eval_{name}"] for name in METRICS]
        part = torch.utils.data.Subset(again.train_dataset, [0, 1])
        assert len(ours.predict(part).predictions) == 2, "what is tokenised stays"
    for path in ("held_out.jsonl", Path("held_out.jsonl")):
        with pytest.raises(ValueError, match=r"^test_dataset: expected rows, such as .* got the path 'held_out.jsonl'"):
            ours.predict(path)


def test_a_second_call_logs_its_own_steps(tmp_path: Path) -> None:
    """Weights stand still, so the second call's line, of the same two steps, is that of the first."""
    ours = trainer(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    lines = []
    for _ in range(2):
        ours.train()
        lines += [line for line in ours.state.log_history if "loss" in line]
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-6), name


def test_rewards_far_apart_and_nan() -> None:
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(rewards, torch.tensor([0]), torch.tensor([1]), torch.tensor([1])).sum()
    assert float(loss.detach()) == 2e4
    loss.backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-1.0, 1.0]
    assert bradley_terry(torch.tensor([math.nan, 0.0]), *torch.tensor([[0], [1], [1]])).isnan().all()


def test_pairs_that_are_there() -> None:
    rows = [
        {
            "prompt": "a",
            "completions": ["joy", "rain", "mat"],
            "rewards": [1.0, 1.0, 2.0],
        },  # 0-1 equal, 2 ahead of both
        {"prompt": "b", "completions": ["joy", "joy", "rain"], "rewards": [3.0, 2.0, 1.0]},  # 0-1 the same text
        {"prompt": "c", "completions": ["joy"], "rewards": [1.0]},
        {"prompt": "d", "completions": ["joy", "rain"], "rewards": [0.5, 0.5]},
        {"prompt": "e", "completions": ["joy", "rain"], "rewards": [0.0, -1.0]},
    ]
    data = PairedDataset(rows, make_tokenizer())
    pairs = [list(zip(prompt.better, prompt.worse, strict=True)) for prompt in (data[k] for k in range(len(data)))]
    assert pairs == [[(0, 2), (1, 2)], [(0, 2), (1, 2)], [(0, 1)]]
    found = (data.pairs, data.responses, data.sizes, data.unpaired, data.equal_rewards, data.equal_responses)
    assert found == (5, 8, (2, 3), 2, 2, 1)
    assert data.reversed_pairs == 2
    without = PairedDataset([{key: row[key] for key in ("prompt", "completions")} for row in rows], make_tokenizer())
    assert (without.pairs, without.equal_responses, without.unpaired) == (3 + 2 + 1 + 1, 1, 1)


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": ["joy"]}, {"prompt": "b", "completions": ["rain", "rain"]}]
    expected = (
        r"train_dataset: expected a prompt with two different responses, one of them better, got none of 2 "
        r"\(pairs with equal rewards 0, with equal responses 1\)"
    )
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, rows=rows)
    with pytest.raises(ValueError, match=r"rewards\[1\]: expected a finite number"):
        trainer(tmp_path, rows=[{"prompt": "a", "completions": ["joy", "rain"], "rewards": [1.0, math.nan]}])


def test_longer_wins_by_hand() -> None:
    rows = [
        {"prompt": "a", "completions": ["joy joy joy", "joy"]},
        {"prompt": "b", "completions": ["joy", "rain rain rain", "joy"]},
    ]
    data = PairedDataset(rows, make_tokenizer())
    # b: longer loses, equal texts are no pair, longer wins.
    assert data.longer_wins() == ([1.0, 1.0], [1, 2])
    assert PairedDataset([{"prompt": "a", "completions": ["a", "b"]}], make_tokenizer()).longer_wins() == ([0.5], [1])


def test_each_response_runs_once(tmp_path: Path) -> None:
    rows = [{"prompt": "say", "completions": ["joy", "rain", "mat", "dog"]}]
    ours = trainer(tmp_path, rows=rows, max_steps=1)
    widths: list[tuple[int, ...]] = []
    ours.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    ours.train()
    assert [rows for rows, _ in widths] == [4]
    assert ours.train_dataset.pairs == 6


@pytest.mark.parametrize("make", [llama, lambda: llama(pad_token_id=1), lambda: llama(pad_token_id=2), gpt2, bert])
@pytest.mark.parametrize("padding", ["<pad>", None])
def test_trained_rewards_are_the_scored_ones(tmp_path: Path, make: Any, padding: str | None) -> None:
    """In a padded batch, in a batch of one, by the trainer, by `RewardModel` and by the model itself."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = padding
    ours = trainer(tmp_path, make(), tokenizer=tokenizer)
    ours.train()
    data = ours.eval_dataset
    assert ours.model.config.pad_token_id == ours._pad
    ours.model.eval()
    batch = ours.data_collator([data[k] for k in range(len(data))])
    with torch.no_grad():
        _, found = ours.compute_loss(ours.model, batch, return_outputs=True)
    rows = [row for k in range(len(data)) for row in data[k].rows]
    assert len({len(row) for row in rows}) > 3
    single = torch.tensor([alone(ours.model, row) for row in rows])
    torch.testing.assert_close(found["rewards"], single, rtol=1e-5, atol=1e-5)
    assert float(single.std()) > 1e-3
    scored = RewardModel(ours.model, tokenizer).score_tokens(rows)
    assert torch.equal(scored, found["rewards"])


def test_evaluation_by_hand(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    metrics = ours.evaluate()
    data = ours.eval_dataset
    losses, right, leads = [], [], []
    for k in range(len(data)):
        rewards = [alone(ours.model, row) for row in data[k].rows]
        lead = [rewards[i] - rewards[j] for i, j in zip(data[k].better, data[k].worse, strict=True)]
        losses.append(-sum(map(log_sigmoid, lead)) / len(lead))
        right.append([float(value > 0) for value in lead])
        leads += lead
    assert len(leads) > len(data) == 7
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(sum(map(sum, right)) / len(leads), rel=1e-6)
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(leads) / len(leads), rel=1e-4)
    found = ours.predict(data)
    assert prompt_results(found.predictions) == ([sum(part) for part in right], [len(part) for part in right])


def gradients(ours: RewardTrainer, micro_batches: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    ours.model.zero_grad()
    samples = iter([ours.data_collator([ours.train_dataset[k] for k in batch]) for batch in micro_batches])
    batches, items = ours.get_batch_samples(samples, len(micro_batches), torch.device("cpu"))
    ours.current_gradient_accumulation_steps = len(batches)
    ours.accelerator.gradient_state._set_sync_gradients(True)
    loss = sum(float(ours.training_step(ours.model, batch, items)) for batch in batches)
    return loss, {
        name: weight.grad.clone() for name, weight in ours.model.named_parameters() if weight.grad is not None
    }


def test_a_step_does_not_depend_on_how_it_is_split(tmp_path: Path) -> None:
    ours = trainer(tmp_path, llama())
    whole, expected = gradients(ours, [[0, 1, 2, 3, 4]])
    rewards = [[alone(ours.model.eval(), row) for row in ours.train_dataset[k].rows] for k in range(5)]
    by_hand = [
        -sum(log_sigmoid(own[i] - own[j]) for i, j in itertools.combinations(range(len(own)), 2))
        / math.comb(len(own), 2)
        for own in rewards
    ]
    assert whole == pytest.approx(sum(by_hand) / 5, rel=1e-5)
    split, found = gradients(ours, [[0, 1, 2], [3], [4]])
    assert split == pytest.approx(whole, rel=1e-6)
    norm = sum(float(grad.norm()) ** 2 for grad in expected.values()) ** 0.5
    for name, grad in found.items():
        assert float((grad - expected[name]).norm()) < 1e-6 * norm, name


def test_like_lengths_share_a_batch(tmp_path: Path) -> None:
    rows = keyword_rows(40)
    rows += [{**row, "prompt": row["prompt"] + " the cat sat on a mat" * 3} for row in rows]
    padded = {
        strategy: sum(
            batch["input_ids"].numel()
            for batch in trainer(
                tmp_path, rows=rows, train_sampling_strategy=strategy, per_device_train_batch_size=4
            ).get_train_dataloader()
        )
        for strategy in ("random", "group_by_length")
    }
    assert padded["group_by_length"] < 0.95 * padded["random"]


def test_like_lengths_change_no_order_of_an_evaluation(tmp_path: Path) -> None:
    """Nor is anything asked for a length that pairs do not have: evaluated, and predicted, as with random batches."""
    rows = keyword_rows(12)
    rows = [{**row, "prompt": row["prompt"] + " the cat sat" * (k % 3)} for k, row in enumerate(rows)]
    found = []
    for strategy in ("random", "group_by_length"):
        ours = trainer(tmp_path, rows=rows, train_sampling_strategy=strategy, per_device_eval_batch_size=3)
        found.append((ours.evaluate()["eval_loss"], ours.predict(ours.train_dataset).predictions))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_what_scoring_needs_is_settled() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: expected one with an EOS or SEP token, .*, got neither"):
        prepare(bert(), tokenizer)
    tokenizer.sep_token = "</s>"
    model = llama()
    assert prepare(model, tokenizer, 50) == 1  # no PAD anywhere
    assert (tokenizer.eos_token, tokenizer.model_max_length, model.config.pad_token_id) == ("</s>", 50, 1)
    tokenizer = make_tokenizer()
    assert prepare(llama(), tokenizer) == tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == 96  # the model's positions
    assert prepare(llama(pad_token_id=1), tokenizer) == tokenizer.pad_token_id == 1
    model = llama(pad_token_id=7)  # a token of texts
    assert prepare(model, make_tokenizer()) == model.config.pad_token_id == 2
    assert PairCollator(7, 16)([PairedDataset(keyword_rows(1), tokenizer)[0]])["input_ids"].shape[1] % 16 == 0


def test_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat sat on a mat " * 8, "completions": ["joy", "rain"]}, *keyword_rows(3)]
    ours = trainer(tmp_path, rows=rows, max_length=30)
    assert (ours.train_dataset.cut_prompts, ours.train_dataset.cut_completions) == (1, 0)
    assert max(len(row) for row in ours.train_dataset[0].rows) == 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BartForSequenceClassification(
                BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, num_labels=1)
            ),
            "an encoder-decoder model",
        ),
        (lambda: llama(num_labels=2), r"expected a sequence classifier with one label .*, got Llama.* with 2"),
        (lambda: make_model(300), r"one label .*, got LlamaForCausalLM with 2"),
        (lambda: llama(vocab_size=20), "tokenizer: expected at most the model's 20 tokens"),
        (
            lambda: XLNetForSequenceClassification(
                XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48, num_labels=1)
            ),
            "model: expected one that leaves padding out, got XLNetForSequenceClassification, which reads it as text",
        ),
    ],
    ids=["encoder-decoder", "labels", "causal", "vocabulary", "padding"],
)
def test_models_that_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, make())


def test_the_best_model_goes_by_what_is_logged(tmp_path: Path) -> None:
    """Of one set of held-out pairs, and of several by name."""
    rows = {"a": keyword_rows(3, seed=1), "b": keyword_rows(3, seed=2)}

    def of_two(name: str) -> RewardTrainer:
        given = settings(tmp_path, metric_for_best_model=name, eval_strategy="steps", eval_steps=1, max_steps=1)
        tokenizer = make_tokenizer()
        return RewardTrainer(llama(), given, keyword_rows(4), rows, processing_class=tokenizer)

    logged = {name.removeprefix("eval_") for name in trainer(tmp_path).evaluate() if name.startswith("eval_")}
    assert logged == {*METRICS, *SPEEDS, "model_preparation_time"}, "the last of which the first evaluation alone says"
    ours = of_two("b_rewards/margins")
    ours.train()
    (margin,) = (line["eval_b_rewards/margins"] for line in ours.state.log_history if "eval_b_loss" in line)
    assert ours.state.best_metric == margin
    with pytest.raises(ValueError, match=r"metric_for_best_model: expected one of a_loss, .*, b_loss, .*, got 'loss'"):
        of_two("loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 97}, "max_length: expected at most the model's 96 positions, got 97"),
        ({"max_length": 0}, "max_length: expected a positive number, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected none"),
        ({"fsdp": True}, "fsdp: expected none in the training of a reward model"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model: expected one of loss, rewards/accuracies"),
        ({"learning_rate": -1.0}, "learning_rate: expected a finite number"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    broken = trainer(tmp_path)
    with torch.no_grad():
        broken.model.score.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model: expected finite rewards, got others for 7 of 7 held-out prompts"):
        broken.evaluate()
    with pytest.raises(ValueError, match=r"learning_rate: .* stays finite, got 5e-05 \(the loss is nan at step 1\)"):
        broken.train()


def test_what_is_handed_over_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_collator: expected None"):
        RewardTrainer(llama(), settings(tmp_path), processing_class=make_tokenizer(), data_collator=len)
    with pytest.raises(ValueError, match="processing_class: expected the model's tokenizer"):
        RewardTrainer(llama(), settings(tmp_path))


def test_rows_are_the_prompt_and_a_response() -> None:
    feature: Any = {"prompt_ids": [0, 5], "completion_ids": [[6, 1], [7, 8, 1]]}
    assert token_rows(feature) == [[0, 5, 6, 1], [0, 5, 7, 8, 1]]
