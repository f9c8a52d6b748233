"""clha-fast: train language models on ranked responses without paying for the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clha_fast.errors import BackendError
from clha_fast.functional import linear_clha_loss, token_logps
from clha_fast.modules import CLHALoss
from clha_fast.objectives.metrics import METRIC_NAMES, CLHAMetrics
from clha_fast.options import PRESETS, PUBLISHED, CLHAOptions, HeadOptions

if TYPE_CHECKING:
    from clha_fast.models.attach import attach

__version__ = "0.1.0"

__all__ = [
    "METRIC_NAMES",
    "PRESETS",
    "PUBLISHED",
    "BackendError",
    "CLHALoss",
    "CLHAMetrics",
    "CLHAOptions",
    "HeadOptions",
    "__version__",
    "attach",
    "linear_clha_loss",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    # Only this one needs transformers, whose import takes seconds.
    if name == "attach":
        from clha_fast.models.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
