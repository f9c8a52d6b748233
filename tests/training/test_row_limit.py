"""Rows beyond a model's positions: refused where these are a table, said where they are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from clha_fast.models.positions import RowLimit
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import make_model
from tests.support.trainers import TOKENIZER, config

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TABLES = {
    "gpt2": {},
    "gpt_neo": {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "gptj": {"rotary_dim": 4},
    "biogpt": {"intermediate_size": 16},
}


def model_of(kind: str, positions: int) -> nn.Module:
    torch.manual_seed(0)
    tokens = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = {**SMALL, **TABLES[kind], **tokens, "max_position_embeddings": positions}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def rows_of(tokens: int, count: int = 3) -> list[dict[str, Any]]:
    """One of `tokens` tokens with BOS and EOS, the others short."""
    long = {"prompt": "a", "completions": ["b", "c" * (tokens - 3)]}
    return [{"prompt": "a", "completions": ["b", "c"]}] * (count - 1) + [long]


def train(folder: Path, model: nn.Module, rows: Any, **changes: Any) -> None:
    ours = CLHATrainer(model, config(folder, max_steps=2, **changes), train_dataset=rows, processing_class=TOKENIZER)
    ours.train()


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_ends(tmp_path: Path, kind: str) -> None:
    train(tmp_path, model_of(kind, 24), rows_of(24))
    said = r"^max_length: .* the 24 positions of \w+, got up to 25 tokens \(train_dataset, in 1 of 3 prompts, most in "
    with pytest.raises(ValueError, match=rf"{said}record 2\); max_length=24"):
        train(tmp_path, model_of(kind, 24), rows_of(25))
    train(tmp_path, model_of(kind, 24), rows_of(90), max_length=24)
    with pytest.raises(ValueError, match=r"^pad_to_multiple_of: .* got 32 tokens with the padding .* max_length=16$"):
        train(tmp_path, model_of(kind, 24), rows_of(20), pad_to_multiple_of=16)


def test_computed_positions_go_on_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rows, changes, said in (
        (40, {}, 1),
        (30, {}, 0),
        (40, {"max_length": 30}, 0),
        (30, {"pad_to_multiple_of": 8}, 0),
    ):
        caplog.clear()
        with caplog.at_level("WARNING"):
            train(tmp_path, make_model(len(TOKENIZER), max_position_embeddings=30), rows_of(rows), **changes)
        assert caplog.text.count("max_length: expected rows of at most the 30 positions of LlamaForCausalLM") == said


def test_what_is_known_late_is_checked_as_it_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(rows_of(40))

    with pytest.raises(ValueError, match=r"^max_length: .* got up to 40 tokens \(a batch\); max_length=24 cuts them$"):
        train(tmp_path, model_of("gpt2", 24), Stream())
    ours = CLHATrainer(make_model(len(TOKENIZER)), config(tmp_path), processing_class=TOKENIZER)
    with caplog.at_level("WARNING"):
        ours.evaluate(rows_of(150))
        ours.evaluate(rows_of(160))
    assert caplog.text.count("max_length: expected rows of at most the 128 positions") == 1


def test_a_model_that_names_no_limit() -> None:
    assert RowLimit(nn.Linear(2, 2)).limit is None
