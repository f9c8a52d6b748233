"""Models, collators and the trainer on top of Hugging Face transformers.

Names are imported when they are first used: a collator does not need transformers' Trainer, which takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clha_fast.batching.collator import RankedCollator, RankedDataset
    from clha_fast.batching.sampling import TokenBudgetSampler
    from clha_fast.batching.stream import RankedStream
    from clha_fast.hf.config import CLHAConfig
    from clha_fast.hf.heads import HeadInfo, UnsupportedHeadError, fused_head, inspect_head
    from clha_fast.hf.trainer import CLHATrainer

_WHERE = {
    "CLHAConfig": "config",
    "CLHATrainer": "trainer",
    "HeadInfo": "heads",
    "RankedCollator": "collator",
    "RankedDataset": "collator",
    "RankedStream": "stream",
    "TokenBudgetSampler": "sampling",
    "UnsupportedHeadError": "heads",
    "fused_head": "heads",
    "inspect_head": "heads",
}

__all__ = [
    "CLHAConfig",
    "CLHATrainer",
    "HeadInfo",
    "RankedCollator",
    "RankedDataset",
    "RankedStream",
    "TokenBudgetSampler",
    "UnsupportedHeadError",
    "fused_head",
    "inspect_head",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
