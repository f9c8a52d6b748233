"""Tokenising in several processes: lists in a pool of them, tables of `datasets` by their own `map`."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import multiprocessing
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from clha_fast.batching.batch import CandidateFeature
from clha_fast.batching.signals import PER_CANDIDATE
from clha_fast.data.bars import LARGE
from clha_fast.data.containers import table_rows
from clha_fast.data.notes import Notes
from clha_fast.data.readers import record_from_row
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.options import count

Example = RankedRecord | Mapping[str, Any]
Counted = tuple[CandidateFeature, int, int]  # tokens, prompts cut (0 or 1), responses cut
Tokenise = Callable[[RankedRecord], Counted]

_tokenise: Tokenise  # of a process of the pool, set when it starts

_CHUNK = 64  # records that a process takes at a time
# What writes them into a file.
WRITERS = {
    "rewards": " (clha-fast score --reward-model MODEL SRC DST writes them)",
    "reference_logps": " (clha-fast score --policy MODEL SRC DST writes them)",
}


@dataclass
class Tokenised:
    """Tokenised records, how many prompts and responses of them a limit has cut, and which signals the records hold.

    All of them have rewards, or a signal, or none has.
    """

    features: Sequence[CandidateFeature]
    cut_prompts: int
    cut_completions: int
    signals: Collection[str] = ()


def as_record(example: Example, source: str, notes: Notes | None = None) -> RankedRecord:
    """The example itself, or a row in a known format as a record, counted in `notes`."""
    return example if isinstance(example, RankedRecord) else record_from_row(example, source, notes=notes)


def check_num_proc(num_proc: int | None) -> None:
    """ValueError where it is neither None nor a positive integer."""
    if num_proc is not None:
        count("num_proc", num_proc, "a positive integer or None")


def tokenise_all(
    examples: Iterable[Example],
    tokenise: Tokenise,
    num_proc: int | None = None,
    skipped: list[RecordError] | None = None,
    progress: bool | None = None,
) -> Tokenised:
    """Every example tokenised, in order, the same whatever the number of processes.

    Args:
        tokenise: of one record, `RankedCollator.tokenize_counted`; it travels to the processes.
        num_proc: processes; None and 1 are this one.
        skipped: None raises the first `RecordError`; a list collects them, and their records are left out: so is one
            that lacks what at least half of the records have, rewards or a signal, or has what fewer have.
        progress: show a bar; None shows it for more than 2000 records.
    """
    check_num_proc(num_proc)
    # Rows become records here: what is noted about them is said once, whatever the number of processes.
    notes = Notes()
    rows = [_read(example, number, notes) for number, example in enumerate(table_rows(examples))]
    bar = logging.tqdm(
        total=len(rows),
        desc="Tokenising",
        unit=" prompts",
        disable=not (len(rows) > LARGE if progress is None else progress),
    )
    features, cuts = [], []
    with bar:
        for result in _results(rows, tokenise, min(num_proc or 1, max(len(rows), 1))):
            if isinstance(result, RecordError):
                if skipped is None:
                    raise result
                skipped.append(result)
            else:
                features.append(result[0])
                cuts.append(result[1:])
            bar.update(1)
    notes.say()
    signals = {name for row in rows if isinstance(row, RankedRecord) for name in row.signals}
    kept = _alike(features, skipped)
    prompts, completions = (sum(cuts[index][kind] for index in kept) for kind in (0, 1))
    return Tokenised([features[index] for index in kept], prompts, completions, signals)


def _alike(features: Any, skipped: list[RecordError] | None) -> list[int]:
    """Places of the features that hold rewards, and each signal, as most of them do, or lack them; others are bad."""
    kept = list(range(len(features)))
    for name in ("rewards", *PER_CANDIDATE):
        column = _column(features, name)
        holding = [index for index in kept if column[index] is not None]
        if not 0 < len(holding) < len(kept):
            continue
        lacking = [index for index in kept if column[index] is None]
        count = f"as {max(len(holding), len(lacking)):,} of {len(kept):,} records"
        if 2 * len(holding) >= len(kept):
            bad, kept, expected = lacking, holding, f"some, {count} have them{WRITERS.get(name, '')}"
        else:
            bad, kept, expected = holding, lacking, f"none, {count} have none{WRITERS.get(name, '')}"
        sources = _column(features, "source")
        errors = [RecordError.of(sources[index], name, expected, column[index]) for index in bad]
        if skipped is None:
            raise errors[0]
        skipped += errors
    return kept


def _column(features: Any, name: str) -> list[Any]:
    if isinstance(features, list):
        return [feature.get(name) for feature in features]
    return list(features[name]) if name in features.column_names else [None] * len(features)


def _read(example: Example, number: int, notes: Notes) -> RankedRecord | RecordError:
    try:
        return as_record(example, f"record {number}", notes)
    except RecordError as error:
        return error


def _results(
    rows: list[RankedRecord | RecordError], tokenise: Tokenise, num_proc: int
) -> Iterator[Counted | RecordError]:
    if num_proc == 1:
        yield from (_one(row, tokenise) for row in rows)
        return
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    # Forked processes need no importable main module; a tokenizer uses no thread or device that a fork would lose.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(
        num_proc, multiprocessing.get_context(method), initializer=_start_process, initargs=(tokenise,)
    )
    with pool:
        try:
            yield from itertools.chain.from_iterable(pool.map(_chunk, chunks))
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process(tokenise: Tokenise) -> None:
    global _tokenise
    _tokenise = tokenise
    # The processes are the parallelism; threads of the tokenizer would be lost in a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _chunk(rows: list[RankedRecord | RecordError]) -> list[Counted | RecordError]:
    return [_one(row, _tokenise) for row in rows]


def _one(record: RankedRecord | RecordError, tokenise: Tokenise) -> Counted | RecordError:
    if isinstance(record, RecordError):
        return record
    try:
        feature, prompts, completions = tokenise(record)
    except RecordError as error:
        return error
    return compact(feature), prompts, completions


def compact(feature: CandidateFeature) -> CandidateFeature:
    """Four bytes a token instead of a Python list's eight."""
    feature["prompt_ids"] = array("i", feature["prompt_ids"])
    feature["completion_ids"] = [array("i", ids) for ids in feature["completion_ids"]]
    masks = feature.get("completion_mask")
    if masks is not None:
        feature["completion_mask"] = [array("b", mask) for mask in masks]
    return feature


def is_table(value: Any) -> bool:
    """Whether it is a `datasets.Dataset`, without importing `datasets` for what is none."""
    return type(value).__module__.partition(".")[0] == "datasets" and hasattr(value, "map") and hasattr(value, "select")


def tokenise_table(
    table: Any,
    tokenise: Tokenise,
    num_proc: int | None = None,
    skipped: list[RecordError] | None = None,
    optional: Collection[str] = (),
) -> Tokenised:
    """A `datasets.Dataset` of rows in a known format, tokenised by its own `map`; arguments as `tokenise_all`.

    Args:
        optional: what `tokenise` may give beside what every feature has: signals, `completion_mask`.

    The result is a table in memory, four bytes a token. It is not cached on disk: a cache is looked up by the name of
    a function in this library, and would outlive a change of what that function does.
    """
    check_num_proc(num_proc)
    datasets = importlib.import_module("datasets")
    whole, number = datasets.Value("int32"), datasets.Value("int64")
    numbers, masks = datasets.List(datasets.Value("float64")), datasets.List(datasets.List(datasets.Value("int8")))
    columns = {
        "prompt_ids": datasets.List(whole),
        "completion_ids": datasets.List(datasets.List(whole)),
        "rewards": numbers,
        "sft_index": number,
        **{name: masks if name == "completion_mask" else numbers for name in optional},
        "source": datasets.Value("string"),
        "error": datasets.Value("string"),
        "cut_prompts": number,
        "cut_completions": number,
        "notes": datasets.Value("string"),
    }
    done = table.map(
        functools.partial(_table_row, tokenise=tokenise, skip=skipped is not None, optional=optional),
        with_indices=True,
        num_proc=num_proc,
        remove_columns=table.column_names,
        features=datasets.Features(columns),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),
        desc="Tokenising",
    )
    errors = list(done["error"])
    if skipped is not None and any(error is not None for error in errors):
        skipped += [RecordError(error, source=error.partition(": ")[0]) for error in errors if error is not None]
        done = done.select([index for index, error in enumerate(errors) if error is None])
    kept = _alike(done, skipped)
    done = done if len(kept) == len(done) else done.select(kept)
    prompts, completions = (sum(done[name]) for name in ("cut_prompts", "cut_completions"))
    notes = Notes()
    for found in done["notes"]:
        notes.merge(Notes(**json.loads(found)))
    notes.say()
    # Of a table in the canonical format; in others nobody reads such columns, which the notes have said.
    held = set(PER_CANDIDATE) & set(table.column_names) if "completions" in table.column_names else ()
    features = done.remove_columns(["error", "cut_prompts", "cut_completions", "notes"])
    return Tokenised(features, prompts, completions, held)


def _table_row(
    row: Mapping[str, Any], index: int, tokenise: Tokenise, skip: bool, optional: Collection[str]
) -> dict[str, Any]:
    notes = Notes()
    try:
        feature, prompts, completions = tokenise(as_record(row, f"record {index}", notes))
        counts = {"cut_prompts": prompts, "cut_completions": completions, "notes": json.dumps(notes.as_dict())}
        return {**dict.fromkeys(optional), **feature, "error": None, **counts}
    except RecordError as error:
        if not skip:
            raise
        nothing: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "rewards": None, "sft_index": 0}
        nothing |= {"cut_prompts": 0, "cut_completions": 0, "notes": json.dumps(Notes().as_dict())}
        return {**nothing, **dict.fromkeys(optional), "source": error.source, "error": str(error)}
