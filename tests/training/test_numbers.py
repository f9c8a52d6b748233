"""Settings that are numbers of numpy's kind, as pandas and `np.random` give them: taken as Python's, wherever."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clha_fast import HeadOptions
from clha_fast.batching.sampling import TokenBudgetSampler
from clha_fast.batching.workers import check_num_proc
from clha_fast.data.prepare import _dev_limit
from clha_fast.data.records import RecordError
from clha_fast.generation.answers import generate_answers
from clha_fast.generation.backend import GenerationSettings
from clha_fast.hf import CLHAConfig, RankedCollator
from clha_fast.models.forward import checked_scale
from clha_fast.models.tiled import check_rows
from clha_fast.objectives import OBJECTIVES
from clha_fast.planning.plan import Load
from clha_fast.training.reward_trainer import RewardConfig
from clha_fast.training.rollout import RolloutConfig
from tests.support.trainers import TOKENIZER

WHOLE = ("max_length", "pad_to_multiple_of", "dataset_num_proc")
OWN = [
    *((CLHAConfig, name, np.int64(3)) for name in (*WHOLE, "data_seed", "seed", "gradient_accumulation_steps")),
    *((CLHAConfig, name, np.uint16(3)) for name in ("max_prompt_length", "max_completion_length", "workspace_mb")),
    *((CLHAConfig, name, np.int32(3)) for name in ("max_tokens_per_batch", "eval_samples", "eval_sample_tokens")),
    *((CLHAConfig, name, np.float32(0.25)) for name in ("margin", "reward_margin", "rank_weight", "sft_weight")),
    *(
        (CLHAConfig, name, np.float64(0.25))
        for name in ("reward_floor", "temperature", "learning_rate", "weight_decay")
    ),
    *((CLHAConfig, name, np.float16(0.25)) for name in ("max_dropped_mass", "eval_sample_temperature")),
    *((RewardConfig, name, np.int16(3)) for name in (*WHOLE, "data_seed", "per_device_train_batch_size")),
    *((RolloutConfig, name, np.int64(3)) for name in ("answers_per_prompt", "rollout_steps", "max_prompt_length")),
    (CLHAConfig, "sequence_parallel_size", np.int64(1)),
    (CLHAConfig, "drop_inert", np.bool_(False)),
    (CLHAConfig, "tiled_mlp", np.int64(3)),
]


@pytest.mark.parametrize(
    ("kind", "name", "value"), OWN, ids=[f"{kind.__name__}-{name}-{type(value).__name__}" for kind, name, value in OWN]
)
def test_of_a_configuration(tmp_path: Path, kind: Any, name: str, value: Any) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    config, same = kind(**settings, **{name: value}), kind(**settings, **{name: value.item()})
    assert type(getattr(config, name)) is type(getattr(same, name))
    assert json.loads(config.to_json_string()) == json.loads(same.to_json_string())
    if name in ("max_length", "max_prompt_length"):
        assert getattr(kind(**settings, **{name: None}), name) is None
    if isinstance(value, np.bool_) or name == "tiled_mlp":
        return
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got True"):
        kind(**settings, **{name: True})
    if isinstance(value, np.integer):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got 2\.5"):
            kind(**settings, **{name: 2.5})


@pytest.mark.parametrize("kind", [CLHAConfig, RewardConfig, RolloutConfig])
@pytest.mark.parametrize("given", [None, "auto", "1e-3", 2.5, np.float32(0.25)], ids=repr)
def test_fields_of_a_users_subclass_are_the_users(tmp_path: Path, kind: Any, given: Any) -> None:
    def settle(self: Any) -> None:
        kind.__post_init__(self)
        self.made = 3

    fields: list[Any] = [("alpha", float, 0.1), ("every", int, 1), ("made", int, dataclasses.field(init=False))]
    mine = dataclasses.make_dataclass("Mine", fields, bases=(kind,), namespace={"__post_init__": settle})
    config: Any = mine(str(tmp_path), use_cpu=True, alpha=given, every=given)
    assert (config.alpha, config.every, config.made) == (given, given, 3)
    with pytest.raises(ValueError, match=r"^max_length: expected a whole number, got 2\.5"):
        mine(str(tmp_path), use_cpu=True, max_length=2.5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_of_an_objective_in_a_configuration(tmp_path: Path, name: str) -> None:
    numbers = numeric(OBJECTIVES[name])
    given = {"name": name, **{field: np.float64(value) for field, value in numbers.items()}}
    config = CLHAConfig(output_dir=str(tmp_path), use_cpu=True, objective=given)
    assert config.loss_options() == OBJECTIVES[name]()
    assert json.loads(config.to_json_string())


@pytest.mark.parametrize("kind", [HeadOptions, *OBJECTIVES.values()], ids=lambda kind: str(kind.__name__))
def test_of_an_options_object(kind: Any) -> None:
    given = {name: np.float32(2 * value) for name, value in numeric(kind).items()}
    options = kind(**given)
    assert options.encoded == kind(**{name: value.item() for name, value in given.items()}).encoded
    assert {type(getattr(options, name)) for name in given} <= {float}


def numeric(kind: Any) -> dict[str, float]:
    """Fields whose default is a float; of binary fractions alone float32 makes the same again."""
    return {field.name: field.default for field in dataclasses.fields(kind) if type(field.default) is float}


def collated(value: Any) -> list[Any]:
    collator = RankedCollator(
        TOKENIZER, max_length=value, max_prompt_length=value, max_completion_length=value, pad_to_multiple_of=value
    )
    return [
        *(collator.max_length, collator.max_prompt_length, collator.max_completion_length, collator.pad_to_multiple_of)
    ]


def sampled(value: Any) -> list[Any]:
    sampler = TokenBudgetSampler([(2, 1)], value, num_processes=value)
    return [sampler.max_tokens, sampler.num_processes]


def answered(value: Any) -> list[Any]:
    settings = GenerationSettings(max_new_tokens=value, max_prompt_length=value, temperature=value, seed=value)
    with pytest.raises(RecordError, match="prompts: expected at least one"):
        generate_answers([], None, settings, batch_size=value)  # type: ignore[arg-type]
    return [settings.max_new_tokens, settings.max_prompt_length, settings.temperature, settings.seed]


def planned(value: Any) -> list[Any]:
    return list(dataclasses.asdict(Load(value, value, value, value, sequence_parallel_size=value)).values())


@pytest.mark.parametrize("number", [np.int64(4), np.uint8(4), np.int16(4)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("used", [collated, sampled, answered, planned, lambda value: [check_rows(value)]])
def test_of_what_takes_whole_numbers(used: Callable[[Any], list[Any]], number: Any) -> None:
    found = used(number)
    assert found == used(4)
    assert not [value for value in found if isinstance(value, np.generic)]
    check_num_proc(number)
    assert _dev_limit(set(range(9)), number) == _dev_limit(set(range(9)), 4)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_of_what_takes_fractions(number: Any) -> None:
    settings = GenerationSettings(temperature=number, top_p=number)
    assert settings == GenerationSettings(temperature=0.5, top_p=0.5)
    assert {type(settings.temperature), type(settings.top_p)} == {float}
    assert checked_scale(number) == 0.5
    for name in ("temperature", "top_p", "seed", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got True"):
            GenerationSettings(**{name: True})  # type: ignore[arg-type]
