"""`generate` and `score` in two processes: the bytes of one, whoever is killed, and one sentence where they fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clha_fast.cli import main as cli
from clha_fast.data import read_records
from clha_fast.files import Journal, RunIdentity, check_destination, journal_parts
from clha_fast.generation import GenerationSettings, generate_answers, load_backend
from clha_fast.processes import ALONE, Processes, join
from clha_fast.rewards.scoring import load_reward_model, score_file
from tests.support import forked
from tests.support.helpers import ROOT
from tests.support.reward_models import TOKENIZER, save_llama, spread, write
from tests.support.shared_runs import COMMANDS, REFUSED
from tests.support.tiny import make_model, make_rows

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
ACCELERATE += ["--num_processes", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spread(make_model(len(TOKENIZER))).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "reward").mkdir()
    save_llama(tmp_path / "reward")
    write(tmp_path / "in.jsonl", make_rows(21))
    return tmp_path


def launch(launcher: list[str] | None, *words: str) -> subprocess.CompletedProcess[str] | forked.Done:
    """None: two processes with the environment that a launcher would give them."""
    if launcher is None:
        return forked.run(
            "train", "tests.support.shared_runs", *words, processes=2, timeout=400, CUDA_VISIBLE_DEVICES=""
        )
    command = [sys.executable, "-W", "ignore", "-m", *launcher, "-m", "tests.support.shared_runs", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=ENVIRONMENT, check=False)


@pytest.mark.parametrize(
    "launcher", [None, *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in (TORCHRUN, ACCELERATE))]
)
def test_two_processes_write_the_bytes_of_one(folder: Path, launcher: list[str] | None) -> None:
    done = launch(launcher, "all", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    for name in COMMANDS:
        assert (folder / f"{name}.shared").read_bytes() == (folder / f"{name}.alone").read_bytes() != b"", name
        assert done.stdout.count(f"written       {folder / name}.shared") == 1, "one process prints"
    assert "had been" not in done.stdout
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == {"statuses": [0] * len(COMMANDS) + [2] * len(REFUSED), "left": [], **first}
    assert first["other run"].startswith(
        "processes: expected the same run in all, got another in process 1 than in process 0 (batch_size was 2, is 3)"
    )
    for text in REFUSED:
        said = [line for line in done.stderr.splitlines() if line.startswith("clha-fast ") and text in line]
        assert len(said) == 1, (text, done.stderr)
    assert not (folder / "no").exists()


# By default test_scoring_runs.py kills a process that is alone, and `test_journals_of_several_processes` reads two.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "killed", "again"), [("generate", [1], 1), ("score", [0, 1], 2)])
def test_killed_and_resumed(folder: Path, kind: str, killed: list[int], again: int) -> None:
    """By a launcher that leaves the others alone, and in another number of processes."""
    out, whole = folder / "out.jsonl", folder / "whole.jsonl"
    records = read_records(folder / "in.jsonl")
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0)
    backend, reward_model = load_backend(str(folder / "model")), load_reward_model(str(folder / "reward"))
    if kind == "generate":
        generate_answers(records, backend, whole, settings, batch_size=2, progress=False)
    else:
        score_file(records, whole, reward_model, batch_size=2, progress=False)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.support.shared_runs", kind, str(folder), str(out)]
    started = []
    parts = [Path(f"{out}.partial"), Path(f"{out}.partial.1")]
    try:
        for rank in "01":
            environment = {**meeting, "RANK": rank, "LOCAL_RANK": rank}
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        end = time.monotonic() + 200
        while not all(part.exists() and part.read_bytes().count(b"\n") >= 3 for part in parts):
            assert [process.poll() for process in started] == [None, None], "one ended by itself"
            assert time.monotonic() < end
            time.sleep(0.01)
        for rank in killed:
            started[rank].kill()
            assert started[rank].wait() == -signal.SIGKILL
        if killed == [1]:  # the other one does its share, and then says why the run is not done
            _, said = started[0].communicate(timeout=200)
            assert started[0].returncode == 1
            assert (
                "process 0 of 2 waited for another that has ended; what that one, or the launcher, printed says why; 1"
                in said
            )
            assert f" of 21 prompts are answered and kept in {out}.partial, resume=True goes on" in said
    finally:
        for process in started:
            process.kill()
            process.communicate()
    with open(parts[1], "ab") as file:  # a kill in the middle of a write leaves half a line
        file.write(b'{"batch": 9, "answ')
    kept = sum(part.read_bytes().count(b"\n") - 1 for part in parts)
    assert not out.exists()
    with pytest.raises(FileExistsError, match=r"out.jsonl.partial: holds an unfinished run"):
        check_destination(out)
    parts[0].rename(folder / "moved")
    with pytest.raises(FileExistsError, match=r"out.jsonl.partial.1: holds an unfinished run"):
        check_destination(out)
    (folder / "moved").rename(parts[0])

    if again == 2:
        done = launch(TORCHRUN, kind, str(folder), str(out))
        assert done.returncode == 0, done.stderr[-4000:]
    else:
        found = generate_answers(records, backend, out, settings, batch_size=2, resume=True, progress=False)
        # 21 prompts are ten batches of two and one of one.
        assert found.resumed in (2 * kept, 2 * kept - 1)
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in folder.glob("out*")] == ["out.jsonl"]


@pytest.mark.slow
def test_one_that_fails_ends_all(folder: Path) -> None:
    done = launch(TORCHRUN, "generate", str(folder), str(folder / "out.jsonl"), "failing")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("clha-fast ")]
    assert len(said) == 1, done.stderr
    assert "do not fit in memory; 4 of 21 prompts are answered and kept in" in said[0]
    assert said[0].endswith("out.jsonl.partial.1, resume=True goes on")


def journal(path: Path, part: int = 0, resume: bool = True, **settings: int) -> Journal:
    words = {"key": "values", "items": "items", "done": "done"}
    identity = RunIdentity(settings, {})
    batches = [[0, 1], [2], [3]]
    return Journal(str(path), identity, batches, resume, valid=lambda value: True, part=part, **words)


def test_journals_of_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "[1].partial"  # a name that is a pattern, too
    (tmp_path / "1.partial.3").write_text("somebody else's")
    (tmp_path / "[1].partial.old").write_text("somebody else's")
    with journal(path) as first, journal(path, 1) as second, journal(path, 2):
        first.add(0, ["a", "b"])
        second.add(2, ["d"])
    # One that did nothing leaves nothing.
    assert journal_parts(str(path)) == [str(path), f"{path}.1"]
    for part in range(3):
        again = journal(path, part)
        assert (again.finished, again.values) == ({0, 2}, {0: "a", 1: "b", 3: "d"})
        assert ALONE.share(again) == [1]
    with pytest.raises(ValueError, match=r"expected the run that .*partial holds, got another \(size was the def"):
        journal(path, size=2)
    with journal(path, 1) as again:  # goes on behind its own lines
        again.add(1, ["c"])
    assert path.read_bytes().count(b"\n") == 2
    assert Path(f"{path}.1").read_bytes().count(b"\n") == 3
    assert ALONE.share(journal(path)) == []
    assert ALONE.share(journal(path, resume=False, size=2)) == [0, 1, 2]
    assert sorted(os.listdir(tmp_path)) == ["1.partial.3", "[1].partial.old"]


def test_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["generate", "model", "prompts", str(tmp_path / "out")]) == 2
    assert "MASTER_ADDR expected, but not set" in capsys.readouterr().err
    # Somebody else's variable, without a rank, is no launcher.
    monkeypatch.delenv("RANK")
    assert join() is ALONE


def test_a_device_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for device in ("auto", "cuda", "cuda:0", "cpu"):
        Processes(3, 4, 1).choose_device(device)
    assert chosen == [1, 1]
    ALONE.choose_device("auto")
    assert chosen == [1, 1]
    with pytest.raises(ValueError, match="device: expected a cuda device a process, got process 2 of a machine with 2"):
        Processes(2, 4, 2).choose_device("auto")
