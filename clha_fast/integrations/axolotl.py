"""axolotl trains on ranked responses: a plugin with arguments of its own, its data sets and its trainer.

In a configuration::

    plugins:
      - clha_fast.integrations.axolotl.RankedPlugin
    clha_objective: simpo
    datasets:
      - path: ranked.jsonl

Models, adapters, schedules and saving are axolotl's.
"""

from __future__ import annotations

import array
import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any

import datasets
import pydantic
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import load_tokenizer
from packaging.version import Version

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.data import read_records
from clha_fast.models.attach import attach
from clha_fast.objectives import Objective
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.training.objective import as_mapping, make

OLDEST = (0, 21)
# What axolotl would do to rows of one text each, or with a loss of its own.
_REFUSED = (
    "rl",
    "reward_model",
    "process_reward_model",
    "sample_packing",
    "eval_sample_packing",
    "batch_flattening",
    "balance_labels",
    "pretraining_dataset",
    "streaming",
    "val_set_size",
    "test_datasets",
    "use_eaft",
    "use_dft",
    "orpo_alpha",
    "pad_to_sequence_len",
    "fix_untrained_tokens",
    "trainer_cls",
    "group_by_length",
    "do_bench_eval",
    "use_ray",
)
# What axolotl itself writes into each of `datasets`.
_DEFAULTS = {"message_property_mappings": {"role": "role", "content": "content"}}


class RankedArguments(pydantic.BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        clha_objective: a name (`clha`, `simpo`, ...), or a mapping with `name` and its settings. One that needs a
            reference's log-probabilities finds them in the files, where `clha-fast score --policy` puts them.
        clha_layout: of the rows, as `clha_fast.attach`: `padded`, `packed` or `shared`.
    """

    clha_objective: str | dict[str, Any] = "clha"
    clha_layout: str = "padded"


class RankedPlugin(BasePlugin):
    """`datasets` are files that `clha_fast.data.read_records` reads; `sequence_len` cuts them as `RankedCollator` does.

    Raises:
        ImportError: axolotl is older than was tried.
        ValueError: an option of axolotl's that would be ignored; as `attach`, `RankedCollator` and the objective.
        RecordError: as `read_records`.
    """

    def __init__(self) -> None:
        super().__init__()
        version = importlib.metadata.version("axolotl")
        if Version(version).release[:2] < OLDEST:
            raise ImportError(f"axolotl: expected 0.21 or newer, got {version}")

    def get_input_args(self) -> str:
        return f"{__name__}.{RankedArguments.__name__}"

    def get_trainer_cls(self, cfg: Any) -> Any:
        return RankedTrainer

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta:
        for name in _REFUSED:
            if cfg.get(name):
                raise ValueError(f"{name}: expected none beside RankedPlugin, got {cfg.get(name)!r}; leave it out")
        for name in ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size"):
            if (cfg.get(name) or 1) > 1:
                raise ValueError(f"{name}: expected 1 beside RankedPlugin, got {cfg.get(name)}")
        objective = _objective(cfg)
        collator = _collator(load_tokenizer(cfg), objective, cfg)
        train = _table(cfg.get("datasets"), collator)
        steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
        return TrainDatasetMeta(train, None, min(steps, cfg.max_steps) if cfg.max_steps else steps)


class RankedTrainer(AxolotlTrainer):
    """axolotl's trainer with the ranking loss: means are those of the whole step, however it is split."""

    reports_token_perplexity = False  # a ranking loss is none

    @classmethod
    def requires_all_columns(cls, cfg: Any) -> bool:
        return True

    def post_set_axolotl_cfg(self) -> None:
        super().post_set_axolotl_cfg()
        cfg = self.axolotl_cfg
        objective = _objective(cfg)
        model = self.accelerator.unwrap_model(self.model)
        self.attached = attach(model, objective, layout=cfg.clha_layout)
        self.data_collator = self.eval_data_collator = _collator(self.processing_class, objective, cfg)
        self.args.include_tkps = False  # axolotl's own count is of labels, which these batches have not
        # The loss is of the whole step already: Trainer takes the mean over micro-batches.
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        counts = self.attached.counts(samples)
        return [{**batch, **counts} for batch in samples], None


def _objective(cfg: Any) -> Objective:
    given = cfg.clha_objective
    settings = as_mapping(dict(given) if isinstance(given, Mapping) else given)
    preset = settings.pop("preset", None)  # CLHA's alone
    if preset is None:
        return make(settings)
    return make({**dataclasses.asdict(CLHAOptions.preset(preset)), **settings})


def _collator(tokenizer: Any, objective: Objective, cfg: Any) -> RankedCollator:
    layout = cfg.clha_layout
    return RankedCollator(tokenizer, objective, max_length=cfg.sequence_len, layout=layout)


def _table(sets: Any, collator: RankedCollator) -> datasets.Dataset:
    """The prompts of some files, tokenised, as axolotl takes them."""
    records = []
    for given in sets or ():
        extra = sorted(key for key, value in given.items() if key != "path" and value and value != _DEFAULTS.get(key))
        if extra:
            raise ValueError(f"datasets: expected path alone beside RankedPlugin, got {', '.join(extra)} as well")
        records += read_records(given["path"])
    features = RankedDataset(records, collator)
    rows = [{name: _lists(value) for name, value in features[k].items()} for k in range(len(features))]
    return datasets.Dataset.from_list(rows)


def _lists(value: Any) -> Any:
    """Arrow infers no type from arrays of the standard library."""
    return [_lists(item) for item in value] if isinstance(value, (list, tuple, array.array)) else value
