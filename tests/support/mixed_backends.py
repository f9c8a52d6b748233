"""What `test_mixed_backends` starts under torch.distributed.run: processes whose `auto` chose differently; no test.

The first has three prompts, the other one; their losses run `workspace` and `triton` in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch.distributed as dist

from clha_fast.batching.batch import CandidateBatch
from tests.support.wrapper_cases import ddp, fsdp
from tests.support.wrapper_common import ROWS, collate, untied

BACKENDS = ("workspace", "triton")


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def parts() -> list[CandidateBatch]:
        return [collate((ROWS[:3], ROWS[3:])[rank])]

    found = {
        "DDP": ddp(parts, backend=BACKENDS[rank]),
        "FSDP2": fsdp(untied, backend=BACKENDS[rank], batches=parts),
    }
    if rank == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump({name: dataclasses.asdict(measured) for name, measured in found.items()}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
