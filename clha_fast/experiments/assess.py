"""A cell's evaluation: answers to held-out prompts, likelihood and ranking, rewards of a model that may be believed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clha_fast.data.records import RankedRecord
from clha_fast.data.split import prompt_key
from clha_fast.evaluation.report import RAW, REWARD, Evaluation, evaluate, figures_of
from clha_fast.evaluation.rewards import answer_rewards, check_reward_model, judge_of
from clha_fast.experiments.cells import Cell, cell_folder, model_of
from clha_fast.experiments.comparison import Comparison
from clha_fast.experiments.contents import data_hash, digest, model_hash
from clha_fast.experiments.reading import read_file, reading_of
from clha_fast.experiments.reward_run import trained_accuracy
from clha_fast.files import write_json
from clha_fast.generation import (
    GenerationSettings,
    generate_answers,
    load_backend,
    read_answers,
    trained_lead,
    trained_prefix,
)
from clha_fast.messages import check_keys
from clha_fast.models.loading import find_device
from clha_fast.rewards.reward_model import REWARD_FILE, RewardModel, load_reward_model
from clha_fast.version import __version__

METRICS = "metrics.json"
ANSWERS = "answers.jsonl"
# What decides on dev, and which way is better.
_SIGNS = {"reward": 1, "accuracy": 1, "nll": -1}


@functools.lru_cache(maxsize=2)
def _reward_model(path: str, content: str) -> RewardModel:
    return load_reward_model(path, device="cpu")


@contextlib.contextmanager
def judging(path: str, device: str) -> Iterator[RewardModel]:
    """The reward model of a folder or name on `device`, as `find_device` takes it, while it judges.

    It is read once, and waits in host memory: what trains in between has the accelerator for itself.

    Raises:
        ValueError: as `load_reward_model`; it does not fit in the device's memory.
    """
    place = find_device(device)
    found = _reward_model(path, model_hash(path))
    try:
        try:
            found.model.to(place)
        except torch.OutOfMemoryError as error:
            room = f"one that fits in the memory of {place} as {found.model.dtype}"
            raise ValueError(f"reward_models: expected {room}, got {path}; give a smaller one") from error
        yield found
    finally:
        found.model.to("cpu")
        release(place)


def release(place: torch.device) -> None:
    """Give back the accelerator's memory of what is no longer referred to; nothing on a CPU."""
    if place.type != "cpu":
        gc.collect()
        torch.get_device_module(place).empty_cache()


def device_of(settings: Mapping[str, Any]) -> str:
    """Where a trainer with these settings trains, as `find_device` takes it: what was trained is measured there."""
    return "cpu" if settings.get("use_cpu") else "auto"


@dataclass(frozen=True)
class Assessor:
    """How the cells of a comparison are evaluated, all alike.

    Attributes:
        models: "label" and "evaluation" -> a reward model's path. checks: the same -> its held-out pair accuracy;
            `refused`, why it is not used, or ""; `trained`, as `trained_accuracy`; `notes`, where pairs were cut.
        generation: settings of answers. reward_margin, noise_rule: which test pairs are kept.
        dtype, attn_implementation: of the models that are evaluated, as they were trained.
    """

    criterion: str
    models: Mapping[str, str]
    checks: Mapping[str, Mapping[str, Any]]
    generation: GenerationSettings
    batch_size: int
    limits: Mapping[str, int | None]
    noise_rule: str = "abs"
    reward_margin: float = 3.0
    dtype: str = "float32"
    attn_implementation: str | None = None

    @classmethod
    def of(cls, comparison: Comparison, models: Mapping[str, str]) -> Assessor:
        """The evaluation of a comparison; reward models are measured on the held-out pairs first.

        Raises:
            ValueError: unknown settings of generation; a label model that is no better than chance.
        """
        given = dict(comparison.generation)
        batch_size = given.pop("batch_size", 8)
        check_keys("generation", given, [f.name for f in dataclasses.fields(GenerationSettings)])
        settings = GenerationSettings(**given)
        limits = {"dev": comparison.dev_limit, "test": comparison.test_limit}
        checks = {}
        for role, path in models.items():
            split = "dev" if role == "label" else "test"
            sources = [getattr(files, split) for files in comparison.data.values()]
            records = once_each([read_file(source, comparison.run) for source in sources])
            with judging(path, device_of(comparison.settings)) as judge:
                check = check_reward_model(f"the {role} model", records, judge)
            checks[role] = {
                **{"accuracy": check.accuracy.as_dict(), "refused": check.refused},
                "trained": trained_accuracy(path),
                **({"notes": list(check.notes)} if check.notes else {}),
            }
        criterion = comparison.criterion
        if criterion is None:
            usable = "label" in models and not checks["label"]["refused"]
            criterion = "reward" if usable else "accuracy"
        elif criterion == "reward" and checks["label"]["refused"]:
            raise ValueError(f"criterion: expected another than 'reward', for {checks['label']['refused']}")
        return cls(
            criterion=criterion,
            models=dict(models),
            checks=checks,
            generation=settings,
            batch_size=batch_size,
            limits=limits,
            **comparison.evaluation,
            dtype=comparison.run.get("dtype", "float32"),
            attn_implementation=comparison.run.get("attn_implementation"),
        )

    @property
    def sign(self) -> int:
        """+1 where more of the criterion is better."""
        return _SIGNS[self.criterion]

    def criterion_of(self, found: Evaluation) -> float | None:
        """The criterion of an evaluation on dev."""
        name = REWARD + "label" if self.criterion == "reward" else self.criterion
        return figure_of(found, name)

    def notes(self) -> list[str]:
        """Sentences that belong below the table."""
        found = []
        for role, check in self.checks.items():
            accuracy = check["accuracy"]
            if check["refused"]:
                found.append(check["refused"])
            else:
                interval = f"[{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
                found.append(
                    f"The {role} model prefers the better answer in {accuracy['value']:.3f} {interval} of the held-out "
                    f"pairs of {accuracy['prompts']:,} prompts."
                )
            found += check.get("notes", ())
            own = check["trained"]
            if own is not None:
                interval = "" if own["interval"] is None else " [{:.3f}, {:.3f}]".format(*own["interval"])
                found.append(
                    f"Its training found {own['accuracy']:.3f}{interval} for the {role} model, on the pairs of "
                    f"{own['prompts']:,} prompts that it held out ({REWARD_FILE})."
                )
        found.append(f"Learning rates are chosen on dev by {self.criterion}.")
        found.append("Accuracy over kept pairs goes by rank, that over ordered pairs, and tau, by reward.")
        return found


def figure_of(found: Evaluation, name: str) -> float | None:
    """A figure over all prompts, None where it is undefined or missing."""
    figure = figures_of(found.values).get(name)
    if figure is None:
        return None
    rows = figure.rows(found.values, range(len(found.prompts)))
    value = float(figure.of(rows[~np.isnan(rows).any(1)].sum(0)))
    return None if math.isnan(value) else value


def once_each(files: Sequence[Sequence[RankedRecord]]) -> list[RankedRecord]:
    """The records of each prompt, all of them, from the last file that has it.

    A prompt that stands at several ranking lengths has the pairs of one of them, not the same pairs again.
    """
    found: dict[str, list[RankedRecord]] = {}
    for records in files:
        own: dict[str, list[RankedRecord]] = {}
        for record in records:
            own.setdefault(prompt_key(record), []).append(record)
        found |= own
    return [record for records in found.values() for record in records]


def first_of_each(records: Sequence[RankedRecord], limit: int | None) -> list[RankedRecord]:
    """The first `limit` records of each subset, in order; all where it is None."""
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        seen[record.subset] += 1
        if limit is None or seen[record.subset] <= limit:
            found.append(record)
    return found


@dataclass(frozen=True)
class Assessment:
    """One cell's evaluation on "dev" or "test": where it lies, and what decides it beside the weights.

    On dev no answers are made unless they decide.
    """

    comparison: Comparison
    cell: Cell
    base: str
    assessor: Assessor
    split: str

    @property
    def answers(self) -> bool:
        return self.split == "test" or self.assessor.criterion == "reward"

    @property
    def role(self) -> str:
        return "evaluation" if self.split == "test" else "label"

    @property
    def judge(self) -> str | None:
        """The reward model's path."""
        checked = self.assessor.checks.get(self.role)
        return self.assessor.models[self.role] if self.answers and checked and not checked["refused"] else None

    @property
    def prefix(self) -> str:
        """What answers begin with: given, or the good marker of a checkpoint's run; a trained cell has its own."""
        given = self.assessor.generation.answer_prefix
        if given or self.cell.method.trains:
            return given
        return trained_prefix(str(self.cell.method.checkpoint)) or ""

    @property
    def device(self) -> str:
        return device_of({**self.comparison.settings, **self.cell.method.settings})

    @property
    def source(self) -> str:
        return str(getattr(self.cell.files, self.split))

    def identity(self) -> dict[str, Any]:
        assessor, read = self.assessor, reading_of(self.comparison.run)
        return {
            "split": self.split,
            "file": data_hash(self.source),
            "limit": assessor.limits[self.split],
            # Prompts are cut, and a marker stands before responses, where nothing is generated too.
            "prompt": [assessor.generation.max_prompt_length, self.prefix],
            "generation": dataclasses.asdict(assessor.generation) if self.answers else None,
            "kept": [assessor.noise_rule, assessor.reward_margin],
            "judge": None if self.judge is None else model_hash(self.judge),
            "dtype": assessor.dtype,
            "batch_size": assessor.batch_size,
            # What an option brings in is there where it is set: what was found without it stays found.
            **({"attention": assessor.attn_implementation} if assessor.attn_implementation else {}),
            **({"read": read} if read else {}),
        }

    @property
    def folder(self) -> str:
        cell = cell_folder(self.comparison, self.cell, self.base)
        return os.path.join(cell, f"{self.split}-{digest(self.identity())}")

    def found(self) -> Evaluation | None:
        """What an earlier run has found, None where it has not."""
        path = os.path.join(self.folder, METRICS)
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8") as file:
            return Evaluation.from_dict(json.load(file), path)

    def run(self) -> Evaluation:
        """Load the cell's model, on the device that it trains on, and measure it.

        Raises:
            ValueError, OSError, RuntimeError: as `generate_answers`, `evaluate` and `answer_rewards`.
        """
        assessor, folder = self.assessor, self.folder
        os.makedirs(folder, exist_ok=True)
        records = first_of_each(read_file(self.source, self.comparison.run), assessor.limits[self.split])
        path = model_of(self.comparison, self.cell, self.base)
        place = find_device(self.device)
        release(place)  # of the training that may have been before
        backend = load_backend(
            path, device=str(place), dtype=assessor.dtype, attn_implementation=assessor.attn_implementation
        )
        prefix = assessor.generation.answer_prefix or trained_prefix(path) or ""
        lead = trained_lead(path) if assessor.generation.lead is None else assessor.generation.lead
        written = None
        if self.answers:
            target = os.path.join(folder, ANSWERS)
            if not os.path.isfile(target):
                generate_answers(
                    records,
                    backend,
                    target,
                    dataclasses.replace(assessor.generation, answer_prefix=prefix, lead=lead),
                    batch_size=assessor.batch_size,
                    resume=True,
                    progress=False,
                )
            written = read_answers(target)
        found = evaluate(
            records,
            written,
            model=backend.model,
            tokenizer=backend.tokenizer,
            noise_rule=assessor.noise_rule,
            reward_margin=assessor.reward_margin,
            max_prompt_length=assessor.generation.max_prompt_length,
            answer_prefix=prefix,
            batch_size=assessor.batch_size,
            about={**self.identity(), "answer_prefix": prefix, "version": __version__},
        )
        del backend
        release(place)
        if self.judge is not None and written is not None:
            texts = [answer.answer for answer in written]
            said: list[str] = []
            with judging(self.judge, str(place)) as judge:
                rewards, raw = answer_rewards(records, texts, judge, notes=said)
                fingerprint = judge_of(judge)
            known = {name: assessor.checks[self.role][name] for name in ("accuracy", "refused")}
            found.notes.extend(f"{self.role}: {text}" for text in said)
            found.checks[self.role] = {"fingerprint": fingerprint, **known}
            found.values[REWARD + self.role] = [*rewards]
            found.values[RAW + self.role] = raw
        write_json(os.path.join(folder, METRICS), vars(found))
        return found


def drop_weights(comparison: Comparison, cell: Cell, base: str) -> None:
    """Remove a trained cell's model; what was measured stays."""
    if cell.method.trains:
        shutil.rmtree(model_of(comparison, cell, base), ignore_errors=True)
