"""`auto` on devices of 80 and 16 GiB that are not there: what runs, what it holds, what is said and what is planned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import forked

GIB = 2**30


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    done = forked.run("walk", "tests.support.auto_walk")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ran(row: dict[str, Any]) -> str:
    return "triton" if "forward_kernel" in " ".join(row["kernels"]) else "workspace"


def test_what_runs_follows_the_tokens(rows: list[dict[str, Any]]) -> None:
    """By hand in tests/ops/test_functional.py and test_memory.py: limits of 8781 and 1247 tokens."""
    assert [(row["memory"], row["head"][0], row["tokens"], ran(row)) for row in rows] == [
        (80, 128256, 1000, "workspace"),
        (80, 128256, 70000, "workspace"),
        (80, 128256, 1000, "workspace"),
        (80, 151936, 8781, "workspace"),
        (80, 151936, 8782, "triton"),
        (80, 151936, 8781, "workspace"),
        (16, 151936, 100, "workspace"),
        (16, 151936, 1247, "workspace"),
        (16, 151936, 1248, "triton"),
        (16, 151936, 1247, "workspace"),
        (16, 128256, 100, "triton"),
        (16, 128256, 20000, "triton"),
        (16, 32000, 100, "workspace"),
        (16, 32000, 50000, "workspace"),
    ]


def test_a_sixteenth_of_the_memory_is_kept(rows: list[dict[str, Any]]) -> None:
    """Beside the gradient of hidden states, 6 bytes an element, and what is numbered by tokens."""
    for row in rows:
        tokens, width = row["tokens"], row["head"][1]
        if ran(row) == "workspace":
            assert row["peak"] - 6 * 2 * tokens * width - 200 * tokens <= row["memory"] * GIB / 16, row


def test_the_plan_counts_what_runs(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        backend, counted = row["planned"]
        assert backend == ran(row), row
        assert row["peak"] <= 1.02 * counted, row
        if backend == "workspace":
            assert counted <= 1.1 * row["peak"], row


def test_each_head_has_one_message(rows: list[dict[str, Any]]) -> None:
    said = {(row["memory"], row["head"][0]): row["said"] for row in rows}
    starts = {
        (80, 128256): "backend auto: workspace (gradients are wanted",
        (80, 151936): "backend auto: workspace up to 8,781 tokens in a call, triton beyond (gradients are wanted",
        (16, 151936): "backend auto: workspace up to 1,247 tokens in a call, triton beyond (gradients are wanted",
        (16, 128256): "backend auto: triton (a GPU and triton are there",
        (16, 32000): "backend auto: workspace (gradients are wanted",
    }
    assert said.keys() == starts.keys()
    for which, lines in said.items():
        assert len(lines) == 1, lines
        assert lines[0].startswith(starts[which])
