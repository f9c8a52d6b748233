"""pytest-benchmark timings: `pytest benchmarks --benchmark-group-by=param:workload`; never part of the test suite."""

from __future__ import annotations

import pytest

from benchmarks.correct import check
from benchmarks.inputs import WORKLOADS, workload_batch
from benchmarks.methods import CPU_BOUND, CPU_METHODS, why_not


@pytest.mark.parametrize("method", [name for name in CPU_METHODS if why_not(name) is None])
@pytest.mark.parametrize("workload", ["small-vocabulary"])
def test_training_step(benchmark, workload, method):
    chosen = WORKLOADS[workload]
    if method != CPU_BOUND:
        check(method, chosen)
    benchmark.pedantic(CPU_METHODS[method].build(workload_batch(chosen)), rounds=3, warmup_rounds=1)
