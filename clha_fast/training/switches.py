"""Settings that do nothing unless another one is set: which one, and the sentence that says so."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers.utils import logging

logger = logging.get_logger(__name__)


class _Switch(NamedTuple):
    """A setting under which others act.

    Attributes:
        name: of it. wanted: a value that it may have, as it is said. on: whether its value is such a one.
    """

    name: str
    wanted: str
    on: Callable[[Any], bool]


def _named(value: Any) -> Any:
    return getattr(value, "value", value)


_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_EVALUATES = _Switch("eval_strategy", "'steps' (or 'epoch')", lambda value: value != "no")
_EVALUATES_BY_STEPS = _Switch("eval_strategy", "'steps'", lambda value: value == "steps")
_LOGS = _Switch("logging_strategy", "'steps'", lambda value: value == "steps")
_SAVES = _Switch("save_strategy", "'steps'", lambda value: value == "steps")
_PUSHES = _Switch("push_to_hub", "True (or a call of trainer.push_to_hub)", bool)
_RECOMPUTES = _Switch("gradient_checkpointing", "True", bool)
_RECOMPUTES_TOO = _Switch("activation_checkpointing", "True", bool)
_SHARDS = _Switch(
    "fsdp", "True", lambda value: bool(value) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
)
_SAMPLES = _Switch("eval_samples", "1 (or more)", bool)
_WARMS = _Switch(
    "lr_scheduler_type", "'constant_with_warmup' (or another that warms up)", lambda value: value not in _NO_WARMUP
)
_WATCHES = _Switch("metric_for_best_model", "'eval_loss' (or another)", lambda value: value is not None)
_BY_PROMPTS = _Switch("max_tokens_per_batch", "None", lambda value: value is None)
_LOADS_BEST = _Switch("load_best_model_at_end", "True", bool)
_GOES_BY_METRIC = _Switch("lr_scheduler_type", "'reduce_lr_on_plateau'", lambda value: value in _NO_WARMUP[1:])
# Setting -> the switches of which one is enough; the first is the one that is advised.
SWITCHES: dict[str, tuple[_Switch, ...]] = {
    "eval_steps": (_EVALUATES_BY_STEPS,),
    "eval_delay": (_EVALUATES,),
    "metric_for_best_model": (_EVALUATES,),
    "greater_is_better": (_WATCHES, _LOADS_BEST, _GOES_BY_METRIC),
    "logging_steps": (_LOGS, _EVALUATES_BY_STEPS),  # eval_steps are these unless given
    "save_steps": (_SAVES,),
    "per_device_train_batch_size": (_BY_PROMPTS,),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"), (_PUSHES,)
    ),
    "gradient_checkpointing_kwargs": (_RECOMPUTES, _RECOMPUTES_TOO),
    "activation_checkpointing_kwargs": (_RECOMPUTES_TOO, _RECOMPUTES),
    "fsdp_config": (_SHARDS,),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), (_WARMS,)),
    **dict.fromkeys(("eval_sample_tokens", "eval_sample_temperature"), (_SAMPLES,)),
}


def defaults_of(config_class: type[Any]) -> dict[str, Any]:
    """The fields of a configuration with the values that they have unless told."""
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def idle_settings(settings: Mapping[str, Any], config_class: type[Any]) -> dict[str, str]:
    """Settings that do nothing as the others are -> a sentence with the way out.

    Args:
        settings: of a configuration of this class, before transformers makes anything of them, or after, as a copy has
            them; what is missing has its default.
    """
    defaults = defaults_of(config_class)
    values = {**defaults, **{name: value for name, value in settings.items() if name in defaults}}
    found = {}
    for name, switches in SWITCHES.items():
        known = [switch for switch in switches if switch.name in values]
        if name not in values or not known or any(switch.on(_named(values[switch.name])) for switch in known):
            continue
        if not (_untouched(values[name], defaults[name]) or _filled_in(name, values)):
            switch = known[0]
            found[name] = (
                f"{name}: acts with {switch.name}={switch.wanted}, which is {_named(values[switch.name])!r} here; "
                f"give both, or leave {name} out"
            )
    return found


def _untouched(value: Any, default: Any) -> bool:
    return value is None or value == "" or value == {} or _named(value) == _named(default)


def _filled_in(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a value is one that transformers has put there, of a configuration that this one is a copy of."""
    if name == "gradient_checkpointing_kwargs":
        return bool(values[name] == values.get("activation_checkpointing_kwargs"))  # one goes by both names
    if name == "fsdp_config":
        return isinstance(values[name], Mapping) and not any(values[name].values())  # in older releases
    filled = {"eval_steps": values["logging_steps"], "metric_for_best_model": "loss"}
    # It has set `do_eval` wherever it has filled in these.
    return bool(values["do_eval"]) and (name == "greater_is_better" or values[name] == filled.get(name, ...))


def say_idle(args: Any, idle: Mapping[str, str]) -> None:
    """Warn of `idle_settings`, each once and in the first process alone."""
    if args.process_index == 0:
        for sentence in idle.values():
            logger.warning_once(sentence)
