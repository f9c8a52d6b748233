"""Raw files of a data set, made ranked records to train on, to choose by and to test on, no prompt in two of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import numbers
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from clha_fast.data.containers import files_of, rows_of
from clha_fast.data.extra import ExtraCandidates, prompt_digest, with_extra
from clha_fast.data.records import Prompt, RankedRecord, RecordError
from clha_fast.files import WRITING, file_hash, publish_files, write_json

_T = TypeVar("_T")
Track = Callable[[Iterable[_T], str], Iterable[_T]]

SPLITS = ("train", "dev", "test")
SUMMARY_FILE = "prepare.json"
UNRANKED = ".unranked"  # in the name of a file whose last candidates have no place in the ranking yet
_SPOOL = "records"


class Dropped(RecordError):
    """A record that is left out; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class RawFile:
    """One file of raw records.

    Attributes:
        name: what figures call it. subset: of its records. split: "train" or "test"; a row's own `split` goes first.
    """

    path: str
    name: str
    subset: str
    split: str


Known = Callable[[str, str], RawFile | None]
Read = Callable[[Mapping[str, Any], str, RawFile], RankedRecord]


def pair(prompt: Prompt, better: str, worse: str, source: str, subset: str) -> RankedRecord:
    """The record of two answers.

    Raises:
        Dropped: one is empty, or both are the same but for blanks at their ends.
    """
    if not (better.strip() and worse.strip()):
        raise Dropped("an empty answer")
    if better.strip() == worse.strip():
        raise Dropped("identical answers")
    return RankedRecord(prompt, (better, worse), source=source, subset=subset)


def find_files(sources: Sequence[str], known: Known, expected: str) -> tuple[list[RawFile], list[str]]:
    """(the raw files in folders, files and globs; names of files in folders that are none), in the order of names.

    Args:
        known: of a path and its name within the folder, the file, None where it is not one of the data set's.
        expected: what to look for, in an error.

    Raises:
        ValueError: a source without a file of the data set; two files of one folder and name. OSError: no such source.
    """
    found: dict[str, RawFile] = {}
    others: list[str] = []
    for source in sources:
        root = os.path.expanduser(source)
        folder = os.path.isdir(root)
        paths = sorted(_walk(root)) if folder else files_of(source)
        hit = False
        for path in paths:
            name = os.path.relpath(path, root) if folder else os.path.join(*_tail(path))
            file = known(path, name)
            if file is not None:
                hit = True
                # "train.jsonl" beside "train.jsonl.gz" would be every record twice.
                other = found.setdefault(_stem(path), file)
                if os.path.abspath(other.path) != os.path.abspath(path):
                    raise ValueError(f"{path}: expected one file of that name, got {other.path}, too; give one of them")
            elif folder:
                others.append(name)
            else:
                raise ValueError(f"{path}: expected {expected}")
        if not hit:
            seen = ", ".join(others[:5]) or "no file that could be one"
            raise ValueError(f"{source}: expected {expected}, got {seen}")
    return list(found.values()), others


def _walk(root: str) -> Iterator[str]:
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in names if ".json" in name.lower())


def _stem(path: str) -> str:
    return os.path.join(*_tail(path)).lower().partition(".json")[0]


def _tail(path: str) -> list[str]:
    """Folder and file name: enough to tell the files of a data set."""
    return os.path.abspath(path).split(os.sep)[-2:]


@dataclass
class _Count:
    """Of one subset's training or test files."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class _Preparation:
    def __init__(self, files: Sequence[RawFile], read: Read, track: Track[Any]) -> None:
        self.files, self.read, self.track = files, read, track
        self.counts: dict[tuple[str, str], _Count] = {}
        self.first: dict[str, str] = {}  # of each reason, where it came first
        self.prompts: dict[str, set[int]] = {"train": set(), "test": set()}
        self._seen: dict[str, set[int]] = {"train": set(), "test": set()}

    def count(self, subset: str, split: str) -> _Count:
        return self.counts.setdefault((subset, split), _Count())

    def spool(self, path: str) -> None:
        """All good records, one a line behind digest of the prompt, split and subset."""
        with open(path, "w", encoding="utf-8", newline="\n") as spool:
            for file in self.files:
                before = sum(count.read for count in self.counts.values())
                for place, row in self.track(rows_of(file.path), file.name):
                    if isinstance(row, RecordError) and row.source == file.path:
                        raise row  # the file is damaged: nobody knows what else is lost
                    split = _split_of(row, file)
                    self.count(file.subset, split).read += 1
                    try:
                        record = self._record(row, place, file)
                        digest = prompt_digest(record)
                        self._note(record, digest, split)
                    except RecordError as error:
                        reason = str(error) if isinstance(error, Dropped) else f"not as expected: {error.field}"
                        self._drop(file.subset, split, reason, place.replace(file.path, file.name, 1))
                    else:
                        line = json.dumps(record.as_dict(), ensure_ascii=False, allow_nan=False)
                        spool.write(f"{digest}\t{split}\t{file.subset}\t{line}\n")
                if sum(count.read for count in self.counts.values()) == before:
                    raise ValueError(f"{file.path}: expected at least one record, got none")

    def _record(self, row: object, place: str, file: RawFile) -> RankedRecord:
        if isinstance(row, RecordError):
            raise Dropped("not JSON")
        if not isinstance(row, Mapping):
            raise Dropped("not a JSON object")
        return self.read(row, place, file)

    def _note(self, record: RankedRecord, digest: int, split: str) -> None:
        text = json.dumps([digest, record.completions])
        own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        if own in self._seen[split]:
            raise Dropped("the same prompt and answers as another record")
        self._seen[split].add(own)
        self.prompts[split].add(digest)

    def _drop(self, subset: str, split: str, reason: str, place: str = "") -> None:
        self.count(subset, split).dropped[reason] += 1
        if place:
            self.first.setdefault(reason, place)

    def write(
        self, spool: str, folder: str, limit: int, extras: Sequence[ExtraCandidates], length: int, keep_short: bool
    ) -> dict[str, dict[str, Any]]:
        """The records of the spool in a file a split: by file name, how many there are of what."""
        train, test = self.prompts["train"], self.prompts["test"] - self.prompts["train"]
        dev = {digest for digest in train if digest < limit}
        extended = {
            split
            for split, prompts in (("train", train - dev), ("dev", dev), ("test", test))
            if any(digest in extra.answers for extra in extras for digest in prompts)
        }
        names = {split: f"{split}{UNRANKED if split in extended else ''}.jsonl" for split in SPLITS}
        written: dict[str, dict[str, Any]] = {}
        prompts: dict[str, set[int]] = {}
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(open(spool, encoding="utf-8", newline="\n"))
            opened: dict[str, Any] = {}
            for entry in self.track(source, "writing"):
                number, raw, subset, line = entry.split("\t", 3)
                digest = int(number)
                if raw == "test" and digest in train:
                    self._drop(subset, raw, "a test prompt that the training files have, too")
                    continue
                split = raw if raw == "test" else "dev" if digest < limit else "train"
                if split in extended:
                    row = json.loads(line)
                    row["completions"] = with_extra(row["completions"], digest, extras, length)
                    if len(row["completions"]) < length and not keep_short:
                        self._drop(subset, raw, f"fewer than {length} different candidates")
                        continue
                    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                name = names[split]
                if name not in opened:
                    path = os.path.join(folder, name)
                    opened[name] = stack.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
                    written[name] = {"records": 0, "prompts": 0, "subsets": Counter()}
                    prompts[name] = set()
                opened[name].write(line)
                self.count(subset, raw).kept += 1
                written[name]["records"] += 1
                written[name]["subsets"][subset] += 1
                prompts[name].add(digest)
        for name in written:
            written[name]["prompts"] = len(prompts[name])
        return {names[split]: written[names[split]] for split in SPLITS if names[split] in written}

    def check(self) -> None:
        """ValueError for a subset of which nothing is left, or where there is nothing to train on."""
        for (subset, split), count in self.counts.items():
            if count.read == count.dropped.total():
                why = ", ".join(f"{reason} ({number:,})" for reason, number in count.dropped.most_common())
                raise ValueError(f"{subset}, {split}: expected at least one good record, got {count.read:,}: {why}")
        if not self.prompts["train"]:
            raise ValueError(f"{self.files[0].path}: expected files to train on beside it, got test files alone")


def _split_of(row: object, file: RawFile) -> str:
    own = row.get("split") if isinstance(row, Mapping) else None
    if isinstance(own, str) and own:
        return "train" if own.startswith("train") else "test"
    return file.split


def _dev_limit(prompts: set[int], dev: float) -> int:
    """Prompts of the training files whose digest is below it are for development."""
    fraction = not isinstance(dev, numbers.Integral)
    if isinstance(dev, bool) or not (0 < dev < 1 if fraction else dev >= 0):
        raise ValueError(f"dev: expected a number of prompts, or a fraction between 0 and 1, got {dev!r}")
    ordered = [*sorted(prompts), 2**64]
    if fraction:  # at least one prompt, where another is left to train on
        limit = max(int(dev * 2**64), ordered[1] if len(prompts) > 1 else 0)
    else:
        limit = ordered[min(int(dev), len(prompts))]
    chosen = sum(digest < limit for digest in prompts)
    if chosen == len(prompts) or (dev and not chosen):
        side = "training" if chosen else "development"
        raise ValueError(
            f"dev: {dev} of {len(prompts):,} different prompts leaves none for {side}; give another fraction or number "
            "of prompts, or 0 for no development set"
        )
    return limit if dev else 0


def prepare(
    files: Sequence[RawFile],
    read: Read,
    folder: str | os.PathLike[str],
    *,
    dev: float = 0.01,
    extras: Sequence[ExtraCandidates] = (),
    length: int | None = None,
    keep_short: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    track: Track[Any] = lambda rows, name: rows,
) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl and test.jsonl, canonical records with their `subset`, to `folder`.

    Records are read one at a time; in memory are eight bytes' worth of a prompt and of a record, and the answers of
    `extras`. The development set is a part of the training files' *prompts*, by a hash of the prompt alone: the same
    whatever else there is. Test is the data set's own, without prompts that its training files have, too. Files that
    `extras` have lengthened are called train.unranked.jsonl and so on: the new candidates stand last, and nobody has
    ranked them yet. prepare.json comes last, with settings, hashes of the files read, and every record that was left
    out counted by reason; it is what is returned. All appear complete or not at all.

    Args:
        read: of a row, its place and its file, the record; raises `Dropped` with a reason.
        dev: a fraction below 1 (at least one prompt), or a number of prompts; 0 for none.
        length: candidates of a record that `extras` lengthen, 2 and one a file by default. keep_short: records that
            have fewer stay, and are left out otherwise. A split of which they know no prompt stays as it is.
        settings: more for prepare.json.
        track: wraps the rows of a file, given its name, to show progress.

    Raises:
        FileExistsError: `folder` has such files and `overwrite` is not set.
        ValueError: a bad option; a file without a record, a subset without a good one; extra candidates that match no
            prompt. RecordError: a damaged file. OSError: a file cannot be read or written.
    """
    path = os.path.expanduser(os.fspath(folder))
    ours = [*(f"{split}{kind}.jsonl" for split in SPLITS for kind in ("", UNRANKED)), SUMMARY_FILE]
    there = [name for name in ours if os.path.lexists(os.path.join(path, name))]
    if there and not overwrite:
        raise FileExistsError(
            f"{os.path.join(path, there[0])}: exists already; expected a new folder, or overwrite=True"
        )
    least = 2 + len(extras)
    length = least if length is None else length
    if length < 2 or (length > 2) != bool(extras):
        expected = "2 without extra candidates, and more with them"
        raise ValueError(f"length: expected {expected}, got {length} and {len(extras)} files of them")
    work = _Preparation(files, read, track)
    made = not os.path.isdir(path)
    os.makedirs(path, exist_ok=True)
    staged = os.path.join(path, WRITING)
    shutil.rmtree(staged, ignore_errors=True)
    os.makedirs(staged)
    try:
        spool = os.path.join(staged, _SPOOL)
        work.spool(spool)
        work.check()
        for extra in extras:
            extra.match(work.prompts["train"] | work.prompts["test"])
        limit = _dev_limit(work.prompts["train"], dev)
        written = work.write(spool, staged, limit, extras, length, keep_short)
        work.check()
        os.unlink(spool)
        for name in written:
            written[name]["sha256"] = file_hash(os.path.join(staged, name))
        summary = {
            "settings": {**(settings or {}), "dev": dev, "length": length, "keep_short": keep_short},
            "files": {file.name: file_hash(file.path) for file in files},
            "extra_candidates": [extra.summary() for extra in extras],
            "counts": _by_subset(work.counts),
            "first": work.first,
            "written": written,
        }
        for name in there:
            if name not in written:
                os.unlink(os.path.join(path, name))
        publish_files(staged, path)
        write_json(os.path.join(path, SUMMARY_FILE), summary)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk
            raise OSError(error.errno, error.strerror, path) from error
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # something stands in it
                os.rmdir(path)
    return summary


def _by_subset(counts: Mapping[tuple[str, str], _Count]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (subset, split), count in sorted(counts.items(), key=lambda item: item[0][1] == "test"):
        found.setdefault(subset, {})[split] = {
            "read": count.read,
            "kept": count.kept,
            "dropped": dict(count.dropped.most_common()),
        }
    return found
