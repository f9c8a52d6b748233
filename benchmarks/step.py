"""A whole training step of a language model on a GPU: forward and backward with the logits, and without them.

    python -m benchmarks.step --output DIR [--rounds 5] [--limit 90] [--tiny]

A Llama of 1.2 B parameters in bfloat16 with random weights (16 layers, H 2048, V 128256, tied), 4 prompts of 256 tokens
with 4 responses of 256 to 512. `logits` is what a loop does without this library: the model's own logits of the padded
batch, a float32 log-softmax, the ranking loss. `no head` stops in front of the head: what is left of a step for nothing
but the model. The others attach the library; layouts are those of `clha_fast.attach`. Times between events, medians
over interleaved rounds, ratios within a round; peaks above the weights and their gradients. DIR/step.json is saved as
it grows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import clha_fast
from benchmarks.measure import Clock, Deadline, clean, gpu_environment, interleaved, peak_bytes
from benchmarks.report import save
from clha_fast.models.layout_probe import candidates_of, pack
from clha_fast.types import RankingInputs

WAYS = ("logits", "no head", "padded", "packed", "shared")
PROMPTS, CANDIDATES, PROMPT, RESPONSE = 4, 4, 256, (256, 512)


def model_of(device: str, tiny: bool) -> nn.Module:
    torch.manual_seed(0)
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4 if tiny else 32, "num_key_value_heads": 2 if tiny else 8}
    config = LlamaConfig(**(small if tiny else wide), **heads, tie_word_embeddings=True)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.float32 if tiny else torch.bfloat16).train()


def features(tiny: bool) -> list[Any]:
    """The prompts' candidates, of lengths drawn from `RESPONSE`."""
    draw, words = torch.Generator().manual_seed(1), 500 if tiny else 128000
    shrink = 16 if tiny else 1
    found = []
    for _ in range(PROMPTS):
        sizes = torch.randint(RESPONSE[0] // shrink, RESPONSE[1] // shrink + 1, (CANDIDATES,), generator=draw).tolist()
        ids = [torch.randint(10, words, (size,), generator=draw).tolist() for size in (PROMPT // shrink, *sizes)]
        found.append(candidates_of(ids[0], ids[1:]))
    return found


def with_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The ranking loss of the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits.float().log_softmax(-1).flatten(0, 1)[batch["row_index"]]
    logps = logps.gather(1, batch["targets"][:, None])[:, 0]
    given = RankingInputs(batch["candidate_lengths"], batch["candidates_per_prompt"])
    return clha_fast.ranking_loss(logps, given)[0]


def without_head(model: Any, batch: dict[str, Any]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.model(**inputs, use_cache=False).last_hidden_state.float().mean()


class Steps:
    """The ways' steps on one model, the library attached: calls without candidates are the model's own."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.model = device, model_of(device, tiny)
        self.features = features(tiny)
        clha_fast.attach(self.model, layout="shared")

    def batch(self, layout: str) -> dict[str, Any]:
        return pack(self.features, layout).to(self.device).as_dict()

    def step(self, way: str) -> Callable[[], None]:
        layout = way if way in ("packed", "shared") else "padded"
        batch = self.batch(layout)
        losses = {"logits": with_logits, "no head": without_head}

        def run() -> None:
            loss = losses[way](self.model, batch) if way in losses else self.model(**batch).loss
            loss.backward()
            self.model.zero_grad(set_to_none=False)

        return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, on a CPU where there is no GPU")
    args = parser.parse_args()
    device, deadline = "cuda" if torch.cuda.is_available() else "cpu", Deadline(args.limit)
    steps = Steps(device, args.tiny)
    sizes = steps.batch("padded")
    report: dict[str, Any] = {
        "dry_run": args.tiny,
        "environment": gpu_environment(device),
        "scored_tokens": sizes["targets"].numel(),
        "padded_tokens": sizes["input_ids"].numel(),
        "shared_tokens": steps.batch("shared")["input_ids"].numel(),
        "parameters": sum(p.numel() for p in steps.model.parameters()),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "step.json"

    def keep(rows: dict[str, Any]) -> None:
        report["ways"] = rows
        save(report, file)

    ways = {way: steps.step(way) for way in WAYS}
    rows = interleaved(ways, Clock(device), args.rounds, deadline, bases=("logits", "no head"), after=keep)
    for way, run in ways.items():
        if "failed" not in rows[way] and deadline.allows(3):
            rows[way]["peak_bytes"] = peak_bytes(run, device)
            clean()
    keep(rows)
    for way, row in rows.items():
        if "failed" in row:
            print(f"{way:16} {row['failed']}")
        else:
            over = " ".join(f"{row[f'over_{base}']:.2f}" for base in ("logits", "no head"))
            print(f"{way:16} {row['seconds'] * 1e3:8.1f} ms  {over}  {row.get('peak_bytes', 0) / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
