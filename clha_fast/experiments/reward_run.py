"""A reward model from files to a folder: `Run`, with pairs in the loss's place and an accuracy that has an interval."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from clha_fast.data.records import RankedRecord
from clha_fast.data.split import half_of, shared_prompts
from clha_fast.evaluation.accuracy import PairAccuracy, pair_accuracy
from clha_fast.evaluation.intervals import import_scipy
from clha_fast.experiments.run import DTYPES, METRICS_FILE, Run, RunOptions
from clha_fast.files import write_json
from clha_fast.models.loading import adapter_config, build_model, load_classifier
from clha_fast.reports.run_page import REPORT_FILE
from clha_fast.rewards.reward_model import BLANK, REWARD_FILE
from clha_fast.training.reward_data import PairedDataset
from clha_fast.training.reward_trainer import METRICS, RewardConfig, RewardTrainer, prompt_results, reward_limit
from clha_fast.training.validation import SPEEDS, check_best_metric

CHANCE = 0.5


@dataclass
class RewardRunOptions(RunOptions):
    """`RunOptions` for a reward model.

    Attributes:
        model: a causal language model or an encoder, which gets a new head, or a classifier with one label to go on
            with. peft_config: of an adapter that is merged into the model at the end; the head trains beside it.
        rank_by_reward: pairs by reward; without it by the order of the responses. Equal rewards make no pair.
        half: 0 or 1 trains (and, without eval_file, holds out) on that half of the prompts alone, the same one whatever
            the seed: a model that labels and one that evaluates are kept apart by other halves.
    """

    half: int | None = None

    def check(self) -> None:
        """As `RunOptions`."""
        super().check()
        if self.half not in (None, 0, 1):
            raise ValueError(f"half: expected 0 or 1, got {self.half!r}")


class RewardRun(Run):
    """As `Run`; `before` and `after` also hold the accuracy and its interval.

    Attributes:
        fresh: names of the weights that began at random in a loaded model.
    """

    config_class = RewardConfig
    files = (METRICS_FILE, REPORT_FILE, REWARD_FILE)
    options: RewardRunOptions
    trainer: RewardTrainer
    fresh: list[str]

    @functools.cached_property
    def lead(self) -> str | None:
        """None: nothing is asked of a reward model."""
        return None

    def _check_settings(self) -> None:
        check_best_metric(self.args.metric_for_best_model, (*METRICS, *SPEEDS))
        if self.options.eval_file is not None or self.options.eval_fraction != 0:
            import_scipy()  # before hours of training

    def _adapter_config(self, settings: Mapping[str, Any]) -> Any:
        kind = settings.get("task_type", "SEQ_CLS")
        if kind != "SEQ_CLS":
            raise ValueError(f"peft_config.task_type: expected SEQ_CLS for a reward model, got {kind!r}")
        return adapter_config({**settings, "task_type": kind})

    def split(self, records: list[RankedRecord], held_out: list[RankedRecord] | None) -> None:
        """As `Run`, of the half that was asked for; a file of held-out records is used whole."""
        if self.options.half is not None:
            records = half_of(records, self.options.half)
        super().split(records, held_out)

    def _model(self) -> PreTrainedModel:
        options, dtype, seed = self.options, DTYPES[self.options.dtype], self.args.seed
        self.fresh = []
        if options.model_config is not None:
            return build_model(options.model_config, self.tokenizer, seed, dtype, classifier=True)
        assert options.model is not None
        model, self.fresh = load_classifier(options.model, dtype, options.attn_implementation, seed)
        return model

    def _trainer(self, **given: Any) -> RewardTrainer:
        return RewardTrainer(self.model, self.args, **given)

    @property
    def shared(self) -> int:
        """How many held-out records have a prompt that training also has."""
        return shared_prompts(self.train_records, self.held_out)

    @property
    def max_length(self) -> int | None:
        """Tokens that rows are cut to, in training and by whoever scores with the model."""
        return reward_limit(self.tokenizer)

    def longer_wins(self) -> PairAccuracy:
        """How often the longer response of a held-out pair is the better one."""
        pairs = self._held_out_pairs()
        return pair_accuracy(*pairs.longer_wins(), pairs.prompts)

    def _held_out_pairs(self) -> PairedDataset:
        found = self.trainer.eval_dataset
        assert isinstance(found, PairedDataset)
        return found

    def _evaluate(self) -> dict[str, Any]:
        pairs = self._held_out_pairs()
        found = self.trainer.predict(pairs, metric_key_prefix="eval")
        accuracy = pair_accuracy(*prompt_results(found.predictions), pairs.prompts)
        return {**(found.metrics or {}), **accuracy.as_dict()}

    def _evaluated(self) -> None:
        """Nothing: what training finds has no interval."""

    def report(self) -> None:
        """As `Run`, with the accuracy in `reward_model.json`; an adapter is merged into its model first."""
        if self._adapter is not None:
            merged: Any = self.trainer.model
            self.trainer.model = self.trainer.model_wrapped = merged.merge_and_unload()
        super().report()
        if self.args.process_index == 0:
            write_json(os.path.join(self.folder, REWARD_FILE), self.description())

    def description(self) -> dict[str, Any]:
        """What `reward_model.json` holds: the held-out accuracy, on what it was found and what was trained."""
        none = {"accuracy": None, "interval": None}
        train, options = self.trainer.train_dataset, self.options
        found: dict[str, Any] = {name: self.after.get(name) for name in none}
        found |= {"prompts": 0, "pairs": 0, "longer_wins": none, "chance": CHANCE}
        if self.held_out:
            longer = self.longer_wins()
            found |= {"prompts": longer.prompts, "pairs": longer.pairs, "longer_wins": longer.as_dict()}
        return {
            **found,
            "before": {name: self.before.get(name) for name in none},
            "seed": self.args.seed,
            "half": options.half,
            "pairs_by": "reward" if options.rank_by_reward else "rank",
            **{"train_file": None, "eval_file": None, **self.identity.data},
            "train_prompts": len(train),
            "train_pairs": train.pairs,
            "max_length": self.max_length,
            BLANK: train.blank,
            "steps": self.trainer.state.global_step,
            # Of the weights, where they are not those of the last step.
            **{name: value for name, value in self.after.items() if name == "eval_step"},
        }


def trained_accuracy(path: str) -> dict[str, Any] | None:
    """accuracy, interval and prompts of `reward_model.json` in a reward model's folder; None where it says none."""
    file_name = os.path.join(path, REWARD_FILE)
    if not os.path.isfile(file_name):
        return None
    with open(file_name, encoding="utf-8") as file:
        found = json.load(file)
    if found.get("accuracy") is None:
        return None
    return {name: found.get(name) for name in ("accuracy", "interval", "prompts")}
