"""Adapters under DDP and FSDP2 in two real processes, and a process whose batch is wrong: no other one hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.helpers import ROOT


def launch(out: Path, what: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.support.adapter_processes",
        str(out),
        what,
    ]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=240)


# By default test_adapters.py has them in one process, and tests/training/test_trainer_processes.py two processes.
@pytest.mark.slow
def test_adapters_in_wrappers(tmp_path: Path) -> None:
    done = launch(tmp_path / "out", "cases")
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"out.{rank}").read_text("utf-8")) for rank in range(2)]
    assert len(results[0]["cases"]) == 11
    for result in results:
        for name, case in result["cases"].items():
            assert max(case["loss"], case["gradients"]) <= case["tolerance"], (name, case)
    # `Attached.counts` runs collectives, and one process's micro-batch lacked a field.
    assert results[1]["said"][0].startswith("candidate_lengths: expected in a batch, got the keys")
    assert results[0]["said"][0] == "batches: expected batches on every process, got an error on another one"
    for result in results:
        assert "all of its logits on every process, got Spread spread over a mesh" in result["said"][1]
        assert "hidden: expected a plain tensor before Spread, got (Replicate(),)" in result["said"][2]
    assert max(result["seconds"] for result in results) < 30  # the process group waits for 90


@pytest.mark.slow
def test_a_wrong_batch_ends_the_run_for_all(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = launch(tmp_path / "out", "bad batch")
    assert done.returncode != 0
    assert "targets: expected tokens below the 300 rows of the model's output embedding" in done.stderr
    assert time.monotonic() - begun < 80  # before the other process's collective gives up
