"""Data sets of the Hub by their names: the files of one split, in the cache of `datasets`."""

from __future__ import annotations

import errno
import importlib
import os
import re

from clha_fast.data.records import RecordError

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>[\w.-]+))?")
_FILES = (
    *(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather", ".ipc", ".txt"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".yaml", ".yml"),
)
_PATIENCE = 10.0  # seconds


def is_hub_name(path: str) -> bool:
    """Whether `path`, which is nothing here, may be `owner/name` or `owner/name:split`."""
    found = _NAME.fullmatch(path)
    return found is not None and not path.lower().endswith(_FILES) and not os.path.isdir(path.partition("/")[0])


def hub_files(path: str) -> list[str]:
    """The arrow files of a split, downloaded where they are not there yet; without a name the only split there is.

    Raises:
        FileNotFoundError: no such data set, or the Hub does not answer. RecordError: several splits and none named, no
            such split, several configurations. ImportError: `datasets` is not installed.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{path}: a data set of the Hub needs datasets; pip install 'clha-fast[eval]'") from error
    hub = importlib.import_module("huggingface_hub")
    # The bases: errors of whatever carries the requests, of which no connection and no answer in time are no OSError.
    errors: tuple[type[Exception], ...] = (*hub.errors.HfHubHTTPError.__bases__, OSError, ValueError)

    found = _NAME.fullmatch(path)
    assert found is not None
    name, split = found["name"], found["split"]
    try:
        # Asked once: `datasets` would try again for minutes where a path is mistyped.
        hub.HfApi().dataset_info(name, timeout=_PATIENCE)
    except hub.errors.OfflineModeIsEnabled:
        pass
    except errors as error:
        reason = " ".join(str(error).split()).split(". ")[0].removesuffix(".")
        why = (
            f"no such file, and the Hub gives no such data set ({reason}; HF_HUB_OFFLINE=1 takes what is in the cache)"
        )
        raise FileNotFoundError(errno.ENOENT, why, path) from error
    try:
        table = datasets.load_dataset(name, split=split)
    except OSError as error:
        raise FileNotFoundError(errno.ENOENT, f"no such file, and of the Hub: {_first(error)}", path) from error
    except ValueError as error:  # splits, configurations
        way = "save_to_disk writes a folder of what datasets.load_dataset gives, which is read, too"
        raise RecordError(f"{path}: {_first(error)} ({way})", source=path) from error
    if isinstance(table, datasets.DatasetDict):
        if len(table) > 1:
            expected = f"one split of it, such as {name}:{next(iter(table))}"
            raise RecordError.of(path, "", expected, f"splits {', '.join(table)}")
        table = next(iter(table.values()))
    return [file["filename"] for file in table.cache_files]


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].removesuffix(".")
