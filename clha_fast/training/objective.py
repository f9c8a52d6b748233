"""Which objective a run trains, as it stands in a file: a name, or a name with settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from clha_fast.messages import nearest
from clha_fast.objectives import OBJECTIVES, Objective
from clha_fast.objectives.clha import PRESETS, CLHAOptions
from clha_fast.options import as_python

DEFAULT = CLHAOptions.name
CLHA_FIELDS = tuple(f.name for f in dataclasses.fields(CLHAOptions) if f.init)


def as_mapping(value: Any) -> dict[str, Any]:
    """{"name": of an objective, and those of its settings that are given}.

    Args:
        value: a name; such a mapping, or its JSON; an objective of the table; None is CLHA. CLHA's settings may name a
            `preset`, too.

    Raises:
        ValueError: it is none of these, or names no objective or a setting that it does not have.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"objective: expected a name, or a mapping as JSON, got {value!r}") from None
    if value is None or isinstance(value, str):
        value = {"name": DEFAULT if value is None else value}
    if isinstance(value, Objective):
        if OBJECTIVES.get(value.name) is not type(value):
            raise ValueError(
                f"objective: expected one of {', '.join(OBJECTIVES)}, got {value.label!r}, a loss of your own, which "
                "no file can hold; clha_fast.objectives.register gives its class a name, and clha_fast.attach(model, "
                "objective) trains it in a loop of your own"
            )
        return {"name": value.name, **{field: getattr(value, field) for field in settings_of(value.name)}}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        way = "; clha_fast.attach(model, function) trains a function" if callable(value) else ""
        raise ValueError(f"objective: expected a name or a mapping with a name and settings, got {value!r}{way}")
    name = value["name"]
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}{nearest(name, OBJECTIVES)}")
    known = [*settings_of(name), *(["preset"] if name == DEFAULT else [])]
    for key in value:
        if key != "name" and key not in known:
            raise ValueError(f"objective: unknown setting {key!r}{nearest(str(key), known)} ({_have(name, known)})")
    return {key: _number(name, key, item) for key, item in value.items()}


def _have(name: str, known: Iterable[str]) -> str:
    return f"{name!r} has {', '.join(known) or 'none'}"


def settings_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The settings of an objective of the table, by name."""
    return {field.name: field for field in dataclasses.fields(OBJECTIVES[name]) if field.init}


def _number(name: str, key: str, value: Any) -> Any:
    """YAML reads 1e-3 as a text: a number all the same where the setting is one. Numbers are Python's."""
    field = settings_of(name).get(key)
    if isinstance(value, str) and field is not None and "float" in str(field.type):
        try:
            return float(value)
        except ValueError:
            return value
    return as_python(value)


def make(settings: Mapping[str, Any]) -> Objective:
    """The objective of `as_mapping`.

    Raises:
        ValueError: a setting that it refuses.
    """
    fields = {key: value for key, value in settings.items() if key != "name"}
    try:
        return OBJECTIVES[settings["name"]](**fields)
    except ValueError as error:
        raise ValueError(f"objective.{error}") from error


def plain(objective: Objective) -> str | dict[str, Any]:
    """What stands for an objective in files: its name, and what differs from its defaults."""
    changed = {
        name: value
        for name, field in settings_of(objective.name).items()
        if (value := getattr(objective, name)) != field.default
    }
    # A tuple is a list there.
    return {"name": objective.name, **json.loads(json.dumps(changed))} if changed else objective.name


def settle(config: Any) -> None:
    """Puts `config.objective` into one form: `plain`, and the settings of CLHA into the fields that CLHA has.

    Raises:
        ValueError: as `as_mapping` and `make`; a setting of CLHA given twice with two values, or beside another
            objective.
    """
    whole = isinstance(config.objective, CLHAOptions)
    settings = as_mapping(config.objective)
    name = settings.pop("name")
    given = {field: getattr(config, field) for field in CLHA_FIELDS if getattr(config, field) is not None}
    if config.preset != "published":
        given["preset"] = config.preset
    if name != DEFAULT:
        _refuse_clha(name, given, alone=config.one_objective)
        config.objective = plain(make({"name": name, **settings}))
        return
    config.objective = DEFAULT
    for field, value in settings.items():
        if field in given and given[field] != value:
            raise ValueError(f"{field}: expected one value, got {given[field]!r}, and {value!r} in objective")
    if whole:
        if "preset" in given:
            raise ValueError(f"preset: expected none beside objective=CLHAOptions(...), got {config.preset!r}")
        options = CLHAOptions(**settings)
        config.preset = next((preset for preset, found in PRESETS.items() if found == options), config.preset)
        base = PRESETS[config.preset]
        settings = {field: value for field, value in settings.items() if getattr(base, field) != value}
    for field, value in settings.items():
        setattr(config, field, value)


def _refuse_clha(name: str, given: Mapping[str, Any], alone: bool) -> None:
    """`alone`: no other objective will do."""
    for field, value in given.items():
        own = settings_of(name)
        way = f"objective={{'name': {name!r}, {field!r}: {value!r}}} sets its own (--objective.{field} {value})"
        if field not in own:
            have = f"has {', '.join(own)}" if own else "has no settings"
            way = f"leave it out{'' if alone else ', or objective=' + repr(DEFAULT)} ({name!r} {have})"
        raise ValueError(
            f"{field}: expected none with objective={name!r}, for it is a setting of CLHA's, got {value!r}; {way}"
        )
