"""Streams, budgets and samplers in two gloo processes: the results of one, and no process waits for the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one process and of two."""
    folder = tmp_path_factory.mktemp("data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = []
    for processes in (1, 2):
        out = folder / f"result-{processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += ["--standalone", "-m", "tests.support.two_process_data", str(folder / f"run-{processes}"), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads(out.read_text()))
    return found


def check_training(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    one, two = (result[case] for result in results)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    return [one, two]


def test_what_fills_an_epochs_last_batches_counts_once(results: list[dict[str, Any]]) -> None:
    one, two = check_training(results, "last_batches")
    assert two["tokens"] == one["tokens"]


def test_every_process_has_the_best_steps_weights(results: list[dict[str, Any]]) -> None:
    one, two = check_training(results, "best")
    assert two["step"] == one["step"] in (1, 2), "an earlier one"
    assert two["of each"] == [two["weights"]] * 2
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", ["stream", "stream_with_workers", "budget", "split_batches"])
def test_two_processes_are_one(results: list[dict[str, Any]], case: str) -> None:
    one, two = check_training(results, case)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-4, abs=1e-6)
    assert one["eval"]["num_tokens"] > 0


def test_every_prompt_once_an_epoch(results: list[dict[str, Any]]) -> None:
    expected = sorted(f"record {number}" for number in [*range(26), *range(26)])
    assert [result["epochs"]["prompts"] for result in results] == [expected, expected]


@pytest.mark.parametrize("way", ["random", "budget", "like lengths", "stream", "stream, each its own"])
def test_resume_inside_a_later_epoch(results: list[dict[str, Any]], way: str) -> None:
    assert results[1][f"resumed, {way}"] == {"inside a later epoch": True, "same": True, "moved": True}


def test_what_leaves_others_waiting_is_refused(results: list[dict[str, Any]]) -> None:
    one, two = (result["refused"] for result in results)
    assert set(one.values()) == {None}
    assert two["accelerator_config"].startswith("accelerator_config.even_batches: expected True with several processes")
    assert two["auto_find_batch_size"].startswith("auto_find_batch_size: expected False with several processes")
