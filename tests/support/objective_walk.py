"""Walks the loss of every objective on the CUDA branch without a GPU: the forward, sizes on the CPU, and who waits.

A program of its own (`python -m tests.support.objective_walk`), as `cuda_walk`. It prints JSON: the error of each call,
empty where there is none. Slopes are zeros here, for torch's engine asks for an accelerator.
"""

from __future__ import annotations

import itertools
import json
import sys
from unittest import mock

import torch

from clha_fast import CLHAOptions, PROOptions, SFTOptions, linear_loss
from clha_fast.objectives import Objective
from clha_fast.types import RankingInputs
from tests.support.fake_gpu import FakeGPU

OBJECTIVES: tuple[Objective, ...] = (CLHAOptions(), PROOptions(), SFTOptions())


def call(objective: Objective, backend: str) -> None:
    hidden, weight = (
        torch.empty(rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for rows in (320, 1000)
    )
    targets = torch.empty(320, device="cuda", dtype=torch.int64)
    sizes = torch.full((16,), 20), torch.full((4,), 4)
    given = RankingInputs(*sizes, rewards=torch.arange(16.0).flip(0), prompt_count=torch.tensor(9.0))
    linear_loss(hidden, weight, targets, given, objective, backend=backend)  # type: ignore[arg-type]


def main() -> None:
    errors = {}
    zeros = mock.patch("clha_fast.objectives.ranked.slopes", lambda _, group: torch.zeros_like(group.logps))
    with FakeGPU(90, compiles=False).here(), zeros:
        for objective, backend in itertools.product(OBJECTIVES, ("triton", "workspace")):
            try:
                call(objective, backend)
                error = ""
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as found:
                error = f"{type(found).__name__}: {found}"
            errors[f"{objective.name} {backend}"] = error
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
