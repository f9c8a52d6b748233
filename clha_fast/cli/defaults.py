"""The defaults that hold on the command line of `clha-fast train`, as its help shows them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments

from clha_fast.cli.options import CONFIG_HINTS
from clha_fast.experiments.run import DEFAULTS, RunOptions
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.training.config import CLHAConfig
from clha_fast.training.objective import CLHA_FIELDS

# What is decided when the run begins.
_CHOSEN = {"eval_fraction": "0.1", "workspace_mb": "(chosen)", "dataloader_pin_memory": "(with a GPU)"}


def _defaults(cls: type) -> dict[str, Any]:
    made = (
        (f.name, f.default_factory() if callable(f.default_factory) else f.default) for f in dataclasses.fields(cls)
    )
    return {name: value for name, value in made if value is not dataclasses.MISSING}


def _text(value: Any) -> str:
    value = getattr(value, "value", value)
    if value is None or value == "":
        return "(none)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lines(values: Iterable[tuple[str, Any]]) -> str:
    # A name stays beside its value.
    words = (f"--{name}\N{NO-BREAK SPACE}{_CHOSEN.get(name) or _text(value)}" for name, value in values)
    text = textwrap.fill("  ".join(words), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return text.replace("\N{NO-BREAK SPACE}", " ")


def defaults_text() -> str:
    """Every option with the value that it has unless told, in three groups."""
    preset = CLHAOptions.preset(CLHAConfig.preset)
    theirs = {name: value for name, value in _defaults(TrainingArguments).items() if name in CONFIG_HINTS}
    ours = {name: value for name, value in _defaults(CLHAConfig).items() if name in CONFIG_HINTS}
    theirs = {name: DEFAULTS.get(name, ours[name]) for name in theirs}
    ours = {name: getattr(preset, name) if name in CLHA_FIELDS else value for name, value in ours.items()}
    run = _defaults(RunOptions)
    own = [(name, value) for name, value in ours.items() if name not in theirs and name not in run]
    return "\n".join(
        (
            "defaults of a run from files",
            _lines((*run.items(), ("plot", True), ("memory_report", False))),
            f"of the loss and the batches (those of CLHA are the preset {CLHAConfig.preset}'s)",
            _lines(own),
            "of transformers' TrainingArguments",
            _lines(theirs.items()),
            "",
        )
    )
