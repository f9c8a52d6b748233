"""Which vocabulary blocks the gradients of a real model keep under `max_dropped_mass`, and how often each is kept.

    python -m benchmarks.kept_blocks MODEL ranked.jsonl [--tokens 4096] [--json FILE]

The routed gradients cost about what the kept share says (`metrics.kept_block_share` has it in training). Beside it what
could make them cheaper: the kept pairs in blocks that more than half of the tokens keep, and of tokens that keep more
than half of the blocks (both could be dense products), with how many blocks and tokens these are; and the kept share if
words stood in the order of their mean probability on the other half of the tokens. Logits of one prompt at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import cpu_environment
from clha_fast.backends.torch.routing import kept_blocks
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.data import read_records
from clha_fast.models.loading import load_tokenizer
from clha_fast.options import ROUTE_WORDS

DROPPED = (0.001, 0.01, 0.1)
# Of as many prompts as that takes: a single prompt's responses have words in common.
TOKENS_PER_PROMPT = 64


@torch.no_grad()
def responses_of(model: torch.nn.Module, dataset: RankedDataset, collator: RankedCollator, limit: int) -> Any:
    """(logits [n, V] float32, targets [n]) of drawn scored tokens, prompt after prompt, `limit` of them in all."""
    left, generator = limit, torch.Generator().manual_seed(0)
    for index in range(len(dataset)):
        batch = CandidateBatch.from_dict(collator([dataset[index]]))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
        drawn = torch.randperm(len(batch.targets), generator=generator)[: min(left, TOKENS_PER_PROMPT)]
        yield logits[batch.row_index[drawn]].float(), batch.targets[drawn]
        left -= len(drawn)
        print(f"\r{limit - left} of {limit} tokens", end="" if left else "\n", file=sys.stderr, flush=True)
        if not left:
            return


def masses_of(probabilities: Tensor) -> Tensor:
    """Softmax masses [blocks, n] of probabilities [n, V]."""
    blocks = -(-probabilities.shape[1] // ROUTE_WORDS)
    whole = torch.nn.functional.pad(probabilities, (0, blocks * ROUTE_WORDS - probabilities.shape[1]))
    return whole.unflatten(1, (blocks, ROUTE_WORDS)).sum(2).t()


class Counts:
    """How many tokens keep each block, and how many blocks each token, for every dropped mass of `DROPPED`."""

    def __init__(self, vocabulary: int) -> None:
        self.kept = torch.zeros(len(DROPPED), -(-vocabulary // ROUTE_WORDS), dtype=torch.int64)
        self.of_tokens: list[Tensor] = []  # [len(DROPPED), n]

    @property
    def tokens(self) -> int:
        return sum(counts.shape[1] for counts in self.of_tokens)

    def add(self, probabilities: Tensor, targets: Tensor) -> None:
        masses = masses_of(probabilities)
        own = torch.arange(masses.shape[0]).unsqueeze(1) == targets // ROUTE_WORDS
        masses.masked_fill_(own, torch.inf)
        kept = torch.stack([kept_blocks(masses, dropped) for dropped in DROPPED])
        self.kept += kept.sum(2)
        self.of_tokens.append(kept.sum(1))

    def figures(self) -> list[dict[str, float]]:
        found = []
        by_token = torch.cat(self.of_tokens, 1).double() / self.kept.shape[1]
        for dropped, blocks, tokens in zip(DROPPED, self.kept.double() / self.tokens, by_token, strict=True):
            row = {"max_dropped_mass": dropped, "kept_share": float(blocks.mean())}
            for name, shares in (("blocks", blocks), ("tokens", tokens)):
                most = shares > 0.5
                row[f"dense_{name}"] = float(most.double().mean())
                row[f"pairs_of_dense_{name}"] = float(shares[most].sum() / shares.sum())
            found.append(row)
        return found


def measure(model: torch.nn.Module, dataset: RankedDataset, collator: RankedCollator, limit: int) -> dict[str, Any]:
    """The figures of as many scored tokens as there are, up to `limit`; of their second half in the other order."""
    entropy, order, tokens = 0.0, None, 0
    mean: Tensor | float = 0.0
    as_is = by_probability = None
    for logits, targets in responses_of(model, dataset, collator, limit):
        as_is, by_probability = as_is or Counts(logits.shape[1]), by_probability or Counts(logits.shape[1])
        logps = logits.log_softmax(1)
        probabilities = logps.exp()
        entropy -= float((probabilities * logps).nan_to_num().sum())
        as_is.add(probabilities, targets)
        tokens += len(targets)
        if order is None:
            mean = mean + probabilities.sum(0)
            if 2 * tokens >= limit:
                order = torch.as_tensor(mean).argsort(descending=True)
                place = order.argsort()
        else:
            by_probability.add(probabilities[:, order], place[targets])
    if as_is is None or by_probability is None or not by_probability.tokens:
        raise SystemExit(
            f"expected a file with at least {limit} scored tokens, got {tokens}: a smaller --tokens will do"
        )
    found = as_is.figures()
    for row, other in zip(found, by_probability.figures(), strict=True):
        row["kept_share_by_probability"] = other["kept_share"]
    return {
        "tokens": tokens,
        "vocabulary": int(torch.as_tensor(mean).numel()),
        "entropy": entropy / tokens,
        "rows": found,
        "environment": cpu_environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or name of a causal language model")
    parser.add_argument("file", help="ranked responses, in any known format")
    parser.add_argument("--tokens", type=int, default=4096, help="scored tokens, from the file's first prompts on")
    parser.add_argument("--max-length", type=int, default=512, help="as in training")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    collator = RankedCollator(load_tokenizer(args.model), max_length=args.max_length)
    found = measure(model, RankedDataset(read_records(args.file), collator), collator, args.tokens)
    found |= {"model": Path(args.model).name, "file": Path(args.file).name, "width": model.config.hidden_size}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['model']}: {found['tokens']} scored tokens, V {found['vocabulary']}, {found['entropy']:.2f} nats")
    print(
        "| max_dropped_mass | pairs kept | blocks that most tokens keep | pairs there | tokens that keep most blocks "
        "| pairs there | pairs kept, words by probability |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        print(
            f"| {row['max_dropped_mass']:g} | " + " | ".join(f"{value:.1%}" for value in list(row.values())[1:]) + " |"
        )


if __name__ == "__main__":
    main()
