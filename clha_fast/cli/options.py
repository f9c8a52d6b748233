"""Options of `clha-fast train`: names and types from the settings' own fields, values from YAML and flags."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from clha_fast.cli.names import PRINTING, take_config, unknown
from clha_fast.cli.text import speak
from clha_fast.cli.values import OptionError, read_mapping, read_value, twice
from clha_fast.experiments.run import RunOptions
from clha_fast.messages import nearest
from clha_fast.objectives import OBJECTIVES
from clha_fast.training.config import CLHAConfig
from clha_fast.training.objective import CLHA_FIELDS, DEFAULT, settings_of
from clha_fast.training.trl_names import SETTLED


def field_hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def config_hints(config: type) -> dict[str, Any]:
    """The options that become fields of a subclass of `TrainingArguments`."""
    hints = field_hints(config)
    # The command line has its own way to say these.
    for name in ("resume_from_checkpoint", "do_train", "do_eval", "do_predict", "local_rank", "disable_tqdm"):
        hints.pop(name, None)
    # A text in TrainingArguments' own annotation, for what it was once; today it is on or off.
    return {**hints, "fsdp": bool | str | None}


RUN_HINTS = field_hints(RunOptions)
CONFIG_HINTS = config_hints(CLHAConfig)
HINTS: dict[str, Any] = {**CONFIG_HINTS, **RUN_HINTS, **dict.fromkeys(PRINTING, bool)}


def _kinds(hint: Any) -> set[type]:
    """The plain types that a hint allows; a choice of strings counts as str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return {str}
    return {origin} if isinstance(origin, type) else {str}


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that the option has.

    Raises:
        OptionError: it is of another kind.
    """
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, bool):
        if bool in kinds:
            return value
        if value is False and str in kinds:  # YAML reads the word no as false
            return "no"
    elif isinstance(value, int) and int in kinds:
        return value
    elif isinstance(value, (int, float)) and float in kinds:
        return float(value)
    elif isinstance(value, float) and value.is_integer() and int in kinds:
        return int(value)
    elif isinstance(value, (list, dict)) and type(value) in kinds:
        return value
    elif isinstance(value, str):
        if float in kinds:  # YAML reads 1e-3 as a text
            try:
                return float(value)
            except ValueError:
                pass
        if str in kinds:
            return value
    elif str in kinds and isinstance(value, (int, float)):
        return str(value)
    wanted = " or ".join(_WORDS[kind] for kind in _WORDS if kind in kinds)
    raise OptionError(f"{name}: expected {wanted}, got {value!r}")


def read_config(path: str, hints: Mapping[str, Any] = HINTS) -> dict[str, Any]:
    """The options of a YAML file, of those that `hints` has; dashes and underscores are alike.

    Raises:
        OptionError: as `read_mapping`; an unknown option, a value of another type. OSError: the file cannot be read.
    """
    found: dict[str, Any] = {}
    for written, value in read_mapping(path).items():
        name = str(written).replace("-", "_")
        if name not in hints:
            raise unknown(str(written), path, hints)
        if name in found:
            raise twice(f"{path}: {name}", f"{found[name]}", f"{value} (with dashes and with underscores)")
        found[name] = coerce(f"{path}: {written}", value, hints[name])
    return found


def _value(text: str, hint: Any, flag: str) -> Any:
    plain = _kinds(hint) <= {str, type(None)} and text != "null"
    return text if plain else read_value(text, flag)


def read_flags(words: Sequence[str], hints: Mapping[str, Any] = HINTS) -> dict[str, Any]:
    """Options from `--name value`, `--name=value`, `--flag`, and `--model_config.hidden_size 128` for one entry.

    Dashes and underscores are alike. Entries are returned as mappings, to be merged into the file's; beside them
    `--objective dpo` is its entry `name`.

    Raises:
        OptionError: an unknown flag, a missing value, a value of another type, a value and entries of one option, an
            option or an entry twice.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}  # what was written, by option or entry
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise OptionError(f"command line: expected an option that begins with --, got {word!r}")
        flag, equals, text = word[2:].partition("=")
        name, dot, entry = flag.partition(".")
        name = name.replace("-", "_")
        if name not in hints:
            raise unknown(name, "command line", hints)
        hint = hints[name]
        if dot and dict not in _kinds(hint):
            raise OptionError(f"--{flag}: expected an option without entries, {name} is no mapping")
        if not equals:
            if not dot and bool in _kinds(hint) and (not rest or rest[0].startswith("--")):
                text = "true"
            elif not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise OptionError(f"--{flag}: expected a value, got none")
            else:
                text = rest.pop(0)
        if dot:
            value: Any = {entry.replace("-", "_"): read_value(text, f"--{flag}")}
        else:
            value = coerce(f"--{flag}", _value(text, hint, f"--{flag}"), hint)
        several = isinstance(value, dict) and not dot
        before = _named(name, found.get(name))
        value = _named(name, value)
        if name in found and isinstance(before, dict) != isinstance(value, dict):
            raise OptionError(f"--{flag}: expected either a value or entries of {name}, got both")
        parts = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        for part, item in parts.items():
            written = str(item) if several else text
            if part in said:
                raise twice(f"--{part if several else flag}", said[part], written)
            said[part] = written
        found[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return found


def _named(name: str, value: Any) -> Any:
    """A text that names an objective, as the mapping that its settings join; anything else as it is."""
    plain = name == "objective" and isinstance(value, str) and not value.lstrip().startswith("{")
    return {"name": value} if plain else value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged entry by entry, an empty one replaces.

    Another objective leaves the settings of the first behind.
    """
    merged = dict(base)
    before, after = (_named("objective", options.get("objective")) for options in (base, over))
    if isinstance(after, dict) and after.get("name", _name_of(before)) != _name_of(before):
        for name in ("objective", "preset", *CLHA_FIELDS, *SETTLED):
            merged.pop(name, None)
    for name, value in over.items():
        before, value = _named(name, merged.get(name)), _named(name, value)
        both = isinstance(before, dict) and isinstance(value, dict) and value
        merged[name] = {**before, **value} if both else value
    return merged


def _name_of(objective: Any) -> Any:
    return objective.get("name") if isinstance(objective, dict) else DEFAULT


def _nameless(objective: Mapping[str, Any]) -> OptionError:
    known = {name: [*settings_of(name), *(["preset"] if name == DEFAULT else [])] for name in OBJECTIVES}
    having = [name for name, settings in known.items() if set(objective) <= set(settings)]
    everything = sorted({setting for settings in known.values() for setting in settings})
    odd = next((key for key in objective if key not in everything), None)
    if having:
        way = f"give --objective {having[0]}"
        if having[1:]:
            way = f"give --objective and one of those that have {' and '.join(objective)}: {', '.join(having)}"
    elif odd is not None:
        way = f"no objective has {odd!r}{nearest(odd, everything)}"
    else:
        way = f"no objective has all of {', '.join(objective)}"
    what = f"expected a name or a mapping with a name and settings, got {dict(objective)} without a name"
    return OptionError(f"objective: {what}; {way}")


def collect(
    words: Sequence[str], base: Mapping[str, Any] | None = None, hints: Mapping[str, Any] = HINTS
) -> dict[str, Any]:
    """The options of `base`, of the file behind `--config` and of the flags; the later ones win.

    Raises:
        OptionError, OSError: as `take_config`, `read_config` and `read_flags`.
    """
    speak(lambda: ({name: f"--{name}" for name in hints}, False))
    words, paths = take_config(words)
    options = dict(base or {})
    for path in paths:
        options = merge(options, read_config(path, hints))
    return merge(options, read_flags(words, hints))


def split(options: Mapping[str, Any]) -> tuple[RunOptions, dict[str, Any], dict[str, Any]]:
    """(what the run needs, what `CLHAConfig` needs, what the command itself needs).

    Raises:
        OptionError: settings of an objective without its name.
    """
    objective = options.get("objective")
    if isinstance(objective, dict) and objective and "name" not in objective:
        raise _nameless(objective)
    run = RunOptions(**{name: value for name, value in options.items() if name in RUN_HINTS})
    config = {name: value for name, value in options.items() if name in CONFIG_HINTS}
    return run, config, {name: value for name, value in options.items() if name in PRINTING}
