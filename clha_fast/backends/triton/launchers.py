"""Which objectives have kernels of their own; all others are ranked in torch, on the same device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clha_fast.backends.triton.clha import CLHARanking
from clha_fast.backends.triton.head import Head
from clha_fast.objectives import CLHAOptions, Objective
from clha_fast.objectives.ranked import RankedBatch
from clha_fast.types import RankingInputs

LAUNCHERS: dict[type[Objective], Callable[[Any, RankingInputs, Head], CLHARanking]] = {CLHAOptions: CLHARanking}


def launcher(objective: Objective, given: RankingInputs, head: Head) -> CLHARanking | RankedBatch:
    """What ranks a batch with an objective; `RankedBatch` reads the sizes on the host."""
    kind = LAUNCHERS.get(type(objective))
    if kind is not None and not objective.wanted:
        return kind(objective, given, head)
    return RankedBatch(objective, given, head.targets != head.ignore_index, torch.float32)
