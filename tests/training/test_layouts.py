"""Trainer runs with packed and shared rows: the curve of padded ones, budgets, references, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clha_fast.batching.collator import RankedCollator
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.training.layout import _check_parallel
from clha_fast.training.trainer import CLHATrainer
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.tiny import WORDS, make_model, make_rows
from tests.support.trainers import TOKENIZER, config, trainer


def curve(made: CLHATrainer) -> list[dict[str, float]]:
    made.train()
    # Implicit rewards are 0 at the first step, but for rounding, whose sign their accuracy would be.
    skip = ("runtime", "per_second", "train_loss", "total_flos", "implicit_rewards/accuracies")
    lines = [
        {name: value for name, value in line.items() if not any(word in name for word in skip)}
        for line in made.state.log_history
    ]
    return [line for line in lines if len(line) > 3]


def like(lines: list[dict[str, float]]) -> list[Any]:
    return [pytest.approx(line, rel=1e-4, abs=1e-5, nan_ok=True) for line in lines]


SETTINGS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}


@pytest.mark.parametrize("changes", [{"objective": "dpo"}, {"objective": "pro", "normalizer": "global"}])
def test_curves_are_those_of_padded_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = curve(trainer(tmp_path / "padded", **SETTINGS, **changes))
    assert len(expected) >= 6
    for layout in ("packed", "shared"):
        made = trainer(tmp_path / layout, layout=layout, **SETTINGS, **changes)
        assert made.layout == layout
        assert made.data_collator.layout == made.eval_collator.layout == layout
        assert curve(made) == like(expected)
        assert made.largest_batch is not None
        assert made.largest_batch.input_ids.shape[0] == 1


def test_lora_with_itself_as_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def run(layout: str) -> list[dict[str, float]]:
        made = CLHATrainer(
            make_model(len(TOKENIZER)),
            config(tmp_path / layout, layout=layout, objective="dpo", reference="adapter", **SETTINGS),
            train_dataset=make_rows(8),
            eval_dataset=make_rows(4, seed=3),
            processing_class=TOKENIZER,
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        return curve(made)

    assert run("shared") == like(run("padded"))


def test_gradient_checkpointing(tmp_path: Path) -> None:
    expected = curve(trainer(tmp_path / "padded", **SETTINGS))
    made = trainer(tmp_path / "shared", layout="shared", gradient_checkpointing=True, **SETTINGS)
    assert curve(made) == like(expected)


def test_mixed_precision(tmp_path: Path) -> None:
    """accelerate's autocast around the model is rounding for the comparison of the first batch."""
    made = trainer(tmp_path, layout="shared", bf16=True, **SETTINGS)
    lines = curve(made)
    assert lines[0] == pytest.approx(
        curve(trainer(tmp_path / "padded", bf16=True, **SETTINGS))[0], rel=0.05, abs=0.05, nan_ok=True
    )


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_budget_counts_the_tokens_that_run(tmp_path: Path, layout: str) -> None:
    made = trainer(tmp_path, rows=make_rows(20), layout=layout, max_tokens_per_batch=250, normalizer="global")
    batches = list(made.get_train_dataloader())
    whole = sum(batch["candidates_per_prompt"].numel() for batch in batches)
    assert whole == 20
    sizes = [batch["input_ids"].numel() for batch in batches]
    alone = [batch["candidates_per_prompt"].numel() == 1 for batch in batches]
    assert all(size <= 250 or single for size, single in zip(sizes, alone, strict=True))
    padded = len(list(trainer(tmp_path, rows=make_rows(20), max_tokens_per_batch=250).get_train_dataloader()))
    assert len(batches) < padded


def test_auto_says_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        found = [text for text in caplog.messages if text.startswith("layout auto")]
        caplog.clear()
        return found

    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert trainer(tmp_path, layout="auto").layout == "shared"
        (text,) = said()
        assert text.startswith("layout auto: shared, each prompt is computed once (shared rows run ")
        # Prompts of a few tokens before long answers.
        rows = [{"prompt": "a", "completions": [" ".join(WORDS), " ".join(WORDS[::-1])]} for _ in range(4)]
        assert trainer(tmp_path, rows=rows, layout="auto").layout == "padded"
        (text,) = said()
        assert text.startswith("layout auto: padded (shared rows run ")
        assert text.endswith("%, and pay up to 90%)")
        # One answer a prompt: there is nothing to share.
        rows = [{"prompt": " ".join(WORDS), "completions": ["a cat"]} for _ in range(4)]
        assert trainer(tmp_path, rows=rows, layout="auto", objective="sft").layout == "padded"
        assert "100%" in said()[0]
        bloom = shrink("bloom", False)
        bloom.vocab_size = len(TOKENIZER)
        made = trainer(tmp_path, build(bloom), layout="auto")
        assert made.layout == made.data_collator.layout == "padded"
        (text,) = said()
        assert "BloomAttention" in text
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


def test_a_collator_of_ones_own(tmp_path: Path) -> None:
    def made(layout: str, own: str) -> CLHATrainer:
        return CLHATrainer(
            make_model(len(TOKENIZER)),
            config(tmp_path, layout=layout),
            train_dataset=make_rows(6),
            data_collator=RankedCollator(TOKENIZER, layout=own),
        )

    assert made("padded", "shared").layout == "shared"
    assert made("shared", "padded").data_collator.layout == "shared"
    with pytest.raises(ValueError, match="layout: expected 'shared', as the data_collator has it, got 'packed'"):
        made("packed", "shared")


def test_refusals_come_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, auto, got 'tree'"):
        config(tmp_path, layout="tree")
    bloom = shrink("bloom", False)
    bloom.vocab_size = len(TOKENIZER)
    with pytest.raises(UnsupportedLayoutError, match="BloomAttention"):
        trainer(tmp_path, build(bloom), layout="shared")


def test_the_frozen_model_is_probed_too(tmp_path: Path) -> None:
    bloom = shrink("bloom", False)
    bloom.vocab_size = len(TOKENIZER)
    with pytest.raises(UnsupportedLayoutError, match="BloomForCausalLM"):
        CLHATrainer(
            make_model(len(TOKENIZER)),
            config(tmp_path, layout="shared", objective="dpo"),
            train_dataset=make_rows(4),
            processing_class=TOKENIZER,
            ref_model=build(bloom),
        )


def test_sequences_spread_over_processes_are_refused() -> None:
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))
    with pytest.raises(UnsupportedLayoutError, match="parallelism_config: expected cp_size=1"):
        _check_parallel(accelerator)
    _check_parallel(SimpleNamespace(parallelism_config=None))


def test_rows_may_be_longer_than_a_table_of_positions_but_texts_may_not(tmp_path: Path) -> None:
    tables = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, n_head=2, n_positions=72, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    made = trainer(tmp_path, GPT2LMHeadModel(tables), layout="shared", per_device_train_batch_size=4)
    made.train()
    assert made.largest_batch is not None
    assert made.largest_batch.input_ids.shape[1] > 72
    rows = [{"prompt": " ".join(WORDS * 4), "completions": ["a", "b"]} for _ in range(4)]
    with pytest.raises(ValueError, match="max_length: expected rows of at most the 72 positions of GPT2LMHeadModel"):
        trainer(tmp_path, GPT2LMHeadModel(tables), rows=rows, layout="shared")
