"""clha-fast: train language models on ranked responses without paying for the logits."""

from clha_fast.errors import BackendError
from clha_fast.functional import linear_clha_loss, token_logps
from clha_fast.metrics import METRIC_NAMES, CLHAMetrics
from clha_fast.modules import CLHALoss
from clha_fast.options import PRESETS, PUBLISHED, CLHAOptions, HeadOptions

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
    "linear_clha_loss",
    "token_logps",
]
