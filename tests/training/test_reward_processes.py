"""A reward model trained in two processes is the one that one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.helpers import ROOT
from tests.support.reward_models import llama

SCRIPT = """
import sys
import torch
from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer
from tests.support.preferences import keyword_rows
from tests.support.reward_models import llama
from tests.support.tiny import make_tokenizer

folder, out, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
args = RewardConfig(
    output_dir=folder, use_cpu=True, max_steps=4, per_device_train_batch_size=4 // world, learning_rate=1e-3,
    gradient_accumulation_steps=2, per_device_eval_batch_size=2, logging_steps=2, save_strategy="no", disable_tqdm=True,
    report_to="none", dataloader_pin_memory=False, lr_scheduler_type="constant", layout=sys.argv[4],
)
trainer = RewardTrainer(
    llama(),
    args,
    train_dataset=keyword_rows(13),
    eval_dataset=keyword_rows(5, seed=1),
    processing_class=make_tokenizer(),
)
before = trainer.evaluate()
trainer.train()
keep = ("loss", "rewards/accuracies", "rewards/margins")
found = {
    "before": [before[f"eval_{name}"] for name in keep],
    "after": [trainer.evaluate()[f"eval_{name}"] for name in keep],
    "log": [[line[name] for name in keep] for line in trainer.state.log_history if "loss" in line],
    "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
}
if trainer.is_world_process_zero():
    torch.save(found, out)
"""


def start(folder: Path, processes: int, layout: str = "padded") -> dict[str, Any]:
    script, out = folder / "script.py", folder / f"{processes}.pt"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(processes), str(script), str(folder / f"run{processes}"), str(out), str(processes), layout]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = torch.load(out)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_two_processes_are_one(tmp_path: Path, layout: str) -> None:
    """Steps of 8, 5, 8 and 5 prompts, the last of which one process has; one of five held-out ones fills the last batch
    up; one process alone has padded rows."""
    one, two = start(tmp_path, 1), start(tmp_path, 2, layout)
    for name in ("before", "after"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert two["log"] == [pytest.approx(line, rel=1e-4, abs=1e-4) for line in one["log"]]
    begin = llama().state_dict()
    for name, weight in one["weights"].items():
        moved = float((weight - begin[name]).norm())
        assert float((two["weights"][name] - weight).norm()) < 1e-3 * moved, name
