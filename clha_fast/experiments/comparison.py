"""A comparison of methods as its configuration says it: data, base model, methods, seeds, budget, evaluation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from clha_fast.experiments.corruption import Corruption
from clha_fast.experiments.methods import Method, parse_methods
from clha_fast.experiments.run import RunOptions
from clha_fast.messages import check_keys
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.training.config import CLHAConfig
from clha_fast.training.rollout import RolloutConfig

BASE_NAME = "base"
Criterion = Literal["reward", "accuracy", "nll"]


@dataclass(frozen=True)
class Files:
    """Ranked files of one ranking length: `train`; `dev`, on which learning rates are chosen; `test`, reported."""

    train: str
    dev: str
    test: str


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        output_dir: everything is written below it; the same configuration continues what is there.
        data: ranking length -> its files. The key stands in the table, it is not checked against the records.
        base: the model that every method starts from: a path or name; or `pretrain`, options of `clha-fast train` for
            a small one that is first made a language model of the training texts.
        methods, checkpoints: rows; a checkpoint (label -> path) is evaluated without training.
        seeds: of training. learning_rates: each method tries all of them with the first seed, and keeps the one that
            is best on dev by `criterion`.
        criterion: "reward" (of greedy answers, by the label model), "accuracy" (ranking, all ordered pairs) or "nll"
            (of the best answer, a token); None is "reward" where there is a label model, else "accuracy".
        budget_tokens: scored tokens that every method trains on (to the next step, inert candidates not counted; of
            rollouts, if no answer ended early); None leaves `num_train_epochs` of `settings`.
        settings: fields of `CLHAConfig` for all methods. run: of `RunOptions` (dtype, peft_config, ...).
        reward_models: `label` chooses on dev, `evaluation` is reported: paths, or `{train: {...}}`, options of
            `clha-fast reward-model train`.
        generation: of `clha-fast generate`, and `batch_size`.
        evaluation: `reward_margin` and `noise_rule`, by which test pairs count as kept, alike for all methods.
        test_limit, dev_limit: first prompts of each subset; None is all.
        keep_models: False removes a cell's weights once it is evaluated.
        corruptions: what is done to the training file; (None,) is nothing. label_model: of `reward_models`, once it is
            there.
    """

    output_dir: str
    data: Mapping[str, Files]
    base: str | None
    pretrain: Mapping[str, Any] | None
    methods: Sequence[Method]
    checkpoints: Sequence[Method] = ()
    seeds: Sequence[int] = (1,)
    learning_rates: Sequence[float] = (1e-5,)
    criterion: Criterion | None = None
    budget_tokens: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    reward_models: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    test_limit: int | None = None
    dev_limit: int | None = None
    keep_models: bool = True
    corruptions: Sequence[Corruption | None] = (None,)
    label_model: str | None = None


# Of a run's options those that each cell sets.
_SET = ("train_file", "eval_file", "eval_fraction", "model", "model_config", "resume", "overwrite")
_KEYS = tuple(
    f.name for f in dataclasses.fields(Comparison) if f.name not in ("pretrain", "corruptions", "label_model")
)


def parse_comparison(given: Mapping[str, Any], more: Sequence[str] = ()) -> Comparison:
    """A comparison from a configuration file's mapping; keys in `more` are somebody else's.

    Raises:
        ValueError: what is missing, unknown or out of range, by name.
    """
    check_keys("configuration", given, (*_KEYS, *more))
    values = {name: value for name, value in given.items() if name in _KEYS}
    output_dir = values.get("output_dir")
    if not isinstance(output_dir, str) or not output_dir:
        raise ValueError(f"output_dir: expected a folder for the comparison, got {output_dir!r}")
    base, pretrain = _base(values.get("base"))
    criterion = values.get("criterion")
    if criterion is not None and criterion not in get_args(Criterion):
        raise ValueError(f"criterion: expected one of {', '.join(get_args(Criterion))}, got {criterion!r}")
    settings = _mapping(values, "settings")
    run = _mapping(values, "run")
    for name in _SET:
        if name in run:
            raise ValueError(f"run: expected no {name}, which the comparison sets itself")
    check_keys("run", run, [f.name for f in dataclasses.fields(RunOptions)])
    reward_models = _mapping(values, "reward_models")
    check_keys("reward_models", reward_models, ("label", "evaluation"))
    for name, value in reward_models.items():
        if not isinstance(value, str) and not (isinstance(value, Mapping) and set(value) == {"train"}):
            raise ValueError(f"reward_models.{name}: expected a path or `train: {{...}}`, got {value!r}")
        if isinstance(value, str):
            reward_models[name] = os.path.expanduser(value)
    if criterion == "reward" and "label" not in reward_models:
        raise ValueError("criterion: expected reward_models.label, which judges dev answers, for 'reward', got none")
    evaluation = _mapping(values, "evaluation")
    check_keys("evaluation", evaluation, ("reward_margin", "noise_rule"))
    CLHAOptions(**evaluation)
    methods = parse_methods(values["methods"]) if "methods" in values else []
    config = RolloutConfig if methods and all(method.rollout for method in methods) else CLHAConfig
    check_keys("settings", settings, [f.name for f in dataclasses.fields(config) if f.init])
    checkpoints = _checkpoints(_mapping(values, "checkpoints"))
    for method in methods:
        if method.name in (BASE_NAME, *(other.name for other in checkpoints)):
            raise ValueError(f"methods: expected names that neither a checkpoint nor the base has, got {method.name!r}")
        if values.get("budget_tokens") is not None and "max_tokens_per_batch" in {**settings, **method.settings}:
            raise ValueError(
                "budget_tokens: expected no max_tokens_per_batch beside it, with which the batches of methods differ, "
                "got both"
            )
        if method.rollout and "label" not in reward_models:
            raise ValueError(
                f"reward_models: expected a label model, which judges what {method.name} answers, got none"
            )
    for name in ("budget_tokens", "test_limit", "dev_limit"):
        value = values.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
    for name in ("output_dir", "seed", "learning_rate", "objective"):
        if name in settings:
            sets = "each method sets for itself" if name == "objective" else "the comparison sets itself"
            raise ValueError(f"settings: expected no {name}, which {sets}")
    if values.get("budget_tokens") is not None and {"max_steps", "num_train_epochs"} & set(settings):
        raise ValueError("budget_tokens: expected neither max_steps nor num_train_epochs in settings beside it")
    keep_models = values.get("keep_models", True)
    if not isinstance(keep_models, bool):
        raise ValueError(f"keep_models: expected true or false, got {keep_models!r}")
    return Comparison(
        output_dir=os.path.expanduser(output_dir),
        data=_data(values.get("data")),
        base=base,
        pretrain=pretrain,
        methods=methods,
        checkpoints=checkpoints,
        seeds=_numbers(values, "seeds", (1,), int),
        learning_rates=_numbers(values, "learning_rates", (1e-5,), float),
        criterion=criterion,
        budget_tokens=values.get("budget_tokens"),
        settings=settings,
        run=run,
        reward_models=reward_models,
        generation=_mapping(values, "generation"),
        evaluation=evaluation,
        test_limit=values.get("test_limit"),
        dev_limit=values.get("dev_limit"),
        keep_models=keep_models,
    )


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping, got {value!r}")
    return dict(value)


def _base(value: Any) -> tuple[str | None, Mapping[str, Any] | None]:
    if isinstance(value, str) and value:
        return os.path.expanduser(value), None
    if isinstance(value, Mapping) and set(value) == {"pretrain"} and isinstance(value["pretrain"], Mapping):
        return None, dict(value["pretrain"])
    raise ValueError(f"base: expected a model's path or name, or `pretrain: {{...}}`, got {value!r}")


def _data(value: Any) -> dict[str, Files]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"data: expected files by ranking length, such as 2: {{train, dev, test}}, got {value!r}")
    found = {}
    for length, files in value.items():
        if not isinstance(files, Mapping) or set(files) != {"train", "dev", "test"}:
            raise ValueError(f"data.{length}: expected the files train, dev and test, got {files!r}")
        for name, path in files.items():
            if not isinstance(path, str):
                raise ValueError(f"data.{length}.{name}: expected a path, got {path!r}")
        places = {name: os.path.expanduser(path) for name, path in files.items()}
        real = {name: os.path.realpath(path) for name, path in places.items()}
        for name in ("train", "dev"):
            if real[name] == real["test"]:
                raise ValueError(
                    f"data.{length}: expected different files for {name} and test, got {files['test']} for both: what "
                    "was trained or chosen on the file that is reported flatters every method"
                )
        found[str(length)] = Files(**places)
    return found


def _checkpoints(given: Mapping[str, Any]) -> list[Method]:
    found: list[Method] = []
    for label, path in given.items():
        if not isinstance(path, str):
            raise ValueError(f"checkpoints.{label}: expected a model's path or name, got {path!r}")
        name = "".join(c if c.isalnum() or c in "_.-" else "-" for c in str(label))
        if name in (BASE_NAME, *(other.name for other in found)):
            raise ValueError(
                f"checkpoints.{label}: expected labels that differ in letters and digits, and none called "
                f"{BASE_NAME!r}, got two for {name!r}"
            )
        found.append(Method(name, str(label), {}, os.path.expanduser(path)))
    return found


def _numbers(values: Mapping[str, Any], name: str, default: Sequence[Any], kind: type) -> tuple[Any, ...]:
    given = values.get(name, default)
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{name}: expected a list of numbers, got {given!r}")
    found = []
    for value in given:
        try:
            number = kind(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected numbers, got {value!r}") from None
        if isinstance(value, bool) or number < 0 or (kind is int and number != float(value)):
            expected = "whole numbers of at least 0" if kind is int else "positive numbers"
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        found.append(number)
    if len(set(found)) < len(found):
        raise ValueError(f"{name}: expected each number once, got {list(given)!r}")
    return tuple(found)
