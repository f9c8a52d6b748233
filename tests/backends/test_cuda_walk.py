"""The CUDA host code, walked without a GPU: nothing is read back, every launch is one that a GPU would take.

`tests.support.cuda_walk` does it, in processes without the interpreter; what it replaces is in `fake_gpu.py`. And
`auto` on devices of 80 and 16 GiB that are not there: what runs, what it holds, what is said and what is planned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from csrc_triton import backward, combine, forward, persistent_backward, routed, routing, softmax
from csrc_triton import clha as ranking
from tests.support import forked
from tests.support.helpers import ROOT

Found = dict[str, list[dict[str, Any]]]
GIB = 2**30


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.cuda_walk", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Found:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    found: Found = json.loads(output)
    return found


def walk(cache: Path, *arguments: str) -> Found:
    done = forked.run("walk", "tests.support.cuda_walk", *arguments, TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Compiling takes longest: tests/kernels/test_kernel_compile.py compiles anew what has changed of every kernel, and
    slow tests those of this walk."""
    cache = tmp_path_factory.mktemp("triton")
    return {cases: walk(cache, "--cases", cases, "--no-compile") for cases in ("quick", "shapes")}


def failures(found: Found) -> str:
    return "\n".join(f"{row['case']}: {row['error']}" for row in found["cases"] if "error" in row)


def spills(found: Found) -> list[dict[str, Any]]:
    return [row for row in found["kernels"] if row["stack"] or row["local"]]


@pytest.mark.parametrize("which", ["quick", "shapes"])
def test_every_call_ends_without_a_wait_or_a_launch_that_fails(found: dict[str, Found], which: str) -> None:
    assert len(found[which]["cases"]) >= 4
    assert not failures(found[which])


def test_every_kernel_was_launched(found: dict[str, Found]) -> None:
    launched = {name for part in found.values() for row in part["cases"] for name in row["kernels"]}
    modules = (backward, combine, forward, persistent_backward, ranking, routed, routing, softmax)
    assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "workspace"])
def test_no_register_of_a_backend_s_kernels_is_spilled(backend: str, tmp_path: Path) -> None:
    compiled = finish(start(tmp_path, "--backend", backend))
    assert len(compiled["kernels"]) >= 10
    assert not failures(compiled)
    assert not spills(compiled)


def test_memory_is_what_the_design_says(found: dict[str, Found]) -> None:
    """Peaks above the inputs at the large shapes: at most `cuda_walk.allowed`, and no less than nine tenths of it."""
    for row in found["shapes"]["cases"]:
        assert 0.9 * row["allowed"] <= row["peak"] <= row["allowed"], row
        if row["allowed_forward"]:
            assert 0.9 * row["allowed_forward"] <= row["forward_peak"] <= row["allowed_forward"], row


@pytest.mark.parametrize(("tokens", "limit"), [(4096, 1.2), (8192, 2.2)])
def test_the_workspace_s_memory_beyond_gradients(found: dict[str, Found], tokens: int, limit: float) -> None:
    """GiB at H 4096 and V 128256, counted: one chunk of 16-bit logits."""
    shape = "width=4096 vocabulary=128256 prompts"
    named = f"tokens={tokens} {shape}"
    (row,) = (row for row in found["shapes"]["cases"] if row["case"].startswith("workspace ") and named in row["case"])
    assert 2 * tokens * 128256 < row["peak"] - row["gradients"] <= limit * 2**30


def test_what_a_gpu_would_refuse_is_refused() -> None:
    """The walk's own checks, each against something that breaks it."""
    done = forked.run("walk", "tests.support.fake_gpu_refusals")
    assert done.returncode == 0, done.stderr


def test_no_objective_makes_the_host_wait() -> None:
    """PRO, SFT and CLHA on either backend, sizes on the CPU: log-probabilities, terms and metrics."""
    done = forked.run("walk", "tests.support.objective_walk")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 6
    assert not any(errors.values()), errors


@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.slow), "90"])
def test_batches_of_other_sizes_compile_nothing_anew(tmp_path: Path, capability: str) -> None:
    """One variant of a kernel for each choice of its own constants, whatever the numbers of tokens and prompts."""
    result = walk(tmp_path, "--cases", "sizes", "--no-compile", "--capability", capability)
    assert len(result["cases"]) == 48
    assert not failures(result)
    assert {"combine_kernel", "gradient_kernel", "route_list_kernel"} <= {row["kernel"] for row in result["variants"]}
    assert [row for row in result["variants"] if row["variants"] > 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "100", "942"])
def test_every_mode(tmp_path: Path, capability: str) -> None:
    running = [
        start(tmp_path, "--cases", "full", "--capability", capability, "--backend", backend)
        for backend in ("triton", "workspace")
    ]
    for process in running:
        result = finish(process)
        assert len(result["cases"]) > 300
        assert not failures(result)
        assert not spills(result)


@pytest.fixture(scope="module")
def chosen() -> list[dict[str, Any]]:
    done = forked.run("walk", "tests.support.auto_walk")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ran(row: dict[str, Any]) -> str:
    return "triton" if "forward_kernel" in " ".join(row["kernels"]) else "workspace"


def test_what_runs_follows_the_tokens(chosen: list[dict[str, Any]]) -> None:
    """By hand in tests/ops/test_functional.py and test_memory.py: limits of 8781 and 1247 tokens."""
    assert [(row["memory"], row["head"][0], row["tokens"], ran(row)) for row in chosen] == [
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


def test_a_sixteenth_of_the_memory_is_kept(chosen: list[dict[str, Any]]) -> None:
    """Beside the gradient of hidden states, 6 bytes an element, and what is numbered by tokens."""
    for row in chosen:
        tokens, width = row["tokens"], row["head"][1]
        if ran(row) == "workspace":
            assert row["peak"] - 6 * 2 * tokens * width - 200 * tokens <= row["memory"] * GIB / 16, row


def test_the_plan_counts_what_runs(chosen: list[dict[str, Any]]) -> None:
    for row in chosen:
        backend, counted = row["planned"]
        assert backend == ran(row), row
        assert row["peak"] <= 1.02 * counted, row
        if backend == "workspace":
            assert counted <= 1.1 * row["peak"], row


def test_each_head_has_one_message(chosen: list[dict[str, Any]]) -> None:
    said = {(row["memory"], row["head"][0]): row["said"] for row in chosen}
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
