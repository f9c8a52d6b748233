"""clha-fast: train language models on ranked responses without paying for the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clha_fast.errors import BackendError
from clha_fast.functional import linear_clha_loss, linear_loss, ranking_loss, token_logps
from clha_fast.modules import CLHALoss, LinearLoss
from clha_fast.objectives import (
    CoHOptions,
    CPOOptions,
    DPOOptions,
    HingeOptions,
    IPOOptions,
    Objective,
    ORPOOptions,
    PolicyOptions,
    PROOptions,
    RRHFOptions,
    SFTOptions,
    SimPOOptions,
)
from clha_fast.objectives.clha import PRESETS, PUBLISHED, CLHAOptions
from clha_fast.objectives.metrics import METRIC_NAMES, CLHAMetrics
from clha_fast.options import HeadOptions
from clha_fast.types import RankingInputs, VocabShard
from clha_fast.version import __version__

if TYPE_CHECKING:
    from clha_fast.models.attach import Attached, attach

__all__ = [
    "METRIC_NAMES",
    "PRESETS",
    "PUBLISHED",
    "Attached",
    "BackendError",
    "CLHALoss",
    "CLHAMetrics",
    "CLHAOptions",
    "CPOOptions",
    "CoHOptions",
    "DPOOptions",
    "HeadOptions",
    "HingeOptions",
    "IPOOptions",
    "LinearLoss",
    "ORPOOptions",
    "Objective",
    "PROOptions",
    "PolicyOptions",
    "RRHFOptions",
    "RankingInputs",
    "SFTOptions",
    "SimPOOptions",
    "VocabShard",
    "__version__",
    "attach",
    "linear_clha_loss",
    "linear_loss",
    "ranking_loss",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    # Only these need transformers, whose import takes seconds.
    if name in ("Attached", "attach"):
        from clha_fast.models import attach

        return getattr(attach, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
