"""Reward models small enough for a test, and real; what a model itself says about one sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_labels": 1,
}


def spread(model: Any) -> Any:
    """Random weights large enough that neighbouring positions have different scores."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model.eval()


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_key_value_heads": 2, "pad_token_id": None, **SIZES, **changes}
    return spread(LlamaForSequenceClassification(LlamaConfig(**settings)))


def gpt2() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(TOKENIZER),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        num_labels=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return spread(GPT2ForSequenceClassification(config))


def bert() -> Any:
    torch.manual_seed(2)
    return spread(BertForSequenceClassification(BertConfig(**SIZES, pad_token_id=2)))


def by_length(positions: int = 96, slope: float = 1.0) -> Any:
    """A reward that grows by about `slope` a token of prompt and response, 0 in the middle of the positions.

    The last hidden state is the unit vector of the last token's position; layers add nothing.
    """
    config = GPT2Config(
        vocab_size=len(TOKENIZER),
        n_embd=positions,
        n_layer=1,
        n_head=1,
        n_positions=positions,
        num_labels=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(positions))
        place = torch.arange(positions, dtype=torch.float32)
        model.score.weight[0] = slope * (place - place.mean()) / positions**0.5
    return model.eval()


def save_llama(path: Path) -> str:
    """A reward model as people have them: saved, without a padding token."""
    llama().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alone(model: Any, ids: list[int]) -> float:
    """What the model itself says about one sequence, without padding or mask."""
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def plain_ids(prompt: str, completion: str) -> list[int]:
    own = TOKENIZER(completion, add_special_tokens=False)["input_ids"]
    return [*TOKENIZER(prompt)["input_ids"], *own, TOKENIZER.eos_token_id]
