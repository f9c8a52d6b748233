"""A real model that says what it is told to: by position, whatever came before."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def scripted(tokenizer: Any, script: dict[int, int], positions: int = 64) -> GPT2LMHeadModel:
    """A GPT-2 whose greedy token behind position p is `script[p]`, and EOS where the script has nothing.

    The last hidden state is the position's unit vector (layers add nothing), the head has a column for each.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=positions,
        n_positions=positions,
        n_layer=1,
        n_head=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(positions))
        for position in range(positions):
            model.lm_head.weight[script.get(position, tokenizer.eos_token_id), position] = 1.0
    return model.eval()


def saying(tokenizer: Any, text: str, prompt_tokens: int, positions: int = 64, **tokenise: Any) -> GPT2LMHeadModel:
    """A model that answers a prompt of so many tokens with `text`, then EOS."""
    ids = tokenizer(text, add_special_tokens=False, **tokenise)["input_ids"]
    return scripted(tokenizer, {prompt_tokens - 1 + k: token for k, token in enumerate(ids)}, positions)
