"""pytest-benchmark timings: `pytest benchmarks --benchmark-group-by=param:workload`; never part of the test suite."""

from __future__ import annotations

import pytest

from benchmarks.cpu_methods import METHODS, bare_gemms, check, training_step, why_not
from benchmarks.workloads import WORKLOADS, make_batch


@pytest.mark.parametrize("method", [*(m for m in METHODS if why_not(m) is None), "bare_gemms"])
@pytest.mark.parametrize("workload", ["small-vocabulary"])
def test_training_step(benchmark, workload, method):
    chosen = WORKLOADS[workload]
    batch = make_batch(chosen)
    if method == "bare_gemms":
        step = bare_gemms(batch)
    else:
        check(method, chosen)
        step = training_step(method, batch)
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
