"""The CPU benchmark's tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.render import render

ROW = {"seconds": 2.0, "spread": 0.1, "rounds": 9, "over_eager": 0.5, "over_bare_gemms": 1.0}
CACHES = {"second": 2**19, "last": 2**25, "sharing": 2}
REPORT: dict[str, Any] = {
    "environment": {
        **{"cpu": "A CPU", "vector": "AVX2", "caches": CACHES, "threads": 2},
        **{"date": "2026-01-01", "torch": "2.13.0", "commit": "abc1234", "clock": "wall"},
    },
    "workloads": {
        "small": {
            **{"shape": "a shape", "rounds": 9, "scored_tokens": 10, "softmax_entropy": 1.0, "gradient_bytes": 10**6},
            "methods": {
                "clha_fast_torch": ROW | {"fastest": 1.75, "peak_bytes": 2e6},
                "eager": ROW | {"fastest": 3.25, "peak_bytes": 3e6},
                "cce_torch_compile": {"status": "not installed"},
                "bare_gemms": ROW | {"fastest": 1.5},
            },
        }
    },
}


@pytest.mark.parametrize("fastest", [True, False])
def test_rows_have_the_columns_of_their_table(fastest: bool) -> None:
    """With the seconds of the fastest round, and of runs that did not write them down without."""
    report = copy.deepcopy(REPORT)
    if not fastest:
        for row in report["workloads"]["small"]["methods"].values():
            row.pop("fastest", None)
    text = render(report, ["small"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 6
    assert {row.count("|") for row in rows} == {6 if fastest else 5}
    assert ("| 1.75 s | 2 MB |" in text) is fastest
    assert ("in an order of its own each" in text) is fastest
