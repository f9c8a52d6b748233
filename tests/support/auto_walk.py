"""What `auto` takes on devices that are not there, beside what the loss then holds and what a plan counts.

A program of its own (`python -m tests.support.auto_walk`), because the tests' own process runs Triton's interpreter.
Prints a JSON row for each call of the loss.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from transformers import LlamaConfig

from clha_fast.ops import dispatch
from clha_fast.planning.step import Rows, Switches, build, head_bytes, loss_backend
from tests.support.cuda_walk import Case, run
from tests.support.fake_gpu import FakeGPU

GIB = 2**30
# GiB of the device, V, H, and the numbers of scored tokens of the calls, in their order.
DEVICES = (
    (80, 128256, 4096, (1000, 70000, 1000)),
    (80, 151936, 8192, (8781, 8782, 8781)),
    (16, 151936, 2048, (100, 1247, 1248, 1247)),
    (16, 128256, 4096, (100, 20000)),
    (16, 32000, 2048, (100, 50000)),
)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _planned(memory: int, vocabulary: int, width: int, tokens: int, rows: int) -> tuple[str, int]:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    switches, counted = Switches(memory=memory), Rows(1, rows, tokens, tokens // 4)
    model = build(config, switches)
    return loss_backend(model, counted, switches), head_bytes(model, counted, switches)


def main() -> None:
    said = _Said()
    dispatch.logger.addHandler(said)
    dispatch.logger.setLevel(logging.INFO)
    found: list[dict[str, Any]] = []
    for gib, vocabulary, width, numbers in DEVICES:
        # A small one is none of those whose kernel forms the weight's gradient without parts in float32.
        gpu = FakeGPU(90 if gib >= 80 else 80, compiles=False, memory=gib * GIB)
        dispatch._say_once.cache_clear()
        said.lines.clear()
        with gpu.here():
            made = []
            for tokens in numbers:
                rows = 2 * tokens
                case = Case("auto", tokens=tokens, width=width, vocabulary=vocabulary, rows=rows)
                made.append({"memory": gib, "head": [vocabulary, width], "tokens": tokens, **run(gpu, case)})
        for row in made:
            row["planned"] = _planned(gib * GIB, vocabulary, width, row["tokens"], 2 * row["tokens"])
            row["said"] = list(said.lines)
        found += made
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
