"""RLHF from files to a folder: `Run`, on prompts that the policy answers itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha_fast.data.prompts import Prompted, prompt_hash, read_prompts
from clha_fast.data.records import SKIPS, RecordError
from clha_fast.evaluation.accuracy import mean_interval
from clha_fast.evaluation.intervals import import_scipy
from clha_fast.experiments.run import METRICS_FILE, Run, RunOptions
from clha_fast.files import RunIdentity
from clha_fast.generation.prompts import trained_lead, trained_prefix
from clha_fast.reports.run_page import REPORT_FILE
from clha_fast.rewards.answers import AnswerRewards
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.training.rollout import METRICS, RolloutConfig, RolloutTrainer
from clha_fast.training.validation import check_best_metric

# Fields of RunOptions that mean nothing where prompts are read and a trained model goes on.
_NOTHING: dict[str, Any] = {
    "rank_by_reward": False,
    "model_config": None,
    "build_tokenizer": None,
}


@dataclass
class RolloutRunOptions(RunOptions):
    """`RunOptions` for rollouts.

    Attributes:
        train_file, eval_file: any file that `data.prompts.read_prompts` reads; responses in it are not used.
        reward_model: a sequence classifier, such as `clha-fast reward-model train` makes; label: which logit.
        lead: what prompts of messages end with, as in `GenerationSettings`; None is that of the run which has trained
            the model, where one is known.
    """

    reward_model: str | None = None
    label: int | None = None
    lead: str | None = None

    def check(self) -> None:
        """As `RunOptions`."""
        for name, none in _NOTHING.items():
            if getattr(self, name) != none:
                raise ValueError(
                    f"{name}: expected {none!r} where a model answers prompts, got {getattr(self, name)!r}"
                )
        if self.model is None:
            raise ValueError("model: expected a folder or name of the language model to go on with, got nothing")
        super().check()
        if self.reward_model is None:
            raise ValueError("reward_model: expected a folder or name of a reward model, got nothing")


class RolloutRun(Run):
    """As `Run`; `before` and `after` also hold the mean reward's interval and each held-out prompt's reward."""

    config_class = RolloutConfig
    files = (METRICS_FILE, REPORT_FILE)
    options: RolloutRunOptions
    trainer: RolloutTrainer
    reward_model: RewardModel

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.options.eval_file is not None or self.options.eval_fraction != 0:
            import_scipy()

    def _check_best_metric(self) -> None:
        check_best_metric(self.args.metric_for_best_model, METRICS)

    def read(self) -> tuple[list[Prompted], list[Prompted] | None]:  # type: ignore[override]
        """The prompts of the training file, and of the evaluation file where there is one."""
        options = self.options
        files = [path for path in (options.train_file, options.eval_file) if path is not None]
        errors = self.skipped if options.skip_bad_records else None
        try:
            train, *held_out = (read_prompts(path, options.format, errors, columns=options.columns) for path in files)
        except RecordError as error:
            raise error if errors is not None else error.advised(SKIPS) from None
        return train, held_out[0] if held_out else None

    def build(self) -> None:
        """As `Run`, the reward model first."""
        given = self.options.reward_model
        assert given is not None
        device = str(self.args.device)
        self.reward_model = load_reward_model(given, label=self.options.label, device=device)
        super().build()

    def _identity(self) -> RunIdentity:
        found = super()._identity()
        settings = {name: value for name, value in found.settings.items() if name != "reward_model"}
        return RunIdentity(settings, {**found.data, "reward_model": self.reward_model.fingerprint()})

    def _trainer(self, **given: Any) -> RolloutTrainer:
        reward = AnswerRewards(self.reward_model, self.args.per_device_eval_batch_size)
        return RolloutTrainer(self.model, self.args, reward, lead=self.lead, answer_prefix=self.answer_prefix, **given)

    @functools.cached_property
    def lead(self) -> str | None:
        """The one asked for, or that of the run which has trained the model; no answer beside a prompt plays a part."""
        if self.options.lead is not None:
            return self.options.lead
        assert self.options.model is not None
        return trained_lead(self.options.model)

    @functools.cached_property
    def answer_prefix(self) -> str:
        """The marker of a run of `coh` that has trained the model."""
        assert self.options.model is not None
        return trained_prefix(self.options.model)

    @property
    def notes(self) -> dict[str, str | None]:
        """As `Run`, with the prefix: what is trained here must be asked with it, too."""
        return {**super().notes, "answer_prefix": self.answer_prefix or None}

    def _evaluate(self) -> dict[str, Any]:
        found = self.trainer.evaluate()
        interval = mean_interval(found["rewards"], self._prompts())
        return {**found, "interval": None if interval is None else list(interval)}

    def _evaluated(self) -> None:
        """Nothing: what training finds has no interval."""

    def gain(self) -> tuple[float, tuple[float, float] | None]:
        """How much the rewards of held-out prompts have risen on average, with the interval of paired differences."""
        gains = np.subtract(self.after["rewards"], self.before["rewards"]).tolist()
        return sum(gains) / len(gains), mean_interval(gains, self._prompts())

    def _prompts(self) -> list[str]:
        """Of each held-out answer what stands for its prompt, which a file may repeat."""
        return [prompt_hash(record) for record in self.held_out]
