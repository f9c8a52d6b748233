"""Scores in two processes, through wrappers that share and shard a model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support.helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "trl"])
def test_as_alone(wrapper: str) -> None:
    if wrapper == "trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*launch, "-m", "tests.support.scoring_processes", wrapper]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
