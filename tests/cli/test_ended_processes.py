"""Training in two processes of which one ends: each says a sentence, its own reason or that it waited for the other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from clha_fast.processes import waited_for_another
from tests.support import forked
from tests.support.command_line import command as train_command

ENDS = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from clha_fast.cli import main as cli
from clha_fast.training.checkpoints import CheckpointingTrainer
how, *words = sys.argv[1:]
place, rank = ("_inner_training_loop" if how == "early" else "training_step"), os.environ["RANK"]
own = getattr(CheckpointingTrainer, place)

def ends(self, *args, **kwargs):
    if rank == "1" and (how == "early" or self.state.global_step == 2):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return own(self, *args, **kwargs)
        raise ValueError("learning_rate: expected another")
    return own(self, *args, **kwargs)

setattr(CheckpointingTrainer, place, ends)
status = cli.main(words)
sys.stderr.flush()
os._exit(status)
"""

STOPS = """
import types
import torch.distributed as dist
from clha_fast.training.stopping import StopAsked
dist.init_process_group("gloo")
ends = []
for asked in (2, None, 1, 4):
    stop, args = StopAsked(), types.SimpleNamespace(output_dir="run")
    for step in range(1, 7):
        dist.barrier()
        stop.asked |= step == asked and dist.get_rank() == 1
        control = types.SimpleNamespace(should_training_stop=False)
        stop.on_step_end(args, types.SimpleNamespace(global_step=step, max_steps=9), control)
        if control.should_training_stop:
            break
    ends.append(step)
print(*ends)
"""

REFUSED = """
import os, sys
import torch.distributed as dist
from clha_fast.cli import main as cli
if sys.argv[1] == "torch's":
    dist.init_process_group("gloo")
# Such as are found before seconds of imports, and once more by the next command.
for words in 2 * ("train --nonsense 3", "demo --seeds 3", "table2", f"train --own-{os.environ['RANK']} 1"):
    assert cli.main(words.split()) == 2
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


def start(folder: Path, command: str, how: str, **given: Any) -> tuple[list[int], list[str], str]:
    """(exit status of each process, what each printed as errors, the command's name)."""
    settings = {"max_steps": 6, "ddp_backend": "gloo", "ddp_timeout": 60, "eval_fraction": 0, "save_steps": 2, **given}
    words = [*command.split()[:-1], *train_command(folder, **settings)]
    outs = [folder / f"process-{rank}" for rank in (0, 1)]
    programs = [
        forked.start("train", "-c", ENDS, how, *words, out=out, CUDA_VISIBLE_DEVICES="", **meeting)
        for out, meeting in zip(outs, forked._meeting(2), strict=True)
    ]
    statuses = [program.wait(120) for program in programs]
    return statuses, [Path(f"{out}.err").read_text() for out in outs], words[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "how", "kept"),
    [
        ("train", "kill", "checkpoint-2 is complete and intact, resume from it"),
        ("train", "error", "checkpoint-2 is complete and intact, resume from it"),
        ("train", "early", "no earlier checkpoint exists"),
        ("reward-model train", "error", "no earlier checkpoint exists"),
    ],
)
def test_one_sentence_each(tmp_path: Path, command: str, how: str, kept: str) -> None:
    strategy = "steps" if "intact" in kept else "no"
    statuses, (waited, reason), name = start(tmp_path, command, how, save_strategy=strategy)
    assert statuses == [1, -signal.SIGKILL if how == "kill" else 2], waited
    said = f"clha-fast {name}: process 0 of 2 waited for another that has ended; what that one, or the "
    assert said in waited, waited
    assert kept in waited
    assert "Traceback" not in waited + reason
    if how != "kill":
        assert "learning_rate: expected another" in reason


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    """One alone is interrupted; the other would wait for it."""
    statuses, (first, second), _ = start(tmp_path, "train", "interrupt")
    assert statuses == [130, 130]
    assert "interrupted after step 4, which is saved; the same command with --resume continues" in first
    assert "interrupted" not in second
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()


def test_each_run_of_a_folder_stops_for_itself(tmp_path: Path) -> None:
    outs = [tmp_path / f"process-{rank}" for rank in (0, 1)]
    programs = [
        forked.start("train", "-c", STOPS, out=out, CUDA_VISIBLE_DEVICES="", **meeting)
        for out, meeting in zip(outs, forked._meeting(2), strict=True)
    ]
    assert [program.wait(60) for program in programs] == [0, 0], Path(f"{outs[0]}.err").read_text()
    assert [Path(f"{out}.out").read_text().split() for out in outs] == [["3", "6", "2", "5"]] * 2


def test_alone_no_error_is_anothers() -> None:
    assert waited_for_another(RuntimeError("Connection closed by peer")) == ""


@pytest.mark.parametrize("store", ["the launcher's", "torch's"])
def test_what_all_find_out_is_said_once(tmp_path: Path, store: str) -> None:
    first = forked._meeting(2)[0]
    agents: Any = {}
    if store == "the launcher's":
        kept = TCPStore(first["MASTER_ADDR"], int(first["MASTER_PORT"]), is_master=True, wait_for_workers=False)
        agents = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(kept.port)}
    done = forked.run("bare", "-c", REFUSED, store, processes=2, CUDA_VISIBLE_DEVICES="", **agents)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("clha-fast ")]
    assert [said.count(line) for line in said] == [2] * 10, said
    assert [sum(f"own_{rank}" in line for line in said) for rank in (0, 1)] == [2, 2]
