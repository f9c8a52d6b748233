"""An objective of your own: a function of whole prompts, trained through `attach` without the logits.

    python examples/own_objective.py --steps 20
    python examples/own_objective.py --model FOLDER --data ranked.jsonl --learning-rate 1e-5

Here the best answer competes with each worse one, weighed by how far their rewards are apart, and keeps its likelihood.
"""

import argparse
import itertools
from importlib.resources import files

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import clha_fast
from clha_fast.data import read_records
from clha_fast.hf import RankedCollator, RankedDataset
from clha_fast.models.loading import build_model, build_tokenizer, texts_of

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def reward_weighted(group):
    """Sum over pairs of (r_i - r_j) * -log sigmoid(s_i - s_j), and the NLL of the best answer, mean over prompts.

    `group.scores` are nats a token; `group.i` and `group.j` the better and the worse candidate of every pair. What is
    divided by comes from `group.totals`, never from a mean of the group: a batch is taken in parts of whole prompts.
    """
    gap = (group.rewards[group.i] - group.rewards[group.j]).clamp(min=0)
    lead = group.scores[group.i] - group.scores[group.j]
    rank = (gap * torch.nn.functional.softplus(-lead)).sum()
    best = -group.of_targets(group.scores).sum()
    return (rank + best) / group.totals.prompts


def main(steps: int, model_path: str | None, data: str | None, learning_rate: float) -> None:
    path = data or str(files("clha_fast.demo") / "ranked_demo.jsonl")
    records = read_records(path)[:32]
    if model_path:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    else:
        tokenizer = build_tokenizer(texts_of(records), vocab_size=1024)
        model = build_model({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, tokenizer, seed=0)

    collator = RankedCollator(tokenizer, reward_weighted)  # the same one: it decides which candidates need not run
    generator = torch.Generator().manual_seed(0)
    dataset = RankedDataset(records, collator)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collator, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    clha_fast.attach(model, reward_weighted)
    model.train()
    for step, batch in enumerate(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)):
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {output.loss.item():.3f} tau {output.metrics.as_dict()['kendall_tau']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", help="folder or name of a causal language model; a tiny one with random weights")
    parser.add_argument("--data", help="ranked responses, of which the first 32 records train; the bundled ones")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    given = parser.parse_args()
    main(given.steps, given.model, given.data, given.learning_rate)
