"""A trainer of a tiny Llama, its collator, and the eager loss and gradients that it is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clha_fast import CLHAOptions, reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.options import HeadOptions
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
PLAIN = HeadOptions()
EVAL_SEED = 6


class Features(torch.utils.data.Dataset[Any]):
    """Tokenised prompts, in a dataset of somebody's own."""

    def __init__(self, features: list[Any]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Any:
        return self.features[index]


def config(folder: Path, **changes: Any) -> CLHAConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return CLHAConfig(**{**settings, **changes})


def trainer(folder: Path, model: nn.Module | None = None, rows: Any = None, **changes: Any) -> CLHATrainer:
    model = make_model(len(TOKENIZER)) if model is None else model
    return CLHATrainer(
        model,
        config(folder, **changes),
        train_dataset=make_rows(12) if rows is None else rows,
        eval_dataset=make_rows(8, seed=EVAL_SEED),
        processing_class=TOKENIZER,
    )


def eager_loss(
    model: nn.Module, batch: CandidateBatch, options: CLHAOptions, head: HeadOptions = PLAIN
) -> tuple[Tensor, Tensor]:
    """The loss by way of the model's own full logits."""
    logits = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.row_index] / head.temperature
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    ranking = (batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, batch.sft_index, None, None)
    loss, metrics, _ = reference.clha_loss(logps, batch.targets, *ranking, head, options)
    return loss, metrics


def collate(rows: list[dict[str, Any]], options: CLHAOptions, drop_inert: bool = True) -> CandidateBatch:
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, options, drop_inert=drop_inert)(rows))


def assert_same_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    whole = sum(float(grad.norm()) ** 2 for grad in expected.values()) ** 0.5
    assert whole > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - expected[name]).norm()) <= 1e-5 * whole, name


def eager_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def step_gradients(ours: CLHATrainer, micro_batches: list[list[dict[str, Any]]]) -> float:
    """Gradients of one optimiser step as Trainer forms them; returns the loss it would log."""
    samples = iter([ours.data_collator(rows) for rows in micro_batches])
    batches, items = ours.get_batch_samples(samples, len(micro_batches), torch.device("cpu"))
    ours.current_gradient_accumulation_steps = len(batches)
    ours.accelerator.gradient_state._set_sync_gradients(True)
    return sum(float(ours.training_step(ours.model, batch, items)) for batch in batches)
