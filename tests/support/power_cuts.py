"""Runs with dropout that end without warning after a step, and what they leave to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


def dropout_model() -> nn.Module:
    """GPT-2 has dropout in three places, so the random state matters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


class PowerCut(Exception):
    pass


class CutAfter(TrainerCallback):
    """Ends the process's work without warning, right after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise PowerCut


def trainer(folder: Path, cut: int | None = None, **changes: Any) -> CLHATrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return CLHATrainer(
        dropout_model(),
        CLHAConfig(**{**settings, **changes}),
        train_dataset=make_rows(9),
        eval_dataset=make_rows(4, seed=5),
        processing_class=TOKENIZER,
        callbacks=[] if cut is None else [CutAfter(cut)],
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
