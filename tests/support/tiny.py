"""A tokenizer, a model and ranked records small enough for a test, and real."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clha_fast.batching.collator import RankedCollator
from clha_fast.data.records import RankedRecord

TEXT = "the cat sat on a mat and then a dog ran over it with some joy while rain fell on old green hills"
WORDS = TEXT.split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(vocab_size: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def make_rows(count: int, seed: int = 0, rewards: bool = True) -> list[dict[str, Any]]:
    """Rows in the canonical format, 2 to 5 candidates; some pairs closer than 3, some targets below 0."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        size = rng.randint(2, 5)
        text = [" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(size)]
        row: dict[str, Any] = {"prompt": f"say {number}: " + " ".join(rng.choices(WORDS, k=3)), "completions": text}
        if rewards:
            row["rewards"] = sorted((round(rng.uniform(-6, 5), 2) for _ in range(size)), reverse=True)
        rows.append(row)
    return rows


def own_scores(model: nn.Module, tokenizer: Any, prompt: Any, answers: list[str]) -> list[float]:
    """s_i by way of the model's own logits, a sequence at a time."""
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(prompt, tuple(answers)))
    found = []
    for ids in feature["completion_ids"]:
        row = torch.tensor([[*feature["prompt_ids"], *ids]])
        with torch.no_grad():
            logits = model(input_ids=row).logits[0, -len(ids) - 1 : -1]
        chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(list(ids))[:, None])
        found.append(float(chosen.mean()))
    return found
