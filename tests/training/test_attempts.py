"""`auto_find_batch_size`: an attempt that ran out of memory leaves nothing in the one that follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clha_fast.data.prompts import Prompted, PromptRecord
from clha_fast.training import samples
from clha_fast.training.config import CLHAConfig
from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from clha_fast.training.samples import SAMPLES_FILE
from clha_fast.training.trainer import CLHATrainer
from tests.support.power_cuts import CutAfter, PowerCut
from tests.support.preferences import keyword_rows
from tests.support.reward_models import llama
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
KINDS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "ranked": (CLHATrainer, CLHAConfig, {}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "rollout": (
        RolloutTrainer,
        RolloutConfig,
        {"rollout_steps": 2, "answers_per_prompt": 2, "max_completion_length": 4, "per_device_eval_batch_size": 64},
    ),
}


def lengths(records: Sequence[Prompted], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    return [[float(len(text)) for text in texts] for texts in answers]


def trainer(folder: Path, kind: str, fails_at: int | None = None, callbacks: Any = (), **changes: Any) -> Any:
    """One whose call `fails_at` of the loss finds no memory, and which keeps the prompts of every batch."""
    made, config, more = KINDS[kind]

    class Failing(made):  # type: ignore[misc]
        calls = 0
        sizes: list[int]

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            self.calls += 1
            if self.calls == fails_at:
                self.sizes = []
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.sizes.append(len(inputs["pairs_per_prompt" if kind == "reward" else "candidates_per_prompt"]))
            return found

    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "auto_find_batch_size": fails_at is not None,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,  # weights stand still: both attempts have the same loss
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    data: dict[str, Any] = {
        "ranked": {"train_dataset": make_rows(24), "eval_dataset": make_rows(4, seed=1)},
        "reward": {"train_dataset": keyword_rows(24)},
        "rollout": {"train_dataset": [PromptRecord(f"say {n}") for n in range(24)], "reward": lengths},
    }
    ours = Failing(
        model=llama() if kind == "reward" else make_model(len(TOKENIZER)),
        args=config(**{**settings, **more, **changes}),
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
        **data[kind],
    )
    ours.sizes = []
    return ours


# What the model writes changes with every step.
FAST: dict[str, Any] = {"learning_rate": 0.05, "lr_scheduler_type": "constant"}


def lines(ours: Any) -> list[dict[str, Any]]:
    return [line for line in ours.state.log_history if "loss" in line]


def epoch_ends(ours: Any) -> list[int]:
    """Steps behind which an epoch ends, and the last: older accelerate halves a batch that newer takes 0.9 times."""
    epoch = 24 // (ours._train_batch_size * ours.args.gradient_accumulation_steps)
    return sorted({*range(epoch, ours.args.max_steps, epoch), ours.args.max_steps})


@pytest.mark.parametrize("fails_at", [2, 3])  # inside the first step; in the second, before a line of the log
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_attempt_leaves_nothing(tmp_path: Path, kind: str, fails_at: int) -> None:
    found = trainer(tmp_path, kind, fails_at)
    found.train()
    size = found._train_batch_size
    assert size < 4
    expected = trainer(tmp_path, kind, per_device_train_batch_size=size)
    expected.train()
    assert found.sizes == expected.sizes
    for line, other in zip(lines(found), lines(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-5, nan_ok=True)
    if kind == "ranked":
        assert found.largest_batch.targets.numel() == expected.largest_batch.targets.numel()


@pytest.mark.parametrize("cut", [1, 2, 3])  # answers wait in the first and the last
def test_a_resumed_rollout_that_runs_out_of_memory_samples_anew(tmp_path: Path, cut: int) -> None:
    half = trainer(tmp_path, "rollout", callbacks=[CutAfter(cut)], save_strategy="steps", save_steps=1)
    with pytest.raises(PowerCut):
        half.train()
    rest = trainer(tmp_path, "rollout", 1, save_strategy="steps", save_steps=1)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 4
    assert max(rest.sizes) == rest._train_batch_size < 4


@pytest.mark.parametrize(
    ("fails_at", "changes", "steps"),
    [
        (8, {"eval_strategy": "epoch", "max_steps": 6}, None),  # epochs of the first attempt have 3 steps
        (8, {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 3}, [0, 3]),  # both attempts sample there
        (4, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 2}, [0, 1, 2]),
    ],
)
def test_samples_are_of_one_attempt(
    tmp_path: Path, fails_at: int, changes: dict[str, Any], steps: list[int] | None
) -> None:
    ours = trainer(tmp_path, "ranked", fails_at, eval_samples=1, eval_sample_tokens=6, **{**changes, **FAST})
    ours.evaluate()  # before training, as a run from files does
    ours.train()
    if steps is None:
        steps = [0, *epoch_ends(ours)]
    found = (tmp_path / SAMPLES_FILE).read_text("utf-8")
    assert [json.loads(line)["step"] for line in found.splitlines()] == steps
    ours._sampled_step = None
    ours.evaluate()
    assert (tmp_path / SAMPLES_FILE).read_text("utf-8") == found, "what the model now writes"


STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("kind", "limit", "kept"), [("ranked", None, [1, 2]), ("reward", 2, [1, 2]), ("rollout", 1, [2])]
)
def test_checkpoints_of_a_failed_attempt_are_not_those_of_the_next(
    tmp_path: Path, kind: str, limit: int | None, kept: list[int]
) -> None:
    """It had come to step 4, and is cut behind step 2: what is resumed is the second attempt, with its own batches."""
    settings = {**STEPS, "max_steps": 6, "save_total_limit": limit}
    if kind == "rollout":
        settings["rollout_steps"] = 1
    ours = trainer(tmp_path, kind, 5, **settings)

    class Cut(CutAfter):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if ours._train_batch_size < 4:
                super().on_step_begin(args, state, control, **kwargs)

    seen: list[list[int]] = []
    ours.add_callback(Cut(2))
    real = ours._begin
    ours._begin = lambda checkpoint: (seen.append(checkpoints(tmp_path)), real(checkpoint))[1]
    with pytest.raises(PowerCut):
        ours.train()
    assert seen[-1][-1] == 4, "until the next one has a checkpoint, the last one of the first is there"
    assert checkpoints(tmp_path) == kept
    rest = trainer(tmp_path, kind, 10**9, **settings)
    rest.train(resume_from_checkpoint=True)
    assert (rest.state.global_step, rest._train_batch_size) == (6, ours._train_batch_size)
    assert checkpoints(tmp_path)[-1] == 6


def test_the_best_checkpoint_is_one_of_the_attempt_that_found_it(tmp_path: Path) -> None:
    """The first attempt ended an epoch with step 3; the second one evaluates there, and saves at other steps."""
    changes = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "epoch", "max_steps": 6}
    settings = {**changes, "metric_for_best_model": "eval_loss", "greater_is_better": True, "num_train_epochs": 2}
    ours = trainer(tmp_path, "ranked", 8, **settings)
    ours.train()
    assert ours._train_batch_size < 4
    assert ours.state.best_global_step == 3
    assert ours.state.best_model_checkpoint is None
    assert checkpoints(tmp_path) == epoch_ends(ours)


@pytest.mark.parametrize("limit", [1, 2])
def test_an_attempt_begins_again_where_the_run_was_resumed(tmp_path: Path, limit: int) -> None:
    """The first attempt has saved since, and rotation would have taken the checkpoint that both begin with."""
    settings = {**STEPS, "save_total_limit": limit, "max_steps": 8}
    half = trainer(tmp_path, "ranked", callbacks=[CutAfter(2)], **settings)
    with pytest.raises(PowerCut):
        half.train()
    assert checkpoints(tmp_path)[-1] == 2
    rest = trainer(tmp_path, "ranked", 4, **settings)
    rest.train(resume_from_checkpoint=True)
    assert rest.calls == 4 + 6, "steps 3 to 8 once more"
    assert checkpoints(tmp_path)[-1] == 8


@pytest.mark.parametrize(("step", "kept"), [(0, [0, 0]), (2, [0, 0, 2]), (5, [0, 0, 2, 3])])
def test_a_training_that_begins_behind_a_step_keeps_samples_until_there(
    tmp_path: Path, step: int, kept: list[int]
) -> None:
    samples.forget(str(tmp_path), step)
    for part in ([0, 0], [2], [3]):
        samples.write(str(tmp_path), [{"step": number} for number in part])
    samples.forget(str(tmp_path), step)
    lines = (tmp_path / SAMPLES_FILE).read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == kept
    samples.forget(str(tmp_path), -1)
    assert list(tmp_path.iterdir()) == []
