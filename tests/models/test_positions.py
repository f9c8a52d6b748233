"""Rows beyond a model's positions in a loop of one's own: an attached model says what the trainer says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import clha_fast
from clha_fast import CLHAOptions
from clha_fast.batching.collator import RankedCollator
from tests.support.tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
OPTIONS = CLHAOptions(margin=0.5)


def learned(positions: int) -> nn.Module:
    """GPT-2, whose positions are a table."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": len(TOKENIZER)}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=positions, **tokens))


def batch(tokens: int, **settings: Any) -> dict[str, Any]:
    """Rows of at most `tokens` tokens, BOS and EOS among them."""
    collator = RankedCollator(TOKENIZER, OPTIONS, drop_inert=False, **settings)
    return collator([{"prompt": "a", "completions": ["b", "c" * (tokens - 3)]}])


def test_a_table_ends() -> None:
    with clha_fast.attach(model := learned(24), OPTIONS):
        assert model(**batch(24)).loss.isfinite()
        said = (
            r"^max_length: .* the 24 positions of GPT2LMHeadModel, got up to 25 tokens \(a batch\); max_length=24 cuts"
        )
        with pytest.raises(ValueError, match=said):
            model(**batch(25))
        assert model(**batch(90, max_length=24)).loss.isfinite()
        with pytest.raises(ValueError, match="got up to 32 tokens"):
            model(**batch(20, pad_to_multiple_of=16))
        other = copy.deepcopy(model)
        with pytest.raises(ValueError, match="got up to 25 tokens"):
            other(**batch(25))


@pytest.mark.parametrize(
    ("positions", "tokens", "settings", "said"),
    [
        (64, 64, {}, 0),
        (64, 65, {}, 1),
        (64, 90, {"max_length": 64}, 0),
        # Padding is no text: what a collator may have added is let pass.
        (60, 60, {"pad_to_multiple_of": 8}, 0),
        (60, 65, {}, 1),
    ],
)
def test_computed_positions_go_on_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, positions: int, tokens: int, settings: dict[str, Any], said: int
) -> None:
    model = make_model(len(TOKENIZER), max_position_embeddings=positions)
    with clha_fast.attach(model, OPTIONS), caplog.at_level("WARNING"):
        for _ in range(2):
            assert model(**batch(tokens, **settings)).loss.isfinite()
    assert caplog.text.count(f"max_length: expected rows of at most the {positions} positions of LlamaForCaus") == said
