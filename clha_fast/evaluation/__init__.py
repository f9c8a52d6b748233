"""Answers and models measured: a file a metric, intervals over prompts, comparisons, and tables of runs.

Names are imported when they are first used: tables and plots need no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clha_fast.evaluation.comparison import Comparison, compare
    from clha_fast.evaluation.intervals import Estimate
    from clha_fast.evaluation.report import Evaluation, evaluate

_WHERE = {
    "Comparison": "clha_fast.evaluation.comparison",
    "Estimate": "clha_fast.evaluation.intervals",
    "Evaluation": "clha_fast.evaluation.report",
    "compare": "clha_fast.evaluation.comparison",
    "evaluate": "clha_fast.evaluation.report",
}

__all__ = ["Comparison", "Estimate", "Evaluation", "compare", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
