"""Two processes whose numbers of tokens lie on both sides of `auto`'s limit: each runs its own backend, none waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import ROOT


@pytest.mark.slow
def test_gradients_are_the_whole_step_s(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "tests.support.mixed_backends", str(out)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert found.keys() == {"DDP", "FSDP2"}
    for measured in found.values():
        assert max(measured["loss"], measured["gradients"]) <= measured["tolerance"] == 1e-5, found
