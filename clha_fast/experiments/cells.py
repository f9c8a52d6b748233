"""One cell of a comparison: a method trained at one ranking length, seed and learning rate, in a folder of its own.

The folder is named by a hash of all that decides the weights, so that a run which was killed finds what is done, and
a changed configuration never takes another's result for its own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from clha_fast.batching.totals import SCALARS, dataset_counts
from clha_fast.data.records import RankedRecord
from clha_fast.data.writing import write_records
from clha_fast.experiments.comparison import Comparison, Files
from clha_fast.experiments.contents import data_hash, digest, model_hash, with_contents
from clha_fast.experiments.corruption import Corruption
from clha_fast.experiments.going_on import prepared
from clha_fast.experiments.methods import Method, with_quantiles, without_quantiles
from clha_fast.experiments.reading import READING, read_file, rewarded_alike
from clha_fast.experiments.rollout_run import RolloutRun, RolloutRunOptions
from clha_fast.experiments.run import Run, RunOptions, with_defaults
from clha_fast.files import CHECKPOINT, write_json
from clha_fast.training.config import CLHAConfig
from clha_fast.training.datasets import check_first
from clha_fast.training.rollout import RolloutConfig
from clha_fast.training.switches import idle_settings
from clha_fast.types import COUNTS
from clha_fast.version import __version__

TRAINED_FILE = "trained.json"
MODEL = "model"
_TOKENS = COUNTS.index("token_count") - 1


class CellError(RuntimeError):
    """A cell could not be trained or evaluated; the message says why, the others go on."""


@dataclass(frozen=True)
class Cell:
    """What decides a cell's weights, beside what all cells share.

    Attributes:
        learning_rate: None where nothing is trained. corruption: of the training file.
    """

    method: Method
    length: str
    files: Files
    seed: int
    learning_rate: float | None = None
    corruption: Corruption | None = None

    @property
    def key(self) -> str:
        """A text that is this cell's alone within its comparison."""
        noise = None if self.corruption is None else vars(self.corruption)
        method = [self.method.name, self.method.checkpoint]
        return json.dumps([*method, self.length, self.seed, self.learning_rate, noise])

    @property
    def title(self) -> str:
        """For a line of progress."""
        parts = [self.method.label, f"n = {self.length}"]
        if self.method.trains:
            parts.append(f"seed {self.seed}")
        if self.learning_rate is not None:
            parts.append(f"learning rate {self.learning_rate:g}")
        if self.corruption is not None:
            parts.append(f"{self.corruption.kind} {self.corruption.rate:g}")
        return ", ".join(parts)


def identity(comparison: Comparison, cell: Cell, base: str) -> dict[str, Any]:
    """All that decides a cell's weights, as a JSON value.

    Args:
        base: the folder or name of the base model.
    """
    method = cell.method
    if not method.trains:
        return {"checkpoint": model_hash(str(method.checkpoint))}
    return {
        "method": with_contents(method.settings),
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "corruption": None if cell.corruption is None else vars(cell.corruption),
        "train": data_hash(cell.files.train),
        "base": model_hash(base),
        "budget_tokens": comparison.budget_tokens,
        "settings": with_contents(comparison.settings),
        "run": with_contents(comparison.run),
        **({"judge": model_hash(str(comparison.label_model))} if method.rollout else {}),
        **({"ranked": "before it is corrupted"} if cell.corruption and comparison.run.get("rank_by_reward") else {}),
    }


def cell_folder(comparison: Comparison, cell: Cell, base: str) -> str:
    """Where the cell lies."""
    name = f"{cell.method.name}-n{cell.length}-{digest(identity(comparison, cell, base))}"
    return os.path.join(comparison.output_dir, "cells", name)


def train_cell(comparison: Comparison, cell: Cell, base: str) -> dict[str, Any]:
    """Train a cell unless it is trained; what `TRAINED_FILE` then says of it.

    Raises:
        ValueError, OSError, RuntimeError: as `Run`.
    """
    folder = cell_folder(comparison, cell, base)
    done = os.path.join(folder, TRAINED_FILE)
    if os.path.isfile(done) and (not cell.method.trains or os.path.isdir(os.path.join(folder, MODEL))):
        return trained(folder)
    os.makedirs(folder, exist_ok=True)
    if not cell.method.trains:
        found: dict[str, Any] = {"log": []}
    else:
        found = _train(comparison, cell, base, folder)
    write_json(os.path.join(folder, "cell.json"), {"title": cell.title, **identity(comparison, cell, base)})
    found["version"] = __version__
    write_json(done, found)
    return found


def trained(folder: str) -> dict[str, Any]:
    """What `train_cell` said of the cell in a folder."""
    with open(os.path.join(folder, TRAINED_FILE), encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def model_of(comparison: Comparison, cell: Cell, base: str) -> str:
    """The folder (or name) of a trained cell's model."""
    if not cell.method.trains:
        return str(cell.method.checkpoint)
    return os.path.join(cell_folder(comparison, cell, base), MODEL)


def _settings(comparison: Comparison, own: Mapping[str, Any], target: str) -> dict[str, Any]:
    return {"save_strategy": "no", "eval_strategy": "no", **comparison.settings, **own, "output_dir": target}


def check_settings(comparison: Comparison) -> None:
    """Before hours of training: whether the trainer takes every method's settings, as far as no data are needed.

    Raises:
        ValueError: it does not; the message names the method.
    """
    for method in comparison.methods:
        config = RolloutConfig if method.rollout else CLHAConfig
        own = _settings(comparison, without_quantiles(method.settings), comparison.output_dir)
        given = with_defaults(own, config)
        for rate in comparison.learning_rates:
            try:
                config(**given, learning_rate=rate)
            except (TypeError, ValueError, OSError) as error:
                raise ValueError(f"{method.label}: {error}") from None


def idle_of(comparison: Comparison) -> list[str]:
    """A sentence for each setting that does nothing as the others are, and whose it is where not all methods'."""
    found: dict[str, list[str]] = {}
    for method in comparison.methods:
        config = RolloutConfig if method.rollout else CLHAConfig
        own = _settings(comparison, without_quantiles(method.settings), comparison.output_dir)
        for sentence in idle_settings(with_defaults(own, config), config).values():
            found.setdefault(sentence, []).append(method.label)
    every = len(comparison.methods)
    whose = {sentence: "" if len(own) == every else f" by {', '.join(own)}" for sentence, own in found.items()}
    return [f"Unused{of}: {sentence}." for sentence, of in whose.items()]


def check_records(comparison: Comparison, records: Sequence[RankedRecord], place: str) -> None:
    """Before hours of training: whether the records of a training file hold what every method reads.

    Raises:
        ValueError: they do not; the message names the method.
    """
    for method in comparison.methods:
        if method.rollout:
            continue
        try:
            own = with_quantiles(method.settings, records)
            args = CLHAConfig(**with_defaults(_settings(comparison, own, comparison.output_dir), CLHAConfig))
            first = {"rewards": records[0].rewards, **records[0].signals}
            check_first(first, place, args.loss_options(), args.reference)
        except ValueError as error:
            raise ValueError(f"{method.label}: {error}") from None


def _train(comparison: Comparison, cell: Cell, base: str, folder: str) -> dict[str, Any]:
    train_file, options = cell.files.train, dict(comparison.run)
    records = read_file(train_file, options)
    if cell.corruption is not None:
        records = cell.corruption.apply(rewarded_alike(records, options))
    # Rollouts read prompts alone, and order no responses.
    if cell.corruption is not None or (cell.method.rollout and options.get("rank_by_reward")):
        train_file = os.path.join(folder, "train.jsonl")
        write_records(records, train_file)
        # As they were written: ranked again, flips would be undone.
        options = {name: value for name, value in options.items() if name not in READING}
    target = os.path.join(folder, MODEL)
    settings = {
        **_settings(comparison, with_quantiles(cell.method.settings, records), target),
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
    }
    given = {"train_file": train_file, "eval_fraction": 0, "model": base, **options}

    def make(**how: Any) -> Run:
        if cell.method.rollout:
            return RolloutRun(RolloutRunOptions(**given, **how, reward_model=comparison.label_model), settings)
        return Run(RunOptions(**given, **how), settings)

    run = prepared(make, target)
    run.trainer.remove_callback(PrinterCallback)
    run.trainer.add_callback(_LastLine())
    if comparison.budget_tokens is not None:
        run.trainer.args.max_steps = budget_steps(run, comparison.budget_tokens)
    run.evaluate_before()
    run.train()
    if run.interrupted:
        raise KeyboardInterrupt
    run.report()
    for name in os.listdir(target):
        if CHECKPOINT.fullmatch(name):
            shutil.rmtree(os.path.join(target, name))
    log = [plain_line(line) for line in run.trainer.state.log_history]
    losses = [line["loss"] for line in log if "loss" in line]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in losses):
        raise CellError(f"{cell.title}: the loss became infinite or NaN in training; a smaller learning rate may help")
    return {
        "steps": run.trainer.state.global_step,
        "scored_tokens": sum(line.get("num_tokens") or 0 for line in log),
        **({} if cell.method.rollout else _shares(run)),
        "log": log,
    }


def _shares(run: Run) -> dict[str, Any]:
    """What the objective leaves out of the training file; None where it ranks nothing, or has no SFT term."""
    summary = run.summary()[0]
    objective = run.trainer.loss_options
    return {
        "kept_share": summary.kept_pairs / summary.pairs if summary.pairs and objective.ranks else None,
        "gate_share": None if objective.gates(None) is False else 1 - summary.closed_gates / summary.prompts,
        "pair_quartiles": list(summary.gaps),
    }


class _LastLine(TrainerCallback):
    """The last step writes a line, and each that is saved: the tokens of all lines are all tokens, resumed or not."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save or state.global_step >= state.max_steps


# Of one call of `train`: times, and the mean loss of its own steps, which a killed run has made two of.
_OF_THE_CALL = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")


def plain_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the log, sorted as in a checkpoint, without what differs from run to run, and with None for NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in sorted(line.items())
        if name not in _OF_THE_CALL
    }


def budget_steps(run: Run, tokens: int) -> int:
    """Optimiser steps in which a prepared run scores about `tokens` tokens, inert candidates left out.

    Of rollouts, whose lengths are not known before, as many as if every answer had its full length.
    """
    trainer = run.trainer
    args: Any = trainer.args
    dataset: Any = trainer.train_dataset
    processes = args.world_size // args.sequence_parallel_size
    batches = math.ceil(len(dataset) / (args.train_batch_size * processes))
    steps = math.ceil(batches / args.gradient_accumulation_steps)  # an epoch's last ones may be small
    if isinstance(args, RolloutConfig):
        assert args.max_completion_length is not None
        whole = float(len(dataset) * args.answers_per_prompt * args.max_completion_length)
    else:
        counts = dataset_counts(dataset, trainer.loss_options, args.drop_inert)
        whole = float(counts[len(counts) - SCALARS + _TOKENS])
    if not whole:
        raise ValueError("budget_tokens: expected a training file with tokens that the objective scores, got none")
    return max(1, round(tokens * steps / whole))


def cells_of(comparison: Comparison, cell: Cell) -> list[Cell]:
    """The trials of a cell, one a learning rate; of one that trains nothing, itself."""
    if not cell.method.trains:
        return [cell]
    return [replace(cell, learning_rate=rate) for rate in comparison.learning_rates]
