"""Ranked records of any format, split by prompt into files to train on, to choose by and to test on."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clha_fast.data.containers import files_of
from clha_fast.data.extra import prompt_digest
from clha_fast.data.prepare import SPLITS, SUMMARY_FILE, Track
from clha_fast.data.readers import iter_records
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.writing import write_records
from clha_fast.files import WRITING, file_hash, naming_full, publish_files, write_json


def of_length(record: RankedRecord, length: int) -> RankedRecord | None:
    """The record with `length` of its candidates: the best, the worst, and others at even steps of rank between.

    None where its `sft_index` is not among them.
    """
    size = len(record.completions)
    chosen = [round(k * (size - 1) / (length - 1)) for k in range(length)]
    if record.sft_index not in chosen:
        return None
    return dataclasses.replace(
        record,
        completions=tuple(record.completions[k] for k in chosen),
        rewards=None if record.rewards is None else tuple(record.rewards[k] for k in chosen),
        sft_index=chosen.index(record.sft_index),
        signals={name: tuple(values[k] for k in chosen) for name, values in record.signals.items()},
    )


def split_files(
    sources: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    dev: float,
    test: float,
    length: int | None = None,
    columns: Mapping[str, Any] | None = None,
    rank_by_reward: bool = False,
    overwrite: bool = False,
    track: Track[Any] = lambda rows, name: rows,
) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl, and prepare.json with counts and hashes.

    Which file a record is in depends on a hash of its prompt alone: whatever is added, no prompt changes its place, and
    none is in two of them. A record without a `subset` gets its file's name.

    Args:
        sources: files or globs in any format that `read_records` takes.
        dev, test: fractions of the prompts; of `dev` at least one prompt, where another is left to train on.
        length: candidates of a record (`of_length`); records with fewer are left out and counted, as bad ones always
            are. None is all.
        columns, rank_by_reward: as `iter_records`, for all files alike.

    Raises:
        FileExistsError: `folder` has such files and `overwrite` is not set.
        ValueError: fractions that leave none for a file, a length below 2, no good record in a file, bad `columns`.
    """
    for name, value in (("dev", dev), ("test", test)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a fraction of the prompts between 0 and 1, got {value!r}")
    if dev + test >= 1:
        raise ValueError(f"dev: expected fractions that leave prompts to train on, got dev {dev} and test {test}")
    if length is not None and length < 2:
        raise ValueError(f"length: expected at least 2 candidates, got {length}")
    path = os.path.expanduser(os.fspath(folder))
    names = [f"{split}.jsonl" for split in SPLITS]
    there = [name for name in (*names, SUMMARY_FILE) if os.path.lexists(os.path.join(path, name))]
    if there and not overwrite:
        raise FileExistsError(
            f"{os.path.join(path, there[0])}: exists already; expected a new folder, or overwrite=True"
        )
    counts: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    found: list[tuple[int, RankedRecord]] = []
    files = [file for source in sources for file in files_of(source)]
    for file in files:
        stem = os.path.basename(file).partition(".")[0]
        bad: list[RecordError] = []
        records = iter_records(file, rank_by_reward=rank_by_reward, errors=bad, columns=columns)
        for record in track(records, os.path.basename(file)):
            found.append((prompt_digest(record), dataclasses.replace(record, subset=record.subset or stem)))
        for error in bad:
            count = counts.setdefault(stem, {}).setdefault("bad", {"read": 0, "kept": 0, "dropped": Counter()})
            reason = f"not as expected: {error.field}"
            count["read"] += 1
            count["dropped"][reason] += 1
            first.setdefault(reason, error.source)
    ends = _ends([digest for digest, record in found if len(record.completions) >= (length or 0)], test, dev)
    parts: dict[str, list[RankedRecord]] = {split: [] for split in SPLITS}
    for digest, record in found:
        split = "test" if digest < ends[0] else "dev" if digest < ends[1] else "train"
        empty = {"read": 0, "kept": 0, "dropped": Counter()}
        count = counts.setdefault(record.subset, {}).setdefault(split, empty)
        count["read"] += 1
        short: RankedRecord | None = record
        if length is not None:
            fewer = len(record.completions) < length
            short = None if fewer else of_length(record, length)
            reason = f"fewer than {length} candidates" if fewer else f"sft_index is none of {length} candidates"
        if short is None:
            count["dropped"][reason] += 1
            first.setdefault(reason, record.source)
            continue
        count["kept"] += 1
        parts[split].append(short)
    for split, part in parts.items():
        if not part:
            total = sum(count["read"] for of_subset in counts.values() for count in of_subset.values())
            raise RecordError(
                f"{split}: expected at least one record, got none of {total:,}; give more prompts, or other fractions "
                "or another length"
            )
    os.makedirs(path, exist_ok=True)
    staged = os.path.join(path, WRITING)
    shutil.rmtree(staged, ignore_errors=True)
    os.makedirs(staged)
    try:
        written = {}
        for split, part in parts.items():
            target = os.path.join(staged, f"{split}.jsonl")
            with naming_full(path):
                write_records(part, target)
            subsets = Counter(record.subset for record in part)
            prompts = len({prompt_digest(record) for record in part})
            written[f"{split}.jsonl"] = {
                **{"records": len(part), "prompts": prompts, "subsets": dict(subsets)},
                "sha256": file_hash(target),
            }
        summary = {
            "settings": {
                **{"data": "ranked", "dev": dev, "test": test, "length": length, "rank_by_reward": rank_by_reward},
                **({} if columns is None else {"columns": dict(columns)}),
            },
            "files": {os.path.basename(file): file_hash(file) for file in files if os.path.isfile(file)},
            "extra_candidates": [],
            "counts": {
                subset: {split: of_subset[split] for split in (*SPLITS, "bad") if split in of_subset}
                for subset, of_subset in counts.items()
            },
            "first": first,
            "written": written,
        }
        publish_files(staged, path)
        write_json(os.path.join(path, SUMMARY_FILE), summary)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return summary


def _ends(digests: Sequence[int], test: float, dev: float) -> tuple[int, int]:
    """Digests below the first are for test, those from there up to the second for development."""
    first, second = int(test * 2**64), int((test + dev) * 2**64)
    rest = sorted({digest for digest in digests if digest >= first})
    return first, max(second, rest[1]) if len(rest) > 1 else second
