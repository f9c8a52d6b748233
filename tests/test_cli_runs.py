"""Runs from the command line that end before they begin, hold nothing out, or cut what they read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import command, one_sentence

from clha_fast import cli


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = command(tmp_path, "--resume", max_steps=1)
    assert cli.main(words) == 2
    expected = f"clha-fast train: resume: expected a folder that holds a run, got {folder} (not there)\n"
    assert one_sentence(capsys) == expected
    folder.mkdir()
    assert cli.main(words) == 2
    assert f"got {folder} (empty)" in one_sentence(capsys)
    (folder / "notes.txt").write_text("")
    assert cli.main(words) == 2
    assert f"got {folder} with 1 entries (notes.txt) that are no run of this program" in one_sentence(capsys)
    (folder / "notes.txt").unlink()
    folder.rmdir()
    assert cli.main(command(tmp_path, max_steps=1)) == 0
    shutil.rmtree(folder / "checkpoint-1")
    capsys.readouterr()
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert f"{folder}, whose run has no checkpoint yet: training starts from the beginning" in out
    assert "step 1/1" in out


def test_training_without_a_held_out_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, eval_fraction=0, max_steps=2)) == 0
    out = capsys.readouterr().out
    assert "training  16 prompts" in out
    assert "held out  no held-out set" in out
    assert "no held-out set: not evaluated" in out
    assert "ranking accuracy" not in out
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (found["before"], found["after"]) == ({}, {})
    assert [line["step"] for line in found["log"] if "loss" in line] == [2]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert cli.main(command(tmp_path, "--resume", eval_fraction=0, max_steps=2)) == 0


def test_the_header_says_what_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, max_steps=1, max_length=4)) == 0
    lines = capsys.readouterr().out.splitlines()
    cut = [line for line in lines if "; cut to the length limits: prompts " in line]
    assert [line.split()[0] for line in cut] == ["training", "held"]
    assert "prompts 9 (100%), responses 29 (100%)" in cut[0]
