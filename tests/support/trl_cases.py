"""TRL's own trainers with and without this library's head: losses, gradients and what two steps of training log.

``python -m tests.support.trl_cases`` prints the table of docs/integrations.md, ``--write PATH`` renders it into a file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import inspect
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import trl
from torch import Tensor, nn
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from clha_fast.integrations.trl import FusedHeadMixin, use_clha
from tests.support.head_models import build
from tests.support.tiny import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
LOSS, GRADIENTS = 1e-6, 1e-5
KINDS = ("llama", "gemma2", "cohere", "llama with LoRA")
# Settings of kinds that a test adds.
KINDS_OF: dict[str, dict[str, Any]] = {}


class FusedCPOTrainer(FusedHeadMixin, CPOTrainer):
    """CPO and SimPO."""


class FusedORPOTrainer(FusedHeadMixin, ORPOTrainer):
    """ORPO."""


def pairs() -> datasets.Dataset:
    rows = make_rows(6, seed=4)
    parts = ("chosen", "rejected")
    return datasets.Dataset.from_list(
        [{"prompt": r["prompt"], **{name: " " + r["completions"][k] for k, name in enumerate(parts)}} for r in rows]
    )


def judged() -> datasets.Dataset:
    rows = [{"prompt": r["prompt"], "completion": r[side]} for r in pairs() for side in ("chosen", "rejected")]
    return datasets.Dataset.from_list([{**row, "label": k % 2 == 0} for k, row in enumerate(rows)])


def plain() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs()])


def prompts() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in pairs()])


def variety(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


ROLLOUT = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 0.8}
# Name -> trainer, the same with our mixin (or None: `use_clha`), its configuration's class, settings, data.
CASES: dict[str, tuple[Any, Any, Any, dict[str, Any], Callable[[], datasets.Dataset]]] = {
    "DPO": (trl.DPOTrainer, None, trl.DPOConfig, {}, pairs),
    "DPO, WPO weights": (trl.DPOTrainer, None, trl.DPOConfig, {"use_weighting": True}, pairs),
    "KTO": (trl.KTOTrainer, None, trl.KTOConfig, {"per_device_train_batch_size": 4}, judged),
    "GRPO": (trl.GRPOTrainer, None, trl.GRPOConfig, ROLLOUT, prompts),
    "GRPO, entropy bonus": (trl.GRPOTrainer, None, trl.GRPOConfig, {**ROLLOUT, "entropy_coef": 0.3}, prompts),
    # Its ratio is e to a completion's sum: a long one's rounding in float32 alone is more than `LOSS`.
    "RLOO": (trl.RLOOTrainer, None, trl.RLOOConfig, {**ROLLOUT, "max_completion_length": 2}, prompts),
    "SFT": (trl.SFTTrainer, None, trl.SFTConfig, {}, plain),
    "CPO": (CPOTrainer, FusedCPOTrainer, CPOConfig, {}, pairs),
    "SimPO": (CPOTrainer, FusedCPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}, pairs),
    "ORPO": (ORPOTrainer, FusedORPOTrainer, ORPOConfig, {}, pairs),
}
# Means over scored tokens here, over prompts and padding too there; and times.
DIFFERENT = ("logits/chosen", "logits/rejected", "runtime", "per_second", "step_time", "total_flos")


def model_of(kind: str) -> nn.Module:
    changes: dict[str, Any] = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return build(kind.split()[0], max_position_embeddings=256, **changes, **KINDS_OF.get(kind, {}))


def make(name: str, kind: str, folder: str, ours: bool, **changes: Any) -> Any:
    """A trainer as TRL makes it; with `ours` of the mixin's class where there is one."""
    stock, mixed, arguments, settings, data = CASES[name]
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, **settings, **changes}
    settings |= {"output_dir": folder, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    args = arguments(**{"bf16": False, "use_cpu": True, "disable_tqdm": True, "seed": 3, **settings})
    more: dict[str, Any] = {"reward_funcs": variety} if "reward_funcs" in _parameters(stock) else {}
    if "LoRA" in kind:
        targets = ["q_proj", "v_proj", "down_proj", *(["lm_head"] if "head adapted" in kind else [])]
        saved = ["lm_head"] if "head saved" in kind else None
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, modules_to_save=saved)
        more["peft_config"] = config
    elif "ref_model" in _parameters(stock):
        more["ref_model"] = model_of(kind)
    model: Any = model_of(kind)
    model.save_pretrained(folder)  # where GRPO and RLOO read their reference
    model.config._name_or_path = folder
    of = mixed if ours and mixed else stock
    trainer = of(model=model, args=args, train_dataset=data(), processing_class=TOKENIZER, **more)
    stir(trainer.model)
    return trainer


def _parameters(kind: Any) -> Any:
    return inspect.signature(kind.__init__).parameters


def stir(model: nn.Module) -> None:
    """A policy that is not its reference, and adapters that matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def step(trainer: Any, inputs: Any) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of one batch."""
    trainer.current_gradient_accumulation_steps = 1  # as `train` has it
    seed()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss), {name: p.grad.clone() for name, p in named if p.grad is not None}


def batch_of(trainer: Any) -> Any:
    seed()
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@dataclass
class Measured:
    """Relative errors against TRL's own head: loss, gradients (norm of all), logged values and weights after steps."""

    loss: float
    gradients: float
    logged: float
    weights: float

    @property
    def right(self) -> bool:
        return self.loss <= LOSS and max(self.gradients, self.logged, self.weights) <= GRADIENTS


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert set(got) == set(expected)
    whole = sum(value.double().norm() ** 2 for value in expected.values()) ** 0.5
    apart = sum((got[name].double() - value.double()).norm() ** 2 for name, value in expected.items()) ** 0.5
    return float(apart / whole)


def logged(trainer: Any) -> dict[str, float]:
    found = {}
    for number, row in enumerate(trainer.state.log_history):
        for name, value in row.items():
            if not any(part in name for part in DIFFERENT):
                found[f"{number} {name}"] = float(value)
    return found


def measure(name: str, kind: str, **changes: Any) -> Measured:
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs, ours = (make(name, kind, folder, mine, **changes) for mine in (False, True))
        ours.model.load_state_dict(theirs.model.state_dict())
        inputs = batch_of(theirs)
        expected = step(theirs, inputs)
        if CASES[name][1] is None:
            use_clha(ours)
        got = step(ours, inputs)
        for trainer in (theirs, ours):
            trainer.model.zero_grad()
            trainer._metrics = copy.deepcopy(trainer._metrics) if hasattr(trainer, "_metrics") else None
            seed()
            trainer.train()
        before, after = logged(theirs), logged(ours)
        assert set(before) == set(after)
        apart = max(abs(after[key] - value) / max(1.0, abs(value)) for key, value in before.items())
        weights = distance(*({n: p.detach() for n, p in t.model.named_parameters()} for t in (ours, theirs)))
    return Measured(
        abs(got[0] - expected[0]) / max(1.0, abs(expected[0])), distance(got[1], expected[1]), apart, weights
    )


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        yield


def render() -> str:
    """The table as Markdown."""
    packages = ("trl", "transformers", "peft", "torch")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    rows = []
    for name in CASES:
        for kind in KINDS:
            got = measure(name, kind)
            verdict = "equal" if got.right else "**not equal**"
            errors = f"{got.loss:.1e} | {got.gradients:.1e} | {got.logged:.1e} | {got.weights:.1e}"
            rows.append(f"| {name} | {kind} | {errors} | {verdict} |")
    return "\n".join([*TABLE, *rows, "", NOTES.format(loss=LOSS, gradients=GRADIENTS, versions=versions).strip()])


TABLE = (
    "| TRL's trainer | model | loss | gradients | logged in two steps | weights after them | |",
    "|---|---|---|---|---|---|---|",
)

NOTES = """
Errors against the same trainer with TRL's own head, relative (the loss to at least 1): equal is at most {loss:g} for
the loss and {gradients:g} for the rest. Two-layer models in float32 on the CPU, softcap 7 (gemma2), scale 0.3 (cohere),
adapters stirred; RLOO with two tokens a completion, for its ratio is e to their sum, whose rounding grows with it.
Rendered by `python -m tests.support.trl_cases --write docs/integrations.md` with {versions}.
"""
MARKS = ("<!-- trl-table: rendered by tests/support/trl_cases.py -->", "<!-- /trl-table -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a file with the marks of the table")
    path = parser.parse_args().write
    table = render()
    if path is None:
        print(table)
        return 0
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        parser.error(f"--write: expected {' and '.join(MARKS)} in {path}")
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
