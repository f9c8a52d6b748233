"""How much of the model's input is padding, by the way that prompts are put into batches.

`python -m benchmarks.padding ranked.jsonl`: a tokenizer is trained on the file unless one is named; nothing runs
through a model. Every way gets about the same number of padded tokens in a batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.sampling import LengthSampler, TokenBudgetSampler, prompt_shapes
from clha_fast.data import RecordError, read_records
from clha_fast.models.loading import build_tokenizer, load_tokenizer, texts_of

EPOCHS = 3


def fixed(order: Iterable[int], size: int) -> list[list[int]]:
    """Batches of `size` prompts in the order given."""
    indices = list(order)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def measure(dataset: RankedDataset, collator: RankedCollator, epochs: Iterable[list[list[int]]]) -> dict[str, float]:
    """Batches an epoch, padded tokens of the mean and of the largest batch, and the share of them that is padding."""
    sizes, tokens, count = [], 0, 0
    for batches in epochs:
        count += 1
        for indices in batches:
            batch = CandidateBatch.from_dict(collator([dataset[index] for index in indices]))
            sizes.append(batch.input_ids.numel())
            tokens += int(batch.attention_mask.sum())
    padded = sum(sizes)
    return {
        "batches": len(sizes) / count,
        "mean": padded / len(sizes),
        "largest": max(sizes),
        "padding": 1 - tokens / padded,
        "padded_tokens": padded / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="ranked responses, in any known format")
    parser.add_argument("--tokenizer", help="a folder or name; by default a byte-level BPE trained on the file")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts in a batch of a fixed number of them")
    parser.add_argument("--max-tokens", type=int, help="the budget; by default the mean batch of --batch-size prompts")
    parser.add_argument("--max-length", type=int, help="as in training")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    bad: list[RecordError] = []
    records = read_records(args.file, errors=bad)
    tokenizer = (
        load_tokenizer(args.tokenizer)
        if args.tokenizer
        else build_tokenizer(texts_of(records), vocab_size=args.vocab_size)
    )
    collator = RankedCollator(tokenizer, max_length=args.max_length)
    dataset = RankedDataset(records, collator)

    def shuffled(epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(epoch)
        return fixed(torch.randperm(len(dataset), generator=generator).tolist(), args.batch_size)

    def like_lengths(epoch: int) -> list[list[int]]:
        sampler = LengthSampler(dataset.lengths, args.batch_size, seed=0)
        sampler.set_epoch(epoch)
        return fixed(sampler, args.batch_size)

    before = measure(dataset, collator, map(shuffled, range(EPOCHS)))
    budget = args.max_tokens or round(before["mean"])
    sampler = TokenBudgetSampler(prompt_shapes(dataset, collator.options), budget)
    ways: dict[str, Callable[[int], list[list[int]]]] = {
        "group_by_length": like_lengths,
        f"max_tokens_per_batch {budget}": sampler.batches,
        # What no way of putting whole prompts together avoids: candidates of one prompt differ in length.
        "one prompt a batch": lambda epoch: [[index] for index in range(len(dataset))],
    }
    found: dict[str, Any] = {f"random, {args.batch_size} prompts": before}
    found |= {name: measure(dataset, collator, map(way, range(EPOCHS))) for name, way in ways.items()}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    left_out = f", {len(bad)} bad records left out" if bad else ""
    print(f"{len(dataset)} prompts{left_out}, {EPOCHS} epochs; inert candidates are left out as in training")
    print(f"{'':<28} {'batches':>8} {'mean':>8} {'largest':>8} {'padding':>8} {'tokens an epoch':>16}")
    for name, row in found.items():
        print(
            f"{name:<28} {row['batches']:>8.0f} {row['mean']:>8.0f} {row['largest']:>8.0f} {row['padding']:>8.1%} "
            f"{row['padded_tokens']:>16,.0f}"
        )


if __name__ == "__main__":
    main()
