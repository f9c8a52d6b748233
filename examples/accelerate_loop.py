"""The same loop with accelerate: one process or many, DDP or FSDP2, as it is launched and configured.

torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu --steps 20
"""

import argparse
import itertools
from importlib.resources import files

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import clha_fast
from clha_fast.data import read_records
from clha_fast.hf import RankedCollator, RankedDataset
from clha_fast.models.loading import build_model, build_tokenizer, texts_of

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def main(steps: int, cpu: bool, model_path: str | None, data: str | None, learning_rate: float) -> None:
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2)
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
    generator = torch.Generator().manual_seed(0)
    dataset = RankedDataset(records, collator)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collator, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    attached = clha_fast.attach(model, options)  # before prepare: the head is measured on whole weights
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step in range(steps):
        micro_batches = list(itertools.islice(batches, accelerator.gradient_accumulation_steps))
        counts = attached.counts(micro_batches)
        losses = []
        for batch in micro_batches:
            with accelerator.accumulate(model):
                output = model(**batch, **counts)
                accelerator.backward(output.loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(output.loss.detach())
        mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        accelerator.print(f"step {step} loss {mean.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="even where a GPU is there")
    parser.add_argument("--model", help="folder or name of a causal language model; a tiny one with random weights")
    parser.add_argument("--data", help="ranked responses, of which the first 32 records train; the bundled ones")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    given = parser.parse_args()
    main(given.steps, given.cpu, given.model, given.data, given.learning_rate)
