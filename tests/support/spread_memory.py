"""What `test_sequence_parallel` starts in two processes: one runs out of memory within a forward of both; no test."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.segment_masks import UnsupportedLayoutError
from tests.support.tiny import make_model, make_rows, make_tokenizer


def main() -> None:
    dist.init_process_group("gloo")
    tokenizer = make_tokenizer()
    model: Any = make_model(len(tokenizer))
    clha_fast.attach(model, layout="padded", sequence_parallel=dist.group.WORLD)

    def full(*_: Any) -> None:
        if dist.get_rank() == 0:
            raise torch.OutOfMemoryError("planted")

    model.model.layers[1].mlp.register_forward_pre_hook(full)
    found = ""
    try:
        model(**RankedCollator(tokenizer)(make_rows(2)))
    except (RuntimeError, UnsupportedLayoutError) as error:  # an OutOfMemoryError is one, and a peer that has gone
        found = type(error).__name__
    print(f"process {dist.get_rank()}: {found}", flush=True)
    os._exit(0)  # the other one waits for this to end


if __name__ == "__main__":
    main()
