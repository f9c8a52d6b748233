"""Models, collators and the trainer on top of Hugging Face transformers.

Names are imported when they are first used: a collator does not need transformers' Trainer, which takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clha_fast.batching.batch import CandidateBatch
    from clha_fast.batching.collator import RankedCollator, RankedDataset
    from clha_fast.batching.sampling import TokenBudgetSampler
    from clha_fast.batching.stream import RankedStream
    from clha_fast.models.heads import HeadInfo, UnsupportedHeadError, fused_head, inspect_head
    from clha_fast.models.scoring import Scorer, TokenScores, score
    from clha_fast.models.segment_masks import UnsupportedLayoutError
    from clha_fast.rewards.ranking import Ranking, rank
    from clha_fast.training.config import CLHAConfig
    from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer
    from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
    from clha_fast.training.trainer import CLHATrainer

_WHERE = {
    "CLHAConfig": "clha_fast.training.config",
    "CLHATrainer": "clha_fast.training.trainer",
    "CandidateBatch": "clha_fast.batching.batch",
    "HeadInfo": "clha_fast.models.heads",
    "RankedCollator": "clha_fast.batching.collator",
    "RankedDataset": "clha_fast.batching.collator",
    "RankedStream": "clha_fast.batching.stream",
    "Ranking": "clha_fast.rewards.ranking",
    "RewardConfig": "clha_fast.training.reward_trainer",
    "RewardTrainer": "clha_fast.training.reward_trainer",
    "RolloutConfig": "clha_fast.training.rollout",
    "RolloutTrainer": "clha_fast.training.rollout",
    "Scorer": "clha_fast.models.scoring",
    "TokenBudgetSampler": "clha_fast.batching.sampling",
    "TokenScores": "clha_fast.models.scoring",
    "UnsupportedHeadError": "clha_fast.models.heads",
    "UnsupportedLayoutError": "clha_fast.models.segment_masks",
    "fused_head": "clha_fast.models.heads",
    "inspect_head": "clha_fast.models.heads",
    "rank": "clha_fast.rewards.ranking",
    "score": "clha_fast.models.scoring",
}

__all__ = [
    "CLHAConfig",
    "CLHATrainer",
    "CandidateBatch",
    "HeadInfo",
    "RankedCollator",
    "RankedDataset",
    "RankedStream",
    "Ranking",
    "RewardConfig",
    "RewardTrainer",
    "RolloutConfig",
    "RolloutTrainer",
    "Scorer",
    "TokenBudgetSampler",
    "TokenScores",
    "UnsupportedHeadError",
    "UnsupportedLayoutError",
    "fused_head",
    "inspect_head",
    "rank",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
