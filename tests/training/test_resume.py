"""Checkpoints: resume is bitwise, a failed write loses nothing, a folder holds one run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from clha_fast.experiments.folder import RunFolderError, check_folder, claim_folder
from clha_fast.files import WRITING, CheckpointError, RunIdentity, publish, rotate, write_json, writing
from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer
from clha_fast.training.trainer import CLHATrainer
from tests.support import forked
from tests.support.power_cuts import PowerCut, dropout_model, trainer, weights
from tests.support.preferences import keyword_rows
from tests.support.reward_models import gpt2
from tests.support.tiny import make_tokenizer


# 9 prompts, 2 a batch: 5 batches an epoch. A cut at 6 is inside an epoch; with 5 steps a save, at 5, between two.
@pytest.mark.parametrize(
    ("cut", "changes"),
    [
        (6, {}),
        (7, {}),
        (5, {"save_steps": 5, "eval_steps": 5}),
        (6, {"gradient_accumulation_steps": 2, "normalizer": "global"}),
    ],
    ids=["in an epoch", "after more steps", "between epochs", "accumulation"],
)
def test_resume_is_bitwise(tmp_path: Path, cut: int, changes: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    half = trainer(tmp_path / "half", cut=cut, **changes)
    with pytest.raises(PowerCut):
        half.train()
    torch.manual_seed(1234)  # the new process has another random state
    rest = trainer(tmp_path / "half", **changes)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == whole.state.global_step == 12
    expected = weights(whole.model)
    assert not torch.equal(expected["lm_head.weight"], weights(half.model)["lm_head.weight"])
    for name, tensor in weights(rest.model).items():
        assert torch.equal(tensor, expected[name]), name

    def losses(run: CLHATrainer) -> dict[int, Any]:
        keep = ("eval_loss", "eval_kendall_tau", "eval_rewards/accuracies")
        return {line["step"]: [line[k] for k in keep] for line in run.state.log_history if "eval_loss" in line}

    assert losses(rest) == losses(whole)


@pytest.mark.parametrize(
    "changes",
    [{"eval_steps": 1}, {"eval_strategy": "epoch", "eval_samples": 1, "eval_sample_temperature": 1.0}],
    ids=["steps", "epochs"],
)
def test_training_is_what_it_is_without_evaluation(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A checkpoint of a step comes before the evaluation of its epoch, which a resumed run does not make again."""
    settings = {"max_steps": 6, "save_steps": 5, "eval_sample_tokens": 2}
    without = trainer(tmp_path / "without", **{**settings, "eval_strategy": "no"})
    without.train()
    with_it = trainer(tmp_path / "with", **settings, **changes)
    with_it.train()
    rest = trainer(tmp_path / "with", **settings, **changes)
    rest.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-5"))
    expected = weights(without.model)
    for run in (with_it, rest):
        assert run.state.global_step == 6
        for name, tensor in weights(run.model).items():
            assert torch.equal(tensor, expected[name]), name


def test_a_reward_model_trains_as_it_does_without_evaluation(tmp_path: Path) -> None:
    found = []
    for strategy in ("no", "epoch"):
        torch.manual_seed(0)
        run = RewardTrainer(
            gpt2(),
            RewardConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                max_steps=5,
                per_device_train_batch_size=2,
                eval_strategy=strategy,
                save_strategy="no",
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=keyword_rows(4),
            eval_dataset=keyword_rows(3, seed=1),
            processing_class=make_tokenizer(),
        )
        run.train()
        found.append(weights(run.model))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_checkpoints_are_safetensors_and_rotated(tmp_path: Path) -> None:
    run = trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    run.train()
    names = sorted(name for name in os.listdir(tmp_path) if name != "runs")
    assert 1 <= len(names) <= 2
    assert "checkpoint-12" in names
    assert all(name.startswith("checkpoint-") for name in names)
    best = run.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{run.state.best_global_step}")
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    for name in names:
        files = os.listdir(tmp_path / name)
        assert {"model.safetensors", "tokenizer.json", "optimizer.pt", "rng_state.pth"} <= set(files)
    run.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name])
    assert not (tmp_path / WRITING).exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.support.power_cuts import trainer
from transformers import TrainerCallback
from clha_fast.files import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

class Fill(TrainerCallback):
    def __init__(self, limit):
        self.limit = limit

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            # No file may grow beyond this: the same errors as from a full disk, at weights or at optimizer state.
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, unlimited[1]))

for what, limit in ("weights", 20_000), ("optimizer", 200_000):
    run = trainer(Path(sys.argv[1], what))
    run.add_callback(Fill(limit))
    try:
        run.train()
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        print("CheckpointError:", error)
"""


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    size = sum(p.numel() * 4 for p in dropout_model().parameters())
    assert 20_000 < size < 200_000 < 2 * size, "the limits of the script stand between weights and optimizer state"
    done = forked.run("train", "-c", FULL_DISK, str(tmp_path))
    assert done.returncode == 0, done.stderr
    sentences = [line for line in done.stdout.splitlines() if line.startswith("CheckpointError:")]
    whole = trainer(tmp_path / "whole")
    whole.train()
    for what, sentence in zip(("weights", "optimizer"), sentences, strict=True):
        last = tmp_path / what / "checkpoint-3"
        assert sentence.startswith("CheckpointError: checkpoint-6 could not be written (")
        assert sentence.endswith(f"{last} is complete and intact, resume from it")
        assert sorted(os.listdir(tmp_path / what)) == ["checkpoint-3"]
        rest = trainer(tmp_path / what)
        rest.train(resume_from_checkpoint=True)
        for name, tensor in weights(rest.model).items():
            assert torch.equal(tensor, whole.model.state_dict()[name]), (what, name)


def test_failure_before_any_checkpoint_says_so(tmp_path: Path) -> None:
    expected = r"the model could not be written \(No space left on device; .* MiB are free there\); no earlier"
    with pytest.raises(CheckpointError, match=expected), writing(str(tmp_path), "the model"):
        raise OSError("No space left on device")
    assert os.listdir(tmp_path) == []


def test_saving_the_model_replaces_files_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        run.model.lm_head.weight.add_(1.0)

    def full(folder: str) -> None:
        assert (Path(folder) / "model.safetensors").exists(), "the weights are written before the tokenizer"
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run.processing_class, "save_pretrained", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    run.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_publish_replaces_a_folder_and_rotation_keeps_best_and_newest(tmp_path: Path) -> None:
    for step in (2, 10, 4, 8):
        os.makedirs(tmp_path / f"checkpoint-{step}")
    os.makedirs(tmp_path / "checkpoint-notes")
    rotate(str(tmp_path), None, None)
    rotate(str(tmp_path), 0, None)
    assert len(os.listdir(tmp_path)) == 5
    rotate(str(tmp_path), 2, str(tmp_path / "checkpoint-2"))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-2", "checkpoint-notes"]
    rotate(str(tmp_path), 1, None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-notes"]
    with writing(str(tmp_path), "it") as staging:
        new = Path(staging) / "checkpoint-10"
        new.mkdir()
        (new / "file").write_text("new")
        publish(str(new), str(tmp_path / "checkpoint-10"))
    assert (tmp_path / "checkpoint-10" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-notes"]
    with pytest.raises(CheckpointError), writing(str(tmp_path), "it") as staging:
        publish(os.path.join(staging, "missing"), str(tmp_path / "checkpoint-10"))
    assert (tmp_path / "checkpoint-10" / "file").read_text() == "new"


def test_rotation_keeps_what_was_just_written(tmp_path: Path) -> None:
    """Resumed from step 3 with another interval; checkpoints of the abandoned steps lie there with higher numbers."""
    trainer(tmp_path, max_steps=9, save_total_limit=None).train()
    again = trainer(tmp_path, max_steps=5, save_steps=5, eval_steps=5, save_total_limit=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    names = [name for name in os.listdir(tmp_path) if name.startswith("checkpoint-")]
    assert sorted(names) == ["checkpoint-5", "checkpoint-9"]


def test_json_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(str(path), {"a": 1})
    with pytest.raises(TypeError):
        write_json(str(path), {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_folder_holds_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    mine = RunIdentity({"seed": 1, "margin": 3.0}, {"train_file": "aa"})
    other = RunIdentity({"seed": 2, "margin": 3.0}, {"train_file": "bb"})
    assert check_folder(str(folder), mine) is None
    assert not folder.exists()
    claim_folder(str(folder), mine)
    assert check_folder(str(folder), mine, resume=True) is None  # stopped before its first checkpoint
    for step in (5, 10):
        (folder / f"checkpoint-{step}").mkdir()
    with pytest.raises(RunFolderError, match="holds a run already; give resume=True, overwrite=True or another folder"):
        check_folder(str(folder), mine)
    assert check_folder(str(folder), mine, resume=True) == str(folder / "checkpoint-10")
    with pytest.raises(RunFolderError, match="seed was 1, is 2; train_file changed"):
        check_folder(str(folder), other, resume=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "metrics.json").write_text("{}")
    assert check_folder(str(folder), other, overwrite=True) is None
    claim_folder(str(folder), other, owned=["metrics.json"])
    assert sorted(os.listdir(folder)) == ["notes.txt", "run.json"]
    assert json.loads((folder / "run.json").read_text()) == other.as_dict()


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    identity = RunIdentity({}, {})
    for flags in ({}, {"resume": True}):
        with pytest.raises(RunFolderError, match=r"1 entries \(thesis.tex\) that are no run of this program"):
            check_folder(str(tmp_path), identity, **flags)
    assert check_folder(str(tmp_path), identity, overwrite=True) is None
    claim_folder(str(tmp_path), identity)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
