"""The plugin for axolotl: its own command for two steps, against a bare loop; what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import clha_fast
from clha_fast.data import read_records
from clha_fast.hf import RankedCollator, RankedDataset
from clha_fast.objectives import Objective
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer

pytest.importorskip("axolotl", reason="axolotl is not installed")

PROMPTS = 4
PAPER = dataclasses.replace(clha_fast.CLHAOptions.preset("paper"), reduction="distance_mean")


@pytest.fixture(autouse=True)
def nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl tells its makers of every process that imports its plugins, this one and its children, unless told."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")


def configuration(folder: Path, **changes: Any) -> Path:
    """All prompts are one step, in two micro-batches whose pairs differ in number."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model(len(tokenizer)).save_pretrained(folder / "model")
    rows = make_rows(PROMPTS)
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "base_model": str(folder / "model"),
        "plugins": ["clha_fast.integrations.axolotl.RankedPlugin"],
        "datasets": [{"path": str(folder / "ranked.jsonl")}],
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": 2,
        "learning_rate": 0.1,
        "optimizer": "sgd",  # Adam's steps are as large where gradients are rounding alone
        "lr_scheduler": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "pad_to_sequence_len": False,
        "val_set_size": 0,
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # which is YAML too
    return path


def train(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "axolotl.cli.train", str(path)]
    return subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "given", "objective"),
    [
        # CLHA's means are over all pairs of a step at a distance, which no mean over micro-batches is.
        ("padded", {"name": "clha", "preset": "paper", "reduction": "distance_mean"}, PAPER),
        ("shared", {"name": "simpo", "beta": 2.5}, clha_fast.SimPOOptions(beta=2.5)),
    ],
)
def test_two_steps_are_those_of_a_bare_loop(
    layout: str, given: dict[str, Any], objective: Objective, tmp_path: Path
) -> None:
    done = train(configuration(tmp_path, clha_layout=layout, clha_objective=given))
    assert done.returncode == 0, done.stderr[-3000:]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    collator = RankedCollator(make_tokenizer(), objective, max_length=128)
    dataset = RankedDataset(read_records(tmp_path / "ranked.jsonl"), collator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with clha_fast.attach(model.train(), objective):
        for _ in range(2):
            loss = model(**collator([dataset[k] for k in range(PROMPTS)])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [float(line["loss"]) for line in state["log_history"] if "loss" in line]
    assert logged == pytest.approx(losses, abs=1e-3)
    assert not [name for line in state["log_history"] for name in line if "ppl" in name]
    trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=0, atol=2e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packing": ({"sample_packing": True}, "sample_packing: expected none beside RankedPlugin"),
    "objective": ({"clha_objective": "simpoo"}, "objective: expected one of .*got 'simpoo'"),
    "parallel": ({"context_parallel_size": 2}, "context_parallel_size: expected 1"),
    "type": ({"datasets": [{"path": "ranked.jsonl", "type": "alpaca"}]}, "datasets: expected path alone .*got type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    from axolotl.utils.dict import DictDefault

    from clha_fast.integrations.axolotl import RankedPlugin

    settings = json.loads(configuration(tmp_path, **changes).read_text(encoding="utf-8"))
    cfg = DictDefault({"clha_layout": "padded", "tokenizer_config": settings["base_model"], **settings})
    with pytest.raises(ValueError, match=message):
        RankedPlugin().load_datasets(cfg)
