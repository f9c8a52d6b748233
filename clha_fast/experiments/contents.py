"""Hashes of what decides a result: data files, model folders, and settings that name either."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from clha_fast.data.containers import files_of
from clha_fast.experiments.folder import RUN_FILE
from clha_fast.files import CHECKPOINT, file_hash
from clha_fast.generation.prompts import trained_lead, trained_prefix
from clha_fast.rewards.reward_model import REWARD_FILE, trained_with_blank

# Settings whose text may be a file or folder, and those that name data, which may be a glob or a name on the Hub.
_PATHS = ("model", "tokenizer", "reference", "reward_model", "deepspeed", "fsdp_config")
_DATA = ("train_file", "eval_file")
# A run's own reports, and where it lay, say nothing of the weights; `_read_as` has what they say beside them.
_REPORTS = (RUN_FILE, "metrics.json", "trainer_state.json", "training_args.bin", REWARD_FILE, "README.md")
_REPORT_ENDS = (".png", ".log", ".lock", ".partial")


@functools.lru_cache(maxsize=1024)
def _hash_of(path: str, size: int, changed: int) -> str:
    return file_hash(path)


def _file(path: str) -> str:
    stat = os.stat(path)
    return _hash_of(path, stat.st_size, stat.st_mtime_ns)


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _folder(path: str, leave_out: Any = lambda name: False) -> str:
    """Of all files below a folder, with their names."""
    found = []
    for place, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not leave_out(name))
        found += [os.path.join(place, name) for name in sorted(names) if not leave_out(name)]
    return _joined(f"{os.path.relpath(name, path)} {_file(name)}" for name in found)


def data_hash(path: str) -> str:
    """Of a data file, of several as a glob, or of a folder of them.

    Raises:
        OSError: there is none.
    """
    hashes = [_folder(name) if os.path.isdir(name) else _file(name) for name in files_of(path)]
    return hashes[0] if len(hashes) == 1 else _joined(hashes)


def model_hash(path: str) -> str:
    """Of a model's folder, how it is asked and reads, and of the model that an adapter in it stands on.

    A name on the Hub is its own hash.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        return _file(path) if os.path.isfile(path) else path

    def report(name: str) -> bool:
        return name in _REPORTS or name.endswith(_REPORT_ENDS) or CHECKPOINT.fullmatch(name) is not None

    found = _joined([_folder(path, report), *said]) if (said := _read_as(path)) else _folder(path, report)
    adapter = os.path.join(path, "adapter_config.json")
    if os.path.isfile(adapter):
        with open(adapter, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
        if isinstance(base, str):
            found = _joined([found, model_hash(base)])
    return found


def _read_as(path: str) -> list[str]:
    """What a run's reports say of how its model is asked, and of how it reads answers."""
    blank = "without blanks" if trained_with_blank(path) is False else None  # what says nothing is read as with them
    found = {"answer_prefix": trained_prefix(path), "lead": trained_lead(path), REWARD_FILE: blank}
    return [f"{name} {value}" for name, value in found.items() if value]


def with_contents(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a JSON value in which a hash stands for what is here: files, folders, data under any name.

    Raises:
        OSError: data that are not there.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found[name] = with_contents(value)
        elif name in _DATA and isinstance(value, str):
            found[name] = data_hash(value)
        elif name in _PATHS and isinstance(value, str):
            found[name] = model_hash(value)
        else:
            found[name] = value
    return found


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value's SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
