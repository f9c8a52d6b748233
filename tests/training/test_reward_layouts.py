"""Reward models trained on packed and shared rows: the curve of padded ones, adapters, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.run import Row
from clha_fast.training.reward_trainer import RewardTrainer
from tests.support.preferences import keyword_rows
from tests.support.reward_models import bert, gpt2, llama
from tests.support.tiny import make_tokenizer
from tests.training.test_reward_trainer import settings, trainer

SETTINGS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "learning_rate": 1e-3}


def curve(made: RewardTrainer) -> list[Any]:
    made.train()
    skip = ("runtime", "per_second", "train_loss", "total_flos")
    return [
        pytest.approx({k: v for k, v in line.items() if not any(word in k for word in skip)}, rel=1e-4, abs=1e-5)
        for line in made.state.log_history
    ]


def lines(made: RewardTrainer) -> list[dict[str, float]]:
    return [found.expected for found in curve(made)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}],
)
def test_curves_are_those_of_padded_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = curve(trainer(tmp_path / "padded", llama(), **SETTINGS, **changes))
    assert len(expected) >= 6
    for layout in ("packed", "shared"):
        made = trainer(tmp_path / layout, llama(), layout=layout, **SETTINGS, **changes)
        shapes: list[int] = []
        made.model.register_forward_pre_hook(
            lambda _, args, kwargs, shapes=shapes: shapes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        assert made.layout == made.data_collator.layout == layout
        assert lines(made) == expected
        assert set(shapes) == {1}


def test_padding_is_eos(tmp_path: Path) -> None:
    """A response is then read at the token before the one that closes it."""
    tokenizers = [make_tokenizer() for _ in range(2)]
    for tokenizer in tokenizers:
        tokenizer.pad_token = None
    expected = curve(trainer(tmp_path / "padded", gpt2(), tokenizer=tokenizers[0], **SETTINGS))
    made = trainer(tmp_path / "shared", gpt2(), tokenizer=tokenizers[1], layout="shared", **SETTINGS)
    assert made._pad == tokenizers[1].eos_token_id
    # GPT-2 drops out: the responses of a prompt share one draw on it in shared rows.
    assert len(lines(made)) == len(expected)
    made.model.eval()
    prompt = made.eval_dataset[0]
    scored = RewardModel(made.model, tokenizers[1]).score_tokens(prompt.rows)
    shared = RewardModel(made.model, tokenizers[1], layout="shared")
    torch.testing.assert_close(shared.score_rows([Row(*text) for text in prompt.texts]), scored, rtol=1e-5, atol=1e-5)
    batch = made.data_collator([prompt])
    with torch.no_grad():
        _, found = made.compute_loss(made.model, batch, return_outputs=True)
    torch.testing.assert_close(found["rewards"], scored, rtol=1e-5, atol=1e-5)


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def run(layout: str) -> RewardTrainer:
        return RewardTrainer(
            llama(),
            settings(tmp_path / layout, layout=layout, **SETTINGS),
            train_dataset=keyword_rows(6),
            eval_dataset=keyword_rows(4, seed=1),
            processing_class=make_tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
        )

    expected = curve(run("padded"))
    assert lines(run("shared")) == expected


def test_mixed_precision(tmp_path: Path) -> None:
    made = trainer(tmp_path, llama(), layout="shared", bf16=True, **SETTINGS)
    made.train()
    assert made.state.global_step == 4


def test_auto(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [{**row, "prompt": row["prompt"] + " the cat sat on a mat" * 4} for row in keyword_rows(6)]
    assert trainer(tmp_path / "a", llama(), rows=long, layout="auto").layout == "shared"
    # A longest row of each prompt, n of them, against the prompt and all of n.
    data = trainer(tmp_path / "b", llama(), rows=long[:1]).train_dataset
    (prompt,) = [data[0]]
    shared = len(prompt.texts[0][0]) + sum(prompt.response_lengths)
    assert data.count_tokens(9) == (len(prompt.rows) * max(map(len, prompt.rows)), shared)
    single = [{"prompt": "a", "completions": ["joy " * 30, "rain " * 30]}]
    assert trainer(tmp_path / "c", llama(), rows=single, layout="auto").layout == "padded"
    assert trainer(tmp_path / "d", bert(), rows=long, layout="auto").layout == "padded"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayoutError, match="got BertForSequenceClassification with scores of shape"):
        trainer(tmp_path, bert(), layout="shared")
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, auto, got 'tree'"):
        settings(tmp_path, layout="tree")
    with pytest.raises(ValueError, match=r"layout: expected padded with torch_compile .*, got 'shared'"):
        settings(tmp_path, layout="shared", torch_compile=True)
