"""The examples run as they are written, and learn: every epoch sees the same prompts, the last one does better."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "epoch"),
    [
        (["examples/bare_loop.py"], 4),
        (["examples/accelerate_loop.py", "--cpu"], 4),
        ([*TORCHRUN, "examples/accelerate_loop.py", "--cpu"], 2),
        (["examples/trainer.py"], 4),
        (["examples/own_objective.py"], 4),
    ],
    ids=["bare", "accelerate", "accelerate, two processes", "trainer", "own objective"],
)
def test_example(command: list[str], epoch: int, tmp_path: Path) -> None:
    if command[-1].endswith("trainer.py"):
        command = [*command, "--output-dir", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, "--steps", "12"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"^step \d+ loss (\S+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 12
    assert sum(losses[-epoch:]) < 0.9 * sum(losses[:epoch])


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Conversations, for which the prompt is no text, and a model with its tokenizer from a folder."""
    rows = make_rows(8)
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--steps", "1"]


def run_here(monkeypatch: pytest.MonkeyPatch, script: str, *words: str) -> None:
    """An example as a program in this process, for another one would import torch again; without the interpreter."""
    path = str(ROOT / "examples" / script)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", [path, *words])
    runpy.run_path(path, run_name="__main__")


def test_the_bare_loop_takes_a_model_and_data(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch, "bare_loop.py", *given)
    assert re.search(r"^step \d+ loss ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bare_loop", "trainer", "own_objective", "accelerate_loop"])
def test_example_takes_a_model_and_data(script: str, given: list[str], tmp_path: Path) -> None:
    command = [sys.executable, f"examples/{script}.py", *given]
    command += {"trainer": ["--output-dir", str(tmp_path / "run")], "accelerate_loop": ["--cpu"]}.get(script, [])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^step \d+ loss ", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_fsdp2_loop_is_the_same_in_two_processes(tmp_path: Path) -> None:
    """On the demonstration records; losses of every step and held-out metrics."""
    records = (ROOT / "clha_fast" / "demo" / "ranked_demo.jsonl").read_text("utf-8").splitlines(keepends=True)
    data = str(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text("".join(records[:16]), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    results = []
    for processes in ("1", "2"):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, *TORCHRUN[:-1], processes, "examples/fsdp2_loop.py", "--cpu", "--steps", "3"]
        command += ["--train-file", data, "--eval-file", data, "--write", str(out), "--dtype", "float64"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert max(one["losses"]) > 0
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)  # the losses are kept in float32
    for part in ("before", "after"):
        assert two[part] == pytest.approx(one[part], rel=1e-5), part


def test_the_long_run_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan comes first; what does not fit is not loaded."""
    pytest.importorskip("peft")
    make_model(300).save_pretrained(tmp_path / "model")
    sizes = ["--candidates", "4", "--prompt", "24", "--response", "8", "--steps", "6", "--lora-rank", "2"]
    sizes += ["--device", "cpu"]

    def run(*words: str) -> tuple[str | int | None, str, str]:
        with pytest.raises(SystemExit) as end:
            run_here(monkeypatch, "long_131072.py", "--model", str(tmp_path / "model"), *sizes, *words)
        return end.value.code, *capsys.readouterr()

    status, out, _ = run("--dtype", "float32", "--learning-rate", "0.01")
    assert status == 0
    plan, steps = out.split("step 0", 1)
    assert "32 scored tokens, 56 run" in plan
    assert re.search(r"^at the most +0\.\d\d GiB$", plan, re.MULTILINE)
    losses = [float(value) for value in re.findall(r"loss (\S+),", steps)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    status, out, error = run("--memory", "0.00001")
    assert status == 2
    assert "at the most" in out
    assert "step" not in out
    assert re.search(r"^--memory: expected at least the plan's 0\.\d\d GiB, got 0\.00 GiB", error, re.MULTILINE)
