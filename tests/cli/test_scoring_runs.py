"""Runs of reward scoring: killed, interrupted, out of room, refused; what was scored is never lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from clha_fast.cli import main as cli
from clha_fast.data import read_records
from clha_fast.rewards.noise import measure_noise
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.rewards.scoring import ScoringError, score_file
from tests.support import forked
from tests.support.reward_models import save_llama, write
from tests.support.tiny import make_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("reward_model"))


@pytest.fixture
def reward_model(folder: str) -> RewardModel:
    return load_reward_model(folder)


def test_destinations(tmp_path: Path, reward_model: RewardModel) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(3))
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        score_file(source, out, reward_model, progress=False)
    assert out.read_text() == "mine"
    out.unlink()
    partial.write_text("left\n")
    with pytest.raises(FileExistsError, match=r"partial: holds an unfinished run; give resume=True"):
        score_file(source, out, reward_model, progress=False)
    with pytest.raises(ValueError, match=r"partial:1: damaged"):
        score_file(source, out, reward_model, resume=True, progress=False)
    assert partial.read_text() == "left\n"
    result = score_file(source, out, reward_model, overwrite=True, progress=False)
    assert not partial.exists()
    assert score_file(source, source, reward_model, overwrite=True, progress=False).records == result.records
    assert source.read_bytes() == out.read_bytes()
    late = tmp_path / "late.jsonl"

    def appear(*_: object) -> None:
        late.write_text("somebody else's")

    hook = reward_model.model.register_forward_hook(appear)
    with pytest.raises(ScoringError, match=r"exists already; .*; (\d+) of \1 responses are scored and kept"):
        score_file(source, late, reward_model, progress=False)
    hook.remove()
    assert late.read_text() == "somebody else's"
    score_file(source, late, reward_model, resume=True, overwrite=True, progress=False)
    assert late.read_bytes() == out.read_bytes()
    with pytest.raises(OSError, match="expected an existing folder"):
        score_file(source, tmp_path / "no" / "out.jsonl", reward_model, progress=False)
    with pytest.raises(OSError, match="got a folder"):
        score_file(source, tmp_path, reward_model, overwrite=True, progress=False)


SLOW_CHILD = """
import sys, time
from clha_fast.rewards.scoring import load_reward_model, score_file
reward_model = load_reward_model(sys.argv[1])
reward_model.model.register_forward_hook(lambda *_: time.sleep(0.05))
score_file(sys.argv[2], sys.argv[3], reward_model, batch_size=2)
"""


def test_killed_and_resumed(tmp_path: Path, folder: str) -> None:
    reward_model = load_reward_model(folder)
    source = write(tmp_path / "in.jsonl", make_rows(40))
    whole = tmp_path / "whole.jsonl"
    total = len(score_file(source, whole, reward_model, batch_size=2, progress=False).records)
    assert total == 40

    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    process = forked.start("train", "-c", SLOW_CHILD, folder, str(source), str(out), out=tmp_path / "said")
    try:
        end = time.monotonic() + 120
        while not partial.exists() or partial.read_bytes().count(b"\n") < 6:
            assert process.poll() is None, "the child ended by itself"
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with open(partial, "ab") as file:  # a kill in the middle of a write leaves half a line
        file.write(b'{"batch": 1, "rewa')
    done = partial.read_bytes().count(b"\n") - 1
    kept = partial.read_bytes()

    with pytest.raises(ValueError, match="batch_size was 2, is 3"):
        score_file(source, out, reward_model, batch_size=3, resume=True, progress=False)
    with pytest.raises(ValueError, match="source changed"):
        score_file(
            write(tmp_path / "b.jsonl", make_rows(39)), out, reward_model, batch_size=2, resume=True, progress=False
        )
    other = load_reward_model(folder)
    with torch.no_grad():
        other.model.score.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"another \(reward_model changed\)"):
        score_file(source, out, other, batch_size=2, resume=True, progress=False)
    lines = kept.split(b"\n")
    batch = {**json.loads(lines[3]), "rewards": [0.5, float("nan")]}
    partial.write_bytes(b"\n".join([*lines[:3], json.dumps(batch).encode(), *lines[4:]]))
    with pytest.raises(ValueError, match=r"partial:4: damaged"):
        score_file(source, out, reward_model, batch_size=2, resume=True, progress=False)
    partial.write_bytes(kept)

    # The same model in another folder is the same model.
    reward_model = load_reward_model(shutil.copytree(folder, tmp_path / "moved"))
    forward = []
    reward_model.model.register_forward_hook(lambda *_: forward.append(1))
    result = score_file(source, out, reward_model, batch_size=2, resume=True, progress=False)
    batches = -(-sum(len(set(record.completions)) for record in result.records) // 2)
    assert result.resumed == 2 * done
    assert len(forward) == batches - done + 2  # and two to see whether padding is read as text
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def command(*words: object) -> int:
    return cli.main(["score", *map(str, words)])


def test_interrupted_from_the_keyboard(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(10))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--reward-model", folder, "--batch-size", 4]
    assert command(source, whole, *options) == 0
    passes = []

    def interrupt(*_: object) -> None:
        passes.append(1)
        if len(passes) == 6:
            signal.raise_signal(signal.SIGINT)

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: interrupt() if isinstance(module, LlamaForSequenceClassification) else None
    )
    # Shells start background jobs, such as a test run, with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command(source, out, *options) == 130
    finally:
        signal.signal(signal.SIGINT, before)
        hook.remove()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("clha-fast score: interrupted; 12 of ")
    assert said.endswith(f"are scored and kept in {out}.partial, --resume goes on")
    assert not out.exists()
    assert command(source, out, *options) == 2
    assert "unfinished run" in capsys.readouterr().err.splitlines()[-1]
    assert command(source, out, *options, "--resume") == 0
    assert "12 responses had been scored before" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


FULL_DISK_CHILD = """
import json, os, resource, sys
from clha_fast.cli import score as cli_score
folder, source, out, *limits = sys.argv[1:]
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    code = cli_score.score([source, out, "--reward-model", folder, "--batch-size", "2", "--resume"])
    there = [os.path.getsize(path) if os.path.exists(path) else -1 for path in (out, out + ".partial")]
    lines = open(out + ".partial").read().count("\\n") if code else 0
    print(json.dumps([code, *there, lines]), flush=True)
"""


def test_full_disk(tmp_path: Path, reward_model: RewardModel, folder: str) -> None:
    """First the journal cannot grow, then the result cannot be written, then there is room."""
    rows = make_rows(8)
    rows[0]["prompt"] = [{"role": "user", "content": "sat", "note": "long " * 2000}]
    source = write(tmp_path / "in.jsonl", rows)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    score_file(source, whole, reward_model, batch_size=2, progress=False)
    room = 1 << 20
    words = (str(word) for word in (folder, source, out, 700, 6000, room))
    done = forked.run("train", "-c", FULL_DISK_CHILD, *words)
    output, errors = done.stdout, done.stderr
    assert done.returncode == 0, errors
    results = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert results[0][:3] == [1, -1, 700]  # half a line at its end
    assert results[1][:2] == [1, -1]
    assert 700 < results[1][2] < 6000
    assert results[2] == [0, whole.stat().st_size, -1, 0]
    assert out.read_bytes() == whole.read_bytes()
    said = [line for line in errors.splitlines() if "could not be written" in line]
    total = sum(len(set(row["completions"])) for row in rows)
    kept = [2 * (results[0][3] - 1), total]  # without the header
    assert 0 < kept[0] < kept[1]
    for line, count in zip(said, kept, strict=True):
        assert f"; {count} of {total} responses are scored and kept in {out}.partial, --resume goes on" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_command(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(20))
    out, plot = tmp_path / "out.jsonl", tmp_path / "gaps.png"
    options = ["--reward-model", folder, "--reward-margin", 0.1, "--reward-floor", 0.6, "--rank-by-reward"]
    assert command(source, out, *options, "--plot", plot, "--device", "cpu") == 0
    text = capsys.readouterr().out
    before = read_records(source)
    scored = score_file(source, tmp_path / "api.jsonl", load_reward_model(folder), progress=False).records
    total = measure_noise(scored, 0.1, 0.6).total
    assert all((total.inside_margin, total.reversed_outside, total.closed_gates))
    row = next(line for line in text.splitlines() if line.startswith("all")).split()
    assert row[1:3] == ["20", str(sum(len(r.completions) * (len(r.completions) - 1) // 2 for r in before))]
    shares = [100 * part / total.pairs for part in (total.reversed, total.inside_margin, total.reversed_outside)]
    assert row[3:] == [f"{share:.1f}%" for share in [*shares, 100 * total.closed_gates / 20]]
    assert [line.split()[0] for line in text.splitlines() if line[:1].isdigit()] == ["2", "3", "4", "5"]
    assert "no pair is reversed" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert measure_noise(read_records(out)).total.reversed == 0

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(source, out, *options, "--overwrite", "--plot", tmp_path / "none.png") == 0
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if "clha-fast[plot]" in line]) == 1
    assert not (tmp_path / "none.png").exists()


def test_command_refuses_in_one_sentence(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", make_rows(2)), tmp_path / "out.jsonl"
    cases = {
        "in.jsonl.gone": [tmp_path / "in.jsonl.gone", out, "--reward-model", folder],
        "got './gone'": [source, out, "--reward-model", "./gone"],
        "--batch-size": [source, out, "--reward-model", folder, "--batch-size", 0],
        "--max-length": [source, out, "--reward-model", folder, "--max-length", -4],
        "positions": [source, out, "--reward-model", folder, "--max-length", 97],
        "--reward-margin": [source, out, "--reward-model", folder, "--reward-margin", -1],
        "--reward-floor": [source, out, "--reward-model", folder, "--reward-floor", "nan"],
        "ends in .png": [source, out, "--reward-model", folder, "--plot", "gaps.pdf"],
        "existing folder": [source, out, "--reward-model", folder, "--plot", tmp_path / "no" / "gaps.png"],
        "--format: expected": [source, out, "--reward-model", folder, "--format", "xml"],
        "--label: expected": [source, out, "--reward-model", folder, "--label", 1],
        "exists already": [source, source, "--reward-model", folder],
    }
    for part, words in cases.items():
        assert command(*words) == 2, part
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clha-fast score: ")]
        assert len(said) == 1
        assert part in said[0]
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_columns_named_like_options_are_said_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [{"reward_model": 1, "batch_size": 2, "max_length": 3, "text": "a"}])
    assert command("--reward-model", "x", file, tmp_path / "out.jsonl") != 0
    said = capsys.readouterr().err
    for column in ("reward_model", "batch_size", "max_length"):
        assert column in said
    assert "--batch-size" not in said
    assert "--max-length" not in said
