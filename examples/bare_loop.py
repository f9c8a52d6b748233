"""A bare PyTorch loop on ranked responses: attach, and the model returns the loss of a batch of candidates.

    python examples/bare_loop.py --steps 20

A tiny model with random weights learns the demonstration records on the CPU; of your own:

    python examples/bare_loop.py --model FOLDER --data ranked.jsonl --learning-rate 1e-5
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
ACCUMULATION = 2


def main(steps: int, model_path: str | None, data: str | None, learning_rate: float) -> None:
    path = data or str(files("clha_fast.demo") / "ranked_demo.jsonl")
    records = read_records(path)[:32]
    if model_path:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    else:
        tokenizer = build_tokenizer(texts_of(records), vocab_size=1024)
        model = build_model({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, tokenizer, seed=0)

    options = clha_fast.CLHAOptions.preset("published")
    collator = RankedCollator(tokenizer, options)
    dataset = RankedDataset(records, collator)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collator, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    attached = clha_fast.attach(model, options)
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step in range(steps):
        micro_batches = list(itertools.islice(batches, ACCUMULATION))
        # The pairs and prompts of the whole step, so that the loss does not depend on how it is split.
        counts = attached.counts(micro_batches)
        total = 0.0
        for batch in micro_batches:
            output = model(**batch, **counts)
            (output.loss / ACCUMULATION).backward()
            total += output.loss.item() / ACCUMULATION
        optimizer.step()
        optimizer.zero_grad()
        metrics = output.metrics.as_dict()
        print(f"step {step} loss {total:.3f} accuracy {metrics['rewards/accuracies']:.2f}")
    attached.detach()

    # The model is itself again.
    prompt = torch.tensor([dataset[0]["prompt_ids"]])
    answer = model.eval().generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    print(repr(tokenizer.decode(answer[0], skip_special_tokens=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", help="folder or name of a causal language model; a tiny one with random weights")
    parser.add_argument("--data", help="ranked responses, of which the first 32 records train; the bundled ones")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    given = parser.parse_args()
    main(given.steps, given.model, given.data, given.learning_rate)
