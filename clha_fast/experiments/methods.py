"""Methods of a comparison: a label, and the settings of `CLHAConfig` that make a training run this method's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clha_fast.data.records import RankedRecord
from clha_fast.messages import check_keys, nearest
from clha_fast.objectives import OBJECTIVES
from clha_fast.objectives.pairs import COMPARED
from clha_fast.training.config import CLHAConfig
from clha_fast.training.rollout import RolloutConfig

# How a method is called in a table. `policy` trains on given answers, so it is not called RLHF.
LABELS = {
    "clha": "CLHA",
    "pro": "PRO",
    "rrhf": "RRHF",
    "sft": "SFT",
    "coh": "CoH",
    "dpo": "DPO",
    "simpo": "SimPO",
    "ipo": "IPO",
    "orpo": "ORPO",
    "cpo": "CPO",
    "hinge": "hinge",
    "rlhf": "RLHF",
    "policy": "offline clipped policy gradient",
}
_QUANTILE = re.compile(r"q(0(\.\d+)?|1(\.0+)?|\.\d+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
# Set by the comparison itself, for all methods alike.
_SHARED = ("output_dir", "seed", "learning_rate", "max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Method:
    """A row of a comparison.

    Attributes:
        name: in folders and files. label: in tables.
        settings: fields of `CLHAConfig`; {} for a row without training. `reward_margin` may be a quantile of the
            absolute reward differences of the training file, such as "q0.5".
        rollout: whether it trains on answers that it samples itself (`RolloutConfig`, judged by the label model).
        checkpoint: a model that is evaluated as it is, in place of training.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    rollout: bool = False

    @property
    def trains(self) -> bool:
        return self.checkpoint is None


def parse_methods(given: Sequence[Any]) -> list[Method]:
    """Methods from a configuration: names of objectives, or mappings `{name, label, ...}` of `CLHAConfig`'s fields.

    "rlhf", or a mapping with `rollout: true`, samples its answers; its fields are those of `RolloutConfig`.

    Raises:
        ValueError: no method, an unknown objective or field, a field that is set for all methods alike, a name twice.
    """
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"methods: expected a list of methods, such as [sft, clha], got {given!r}")
    methods = [_parse(entry, f"methods[{number}]") for number, entry in enumerate(given)]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"methods: expected each name once, got {name!r} {names.count(name)} times")
    return methods


def _parse(entry: Any, place: str) -> Method:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{place}: expected the name of an objective or a mapping with `name`, got {entry!r}")
    settings = {name: value for name, value in entry.items() if name not in ("name", "label", "rollout")}
    name = entry["name"]
    rollout = entry.get("rollout", name == "rlhf")
    if not isinstance(rollout, bool):
        raise ValueError(f"{place}: expected `rollout` to be true or false, got {rollout!r}")
    config = RolloutConfig if rollout else CLHAConfig
    if not _NAME.fullmatch(name):
        raise ValueError(f"{place}: expected a name of letters, digits and _.+-, got {name!r}")
    known = [f.name for f in dataclasses.fields(config) if f.init and f.name not in _SHARED]
    for taken in _SHARED:
        if taken in settings:
            raise ValueError(f"{place}: expected none of {', '.join(_SHARED)} (they are alike for all), got {taken}")
    check_keys(place, settings, known)
    objective = settings.get("objective", "policy" if rollout else name)
    for place_of in (settings, objective):
        if isinstance(place_of, Mapping) and isinstance(place_of.get("reward_margin"), str):
            check_quantile(place_of["reward_margin"], f"{place}: ")
    objective_name = objective.get("name") if isinstance(objective, Mapping) else objective
    if objective_name not in OBJECTIVES:
        raise ValueError(
            f"{place}: expected `objective` to be one of {', '.join(OBJECTIVES)}, got {objective_name!r}"
            f"{nearest(str(objective_name), OBJECTIVES)}"
        )
    settings["objective"] = objective
    label = entry.get("label", LABELS.get(name, name))
    return Method(name, str(label), settings, rollout=rollout)


def with_quantiles(settings: Mapping[str, Any], records: Sequence[RankedRecord]) -> dict[str, Any]:
    """Settings with a `reward_margin` such as "q0.5" made a number: that quantile of |r_i - r_j| over all pairs.

    Raises:
        ValueError: another text; no rewards, or no pair of them.
    """
    found = dict(settings)
    objective = found.get("objective")
    if isinstance(objective, Mapping):
        found["objective"] = with_quantiles(objective, records)
    value = found.get("reward_margin")
    if not isinstance(value, str):
        return found
    check_quantile(value)
    gaps = reward_gaps(records)
    if not gaps.size:
        raise ValueError(f"reward_margin: expected records with rewards for the quantile {value}, got none")
    found["reward_margin"] = float(np.quantile(gaps, float(value[1:])))
    return found


def without_quantiles(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose margins by quantile are left to their defaults."""
    left = {name: value for name, value in settings.items() if name != "reward_margin" or not isinstance(value, str)}
    if isinstance(left.get("objective"), Mapping):
        left["objective"] = without_quantiles(left["objective"])
    return left


def check_quantile(text: str, place: str = "") -> None:
    """ValueError for a text that is no quantile."""
    if not _QUANTILE.fullmatch(text):
        raise ValueError(
            f"{place}reward_margin: expected a number, or a quantile from q0 to q1 such as q0.5, got {text!r}"
        )


def reward_gaps(records: Sequence[RankedRecord]) -> np.ndarray:
    """float64 [pairs], |r_i - r_j| of all pairs i < j of all prompts that have rewards.

    Subtracted in `pairs.COMPARED`, as the loss does, or a margin that is a pair's gap would be a last bit off it, and
    the pair kept.
    """
    parts = []
    for record in records:
        if record.rewards is not None:
            rewards = torch.tensor(record.rewards, dtype=COMPARED).numpy()
            above = np.triu_indices(len(rewards), 1)
            parts.append(np.abs(rewards[above[0]] - rewards[above[1]]).astype(np.float64))
    return np.concatenate(parts) if parts else np.zeros(0)
