"""CLHATrainer on a tiny Llama: losses, gradients, evaluation and logs against the eager reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clha_fast import CLHAOptions
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedDataset
from clha_fast.models.heads import UnsupportedHeadError
from clha_fast.training.config import CLHAConfig
from clha_fast.training.reward_trainer import RewardConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import (
    EVAL_SEED,
    TOKENIZER,
    assert_same_gradients,
    collate,
    config,
    eager_gradients,
    eager_loss,
    step_gradients,
    trainer,
)


def test_a_tokenizer_with_more_tokens_than_the_head(tmp_path: Path) -> None:
    rows = len(TOKENIZER) - 1
    with pytest.raises(ValueError, match=f"^processing_class: .* at most the {rows} tokens .* got {rows + 1};"):
        trainer(tmp_path, make_model(rows))


@pytest.mark.parametrize("model", [[1.5], None])
def test_a_model_that_is_none(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a causal language model .*, got (\[1.5\]|None)$"):
        CLHATrainer(model, config(tmp_path), train_dataset=make_rows(2), processing_class=TOKENIZER)


@pytest.mark.parametrize("path", ["rows.jsonl", Path("rows.jsonl")])
def test_a_path_is_no_dataset(tmp_path: Path, path: Any) -> None:
    with pytest.raises(ValueError, match=r"^train_dataset: expected rows, .* got the path 'rows.jsonl'$"):
        trainer(tmp_path, rows=path)


@pytest.mark.parametrize(
    "changes", [{}, {"preset": "paper", "temperature": 1.7}, {"reduction": "pair_mean", "sft": "mean"}]
)
def test_loss_and_gradients_are_the_eager_ones(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = make_rows(4, seed=2)
    ours = trainer(tmp_path, **changes)
    model = ours.model.train()
    # Inert candidates are among them: dropping them must change nothing.
    whole = collate(rows, ours.loss_options, drop_inert=False)
    expected, metrics = eager_loss(model, whole, ours.loss_options, ours.head_options)
    expected_grads = eager_gradients(model, expected)

    batch = ours.data_collator(rows)
    assert batch["num_inert"] > 0
    loss, outputs = ours.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(model, expected_grads)
    assert outputs["metrics"].as_dict()["rewards/margins"] == pytest.approx(float(metrics[5] / metrics[2]), abs=1e-5)


def test_training_lowers_the_loss_and_logs_usual_names(tmp_path: Path) -> None:
    rows = make_rows(12)
    ours = trainer(tmp_path, rows=rows, margin=0.3, max_steps=30, learning_rate=1e-2, logging_steps=10)
    before = ours.evaluate(rows)
    ours.train()
    lines = [line for line in ours.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [10, 20, 30]
    names = "rank_loss sft_loss rewards/accuracies rewards/margins logps/chosen logps/rejected kept_pair_share"
    for name in (*names.split(), "kendall_tau", "num_tokens", "inert_candidates", "learning_rate", "grad_norm"):
        assert all(math.isfinite(line[name]) for line in lines), name
    for line in lines:
        assert line["loss"] == pytest.approx(line["rank_loss"] + line["sft_loss"], rel=1e-4)
    after = ours.evaluate(rows)
    assert after["eval_rank_loss"] < 0.6 * before["eval_rank_loss"]
    assert after["eval_sft_loss"] < 0.8 * before["eval_sft_loss"]
    assert after["eval_rewards/accuracies"] > 0.9 > before["eval_rewards/accuracies"]
    assert ours.largest_batch is not None
    assert ours.largest_batch.targets.numel() > 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_pools_over_batches(tmp_path: Path, batch_size: int) -> None:
    ours = trainer(tmp_path, per_device_eval_batch_size=batch_size)
    got = ours.evaluate()
    ours.model.eval()
    rows = make_rows(8, seed=EVAL_SEED)
    assert collate(rows, ours.loss_options).num_inert > 0, "training's collator would drop some of these"
    whole = collate(rows, ours.loss_options, drop_inert=False)
    with torch.no_grad():
        _, sums = eager_loss(ours.model, whole, ours.loss_options)
    kept, ordered = float(sums[2]), float(sums[9])
    assert got["eval_rewards/accuracies"] == pytest.approx(float(sums[4]) / kept)
    assert got["eval_rewards/margins"] == pytest.approx(float(sums[5]) / kept, rel=1e-4, abs=1e-6)
    assert got["eval_kendall_tau"] == pytest.approx(float(sums[10] - sums[11]) / ordered)
    assert got["eval_num_tokens"] == whole.targets.numel()
    assert got["eval_inert_candidates"] == 0
    assert got["eval_loss"] == pytest.approx(got["eval_rank_loss"] + got["eval_sft_loss"])
    assert got["eval_rank_loss"] == pytest.approx(float(sums[0]), rel=1e-5)
    assert got["eval_sft_loss"] == pytest.approx(float(sums[1]), rel=1e-5)
    assert got["eval_open_gate_share"] == float(sums[12]) / 8


def test_several_evaluation_sets_and_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(tmp_path)
    seen: list[int] = []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(self.out_features) or plain(self, x))
    metrics = ours.evaluate({"one": make_rows(3), "two": RankedDataset(make_rows(2), ours.eval_collator)})
    assert {"eval_one_loss", "eval_two_kendall_tau"} <= metrics.keys()
    assert ours.predict(RankedDataset(make_rows(2), ours.eval_collator)).predictions is None
    assert seen
    assert len(TOKENIZER) not in seen


@pytest.mark.parametrize("preset", ["published", "paper"])
def test_accumulation_is_a_mean_of_micro_batches(tmp_path: Path, preset: str) -> None:
    rows = make_rows(6, seed=3)
    ours = trainer(tmp_path, preset=preset, gradient_accumulation_steps=2)
    parts = [rows[:2], rows[2:]]
    losses = [eager_loss(ours.model.train(), collate(part, ours.loss_options), ours.loss_options)[0] for part in parts]
    expected = (losses[0] + losses[1]) / 2
    expected_grads = eager_gradients(ours.model, expected)
    assert step_gradients(ours, parts) == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours.model, expected_grads)


def test_a_second_call_logs_its_own_steps(tmp_path: Path) -> None:
    """The third step of the first call is in no line; the first line of the second is of two steps all the same."""
    ours = trainer(tmp_path, rows=make_rows(12), max_steps=3, logging_steps=2)
    tokens = []
    for _ in range(2):
        ours.train()
        (line,) = [line for line in ours.state.log_history if "loss" in line]
        assert line["rank_loss"] + line["sft_loss"] == pytest.approx(line["loss"], rel=1e-5)
        tokens.append(line["num_tokens"])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("normalizer", ["batch", "global"])
@pytest.mark.parametrize("count", [5, 7])
def test_terms_add_up_to_the_loss_where_steps_differ(tmp_path: Path, normalizer: str, count: int) -> None:
    """Steps of three micro-batches and, at an epoch's end, of fewer in one line of the log."""
    ours = trainer(
        tmp_path,
        rows=make_rows(count),
        max_steps=4,
        logging_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        normalizer=normalizer,
    )
    ours.train()
    (line,) = [line for line in ours.state.log_history if "loss" in line]
    assert line["rank_loss"] + line["sft_loss"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"preset": "paper"}, {"reduction": "pair_mean", "noise_rule": "signed"}])
def test_global_normalizer_does_not_depend_on_the_split(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = make_rows(6, seed=3)
    ours = trainer(tmp_path, normalizer="global", gradient_accumulation_steps=3, **changes)
    expected, _ = eager_loss(ours.model.train(), collate(rows, ours.loss_options), ours.loss_options)
    expected_grads = eager_gradients(ours.model, expected)
    loss = step_gradients(ours, [rows[:1], rows[1:4], rows[4:]])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(ours.model, expected_grads)


def test_batch_in_which_nothing_counts(tmp_path: Path) -> None:
    rows = [{"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [-1.0, -2.0]}] * 4
    rows.append({"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [5.0, -2.0]})  # in the third step
    order = {"train_sampling_strategy": "sequential"}
    ours = trainer(tmp_path, rows=rows, max_steps=2, logging_steps=1, weight_decay=0.0, **order)
    start = {name: parameter.clone() for name, parameter in ours.model.named_parameters()}
    ours.train()
    line = next(line for line in ours.state.log_history if "loss" in line)
    assert line["loss"] == 0
    assert line["inert_candidates"] == 4
    assert math.isnan(line["rewards/accuracies"])
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, start[name]), name


def test_nan_is_not_hidden(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    ours = trainer(tmp_path, model, max_steps=1, logging_steps=1)
    ours.train()
    assert math.isnan(next(line["loss"] for line in ours.state.log_history if "loss" in line))


def experts() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
    )


def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path: Path) -> None:
    model = experts()
    ours = trainer(tmp_path, model)
    batch = ours.data_collator(make_rows(2))
    loss = ours.compute_loss(model.train(), batch)
    parts = CandidateBatch.from_dict(batch)
    expected, _ = eager_loss(model, parts, ours.loss_options)
    auxiliary = model(**parts.model_inputs(), use_cache=False).aux_loss
    assert auxiliary.item() > 0
    assert loss.item() == pytest.approx((expected + 0.5 * auxiliary).item(), rel=1e-5)


@pytest.mark.parametrize("normalizer", ["batch", "global"])
def test_the_auxiliary_loss_of_a_step_is_a_mean_of_micro_batches(tmp_path: Path, normalizer: str) -> None:
    model, rows = experts(), make_rows(2, seed=3)
    ours = trainer(tmp_path, model, normalizer=normalizer, gradient_accumulation_steps=3)
    # The same prompts three times: any normaliser gives them the loss of once.
    batch = collate(rows, ours.loss_options)
    expected, _ = eager_loss(model.train(), batch, ours.loss_options)
    expected = expected + 0.5 * model(**batch.model_inputs(), use_cache=False).aux_loss
    expected_grads = eager_gradients(model, expected)
    assert step_gradients(ours, [rows] * 3) == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(model, expected_grads)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    ours = trainer(tmp_path, bf16=True, max_steps=2, logging_steps=1)
    ours.train()
    lines = [line for line in ours.state.log_history if "loss" in line]
    exact = trainer(tmp_path, max_steps=2, logging_steps=1)
    exact.train()
    wanted = [line for line in exact.state.log_history if "loss" in line]
    for line, want in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=0.03)


def test_datasets_table(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = make_rows(6)
    ours = trainer(tmp_path, rows=datasets.Dataset.from_list(rows), remove_unused_columns=True, max_steps=1)
    assert len(ours.train_dataset) == 6
    ours.train()
    mapped = datasets.Dataset.from_list(rows).map(ours.data_collator.tokenize_record)
    again = trainer(tmp_path, rows=mapped, remove_unused_columns=True, max_steps=1)
    again.train()
    assert again.state.log_history[-1]["train_loss"] == ours.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
        ({"preset": "best"}, "preset: expected one of published, paper, sft_only, got 'best'"),
        ({"reduction": "mean"}, "reduction: expected one of sum, distance_mean, pair_mean"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"normalizer": "rank"}, "normalizer: expected one of batch, global"),
        ({"workspace_mb": 0}, "workspace_mb: expected a positive number"),
        ({"max_dropped_mass": 1.0}, "max_dropped_mass: expected a number in"),
        (
            {"max_dropped_mass": 0.01, "log_token_statistics": True},
            "max_dropped_mass: .* and log_token_statistics asks for entropy, is_top1; leave out one",
        ),
        (
            {"max_dropped_mass": 0.01, "objective": {"name": "policy", "entropy_weight": 0.1}},
            "max_dropped_mass: .* and the objective 'policy' asks for entropy; leave out one",
        ),
        ({"margin": -1.0}, "margin: expected a finite number"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.skipif("activation_checkpointing_kwargs" not in CLHAConfig.__dataclass_fields__, reason="an older release")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine of CPUs alone is asked")
@pytest.mark.parametrize("config_class", [CLHAConfig, RewardConfig])
def test_offloaded_checkpoints_need_an_accelerator(tmp_path: Path, config_class: Any) -> None:
    given = {"output_dir": str(tmp_path), "use_cpu": True, "activation_checkpointing": True}
    with pytest.raises(ValueError, match="activation_checkpointing_kwargs: expected no offload without an accelerator"):
        config_class(**given, activation_checkpointing_kwargs={"offload": True})
    assert config_class(**given).activation_checkpointing


def test_preset_and_overrides(tmp_path: Path) -> None:
    assert config(tmp_path).loss_options() == CLHAOptions()
    got = config(tmp_path, preset="paper", margin=1.5, sft_weight=0.0).loss_options()
    assert got == CLHAOptions(reduction="sum", sft="mean", margin=1.5, sft_weight=0.0)


def test_bad_trainer_arguments(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    with pytest.raises(ValueError, match="processing_class: expected a tokenizer"):
        CLHATrainer(model, config(tmp_path))
    with pytest.raises(ValueError, match="compute_metrics: expected None"):
        CLHATrainer(model, config(tmp_path), processing_class=TOKENIZER, compute_metrics=len)
    with pytest.raises(UnsupportedHeadError, match="LlamaModel"):
        CLHATrainer(model.model, config(tmp_path), processing_class=TOKENIZER)
    many = config(tmp_path)
    many._setup_devices  # noqa: B018 - sets the number of devices, once
    many._n_gpu = 2
    with pytest.raises(ValueError, match=r"one GPU a process, got 2 .*torchrun"):
        CLHATrainer(model, many, processing_class=TOKENIZER)
