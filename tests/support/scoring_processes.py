"""What `test_scoring_processes` starts in two processes: a model scored through a wrapper, and alone; no test.

`torchrun ... -m tests.support.scoring_processes WRAPPER` fails where they differ. WRAPPER: ddp, fsdp2, or trl (two
steps of TRL's DPOTrainer with this library's head and with its own).
"""

from __future__ import annotations

import copy
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clha_fast.hf import Scorer, score
from tests.support.head_models import build

STATISTICS = ("entropy", "is_top1")


def full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def compare(wrapper: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = build("gemma2").double()
    model: Any = copy.deepcopy(alone)
    if wrapper == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    batches = [torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(r)) for r in range(world)]
    expected = score(alone, batches[rank], batches[rank], statistics=STATISTICS)
    with Scorer(wrapped) as scorer:
        for _ in range(2):
            got = scorer(batches[rank], batches[rank], statistics=STATISTICS)
            for mine, other in zip(got[:3], expected[:3], strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
        got = scorer(batches[rank], batches[rank], statistics=STATISTICS, gradient=True)
        assert got.entropy is not None
        (got.logps.sum() - 0.5 * got.entropy.sum()).backward()
    for ids in batches:
        found = score(alone, ids, ids, statistics=STATISTICS, gradient=True)
        assert found.entropy is not None
        ((found.logps.sum() - 0.5 * found.entropy.sum()) / world).backward()
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(mine.grad), other.grad, rtol=0, atol=1e-10)


def train() -> None:
    from tests.support import trl_cases

    logs = []
    with trl_cases.quiet():
        for ours in (False, True):
            trainer = trl_cases.make("DPO", "gemma2", tempfile.mkdtemp(), False)
            if ours:
                trl_cases.use_clha(trainer)
            trainer.train()
            logs.append(trl_cases.logged(trainer))
    assert set(logs[0]) == set(logs[1])
    for name, value in logs[0].items():
        assert abs(logs[1][name] - value) <= trl_cases.GRADIENTS * max(1.0, abs(value)), name


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if sys.argv[1] == "trl":
        train()
    else:
        compare(sys.argv[1])
    dist.destroy_process_group()
