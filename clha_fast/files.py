"""Files and checkpoints that appear complete or not at all, and what makes two runs the same."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from safetensors import SafetensorError

# Not "checkpoint-*": neither rotation nor the search for the last checkpoint may take it for one.
WRITING = ".writing"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is still there."""


def last_checkpoint(folder: str) -> str | None:
    """The newest complete checkpoint in `folder`, None where there is none."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [(int(match[1]), match[0]) for name in names if (match := CHECKPOINT.fullmatch(name))]
    found = [(step, name) for step, name in found if os.path.isdir(os.path.join(folder, name))]
    return os.path.join(folder, max(found)[1]) if found else None


def survivors(folder: str) -> str:
    """A sentence's end that names the last complete checkpoint in `folder`."""
    last = last_checkpoint(folder)
    if last is None:
        return "no earlier checkpoint exists"
    return f"{last} is complete and intact, resume from it"


def _free(folder: str) -> str:
    """Room on the folder's disk: torch and safetensors do not always say that this was it."""
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there"
    except OSError:
        return ""


@contextlib.contextmanager
def writing(folder: str, name: str) -> Iterator[str]:
    """An empty folder beside the final ones, gone afterwards; a failure to write in it is a CheckpointError.

    safetensors and torch.save report a full disk as errors of their own, not as OSError.
    """
    staging = os.path.join(folder, WRITING)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        os.makedirs(staging)
        yield staging
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = f"{' '.join(str(error).split())}{_free(folder)}"
        shutil.rmtree(staging, ignore_errors=True)  # also frees the space that the attempt took
        raise CheckpointError(f"{name} could not be written ({reason}); {survivors(folder)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync(path: str) -> None:
    """Has everything below `path` on the disk before a rename makes it count."""
    for root, _, files in os.walk(path):
        for name in [*files, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def publish(staged: str, final: str) -> None:
    """Rename a complete folder to its final name; one that is there already is replaced."""
    sync(staged)
    old = None
    if os.path.isdir(final):
        old = os.path.join(os.path.dirname(staged), "replaced")
        os.rename(final, old)
    try:
        os.rename(staged, final)
    except OSError:
        if old is not None:
            os.rename(old, final)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def rotate(folder: str, limit: int | None, *kept: str | None) -> None:
    """Delete the oldest checkpoints in `folder` until `limit` are left; the newest and those of `kept` always are.

    Args:
        kept: the best one; the one that has just appeared, which is not the newest in a run resumed from an earlier
            step; the one that the run was resumed from, where it may have to begin there once more.
    """
    found = [(int(match[1]), match[0]) for name in os.listdir(folder) if (match := CHECKPOINT.fullmatch(name))]
    names = [name for _, name in sorted(found)]
    keep = {names[-1] if names else "", *(os.path.basename(name) for name in kept if name)}
    for name in names:
        if limit is None or limit <= 0 or len(names) <= max(limit, len(keep & set(names))):
            return
        if name not in keep:
            shutil.rmtree(os.path.join(folder, name))
            names = [other for other in names if other != name]


def publish_files(staged: str, folder: str) -> None:
    """Rename every file of `staged` to the same name in `folder`."""
    sync(staged)
    for name in sorted(os.listdir(staged)):
        source, target = os.path.join(staged, name), os.path.join(folder, name)
        if os.path.isdir(source):
            shutil.rmtree(target, ignore_errors=True)
        os.replace(source, target)


def write_json(path: str, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str, text: str) -> None:
    """Written beside `path` and renamed, so a reader never sees half of it."""
    check_replaceable(path)
    partial = f"{path}.partial"
    try:
        with about(path):
            with open(partial, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


@contextlib.contextmanager
def about(path: str) -> Iterator[None]:
    """An OSError of what is written beside `path` is one of `path`, the name that was given."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


@contextlib.contextmanager
def naming_full(path: str) -> Iterator[None]:
    """That no room is left is said of `path`: a write's own error has no name. Others may be of what is read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(error.errno, error.strerror, path) from error


def try_folder_of(path: str) -> None:
    """OSError where no file can be written beside `path`."""
    check_replaceable(path)
    beside = f"{path}.{os.getpid()}.partial"
    with about(path):
        with open(beside, "w", encoding="utf-8"):
            pass
        # Processes of other machines may have the same number, and the same folder.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def check_replaceable(path: str) -> None:
    """OSError where a device, a pipe or a socket is there, in whose place a rename would put a file."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(f"{path}: expected a file, or a name that is free, got a device, a pipe or a socket")


def write_lines(path: str | os.PathLike[str], lines: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Write JSON objects, one a line, UTF-8; the file appears complete or not at all.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set. OSError: it cannot be written.
    """
    path = os.fspath(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists already; expected a new file, or overwrite=True")
    check_replaceable(path)
    beside = f"{path}.{os.getpid()}.partial"
    try:
        with about(path):
            with open(beside, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)


def check_destination(destination: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
    """What a long run that keeps a `Journal` demands of its destination, tried before anything is loaded.

    Raises:
        FileExistsError: `destination` exists and `overwrite` is not set; an unfinished run is there and neither
            `resume` nor `overwrite` is set.
        OSError: `destination` is a folder, or its folder does not exist or takes no file.
    """
    path = os.fspath(destination)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: expected a file, got a folder")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"{path}: expected an existing folder, got {os.path.dirname(path)}")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists already; expected a new file, or overwrite=True")
    parts = journal_parts(f"{path}.partial")
    if parts and not (resume or overwrite):
        raise FileExistsError(
            f"{parts[0]}: holds an unfinished run; give resume=True to continue it, or overwrite=True"
        )
    try_folder_of(path)


def journal_parts(path: str) -> list[str]:
    """The files of a run's journal: `path`, of one process or the first, and `path`.1 and so on, of the others."""
    others = [name for name in glob.glob(f"{glob.escape(path)}.*") if name.removeprefix(f"{path}.").isdigit()]
    return [path] * os.path.lexists(path) + sorted(others)


def file_hash(path: str) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class RunIdentity:
    """What makes two runs the same: settings that change the result, and hashes of the data files."""

    settings: Mapping[str, Any]
    data: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps({"settings": dict(self.settings), "data": dict(self.data)}, sort_keys=True))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """One phrase for each setting or file that `other` (an `as_dict`) has otherwise."""
        mine = self.as_dict()
        phrases = []
        for part in ("settings", "data"):
            theirs = other.get(part) or {}
            for name in sorted({*mine[part], *theirs}):
                was, now = (repr(side[name]) if name in side else "the default" for side in (theirs, mine[part]))
                if was != now:
                    phrases.append(f"{name} changed" if part == "data" else f"{name} was {was}, is {now}")
        return phrases


class Journal:
    """What a long run has done so far: a line for its identity, then one for each batch, added as soon as it is done.

    Each of the processes that share a run writes a file of its own (`journal_parts`) and reads those of all, so a run
    can go on in another number of processes. `Processes.share` keeps any from writing while another still reads.

    Args:
        path: of the first file; existing ones are read when `resume` is set, and replaced otherwise. None writes
            nothing.
        batches: positions of the items of each batch.
        key: what an item's value is called in a line. valid: whether a value that was read can be one.
        items, done: words for the sentence about what is kept, such as "responses" and "scored".
        part: number of this process.

    Attributes:
        path: of the file that this process writes.
        finished: numbers of the batches that are in it. values: by position of the item.

    Raises:
        ValueError: the file holds another run, or a line other than the last is damaged.
    """

    def __init__(
        self,
        path: str | None,
        identity: RunIdentity,
        batches: Sequence[Sequence[int]],
        resume: bool,
        *,
        key: str,
        valid: Callable[[Any], bool],
        items: str,
        done: str,
        part: int = 0,
    ) -> None:
        self.path = path if path is None or not part else f"{path}.{part}"
        self.identity = identity
        self.batches = batches
        self.finished: set[int] = set()
        self.values: dict[int, Any] = {}
        self._key, self._valid, self._items, self._done = key, valid, items, done
        self.resume, self._first = resume, path
        self._good, self._empty = 0, True  # of this process's own file: bytes to keep, whether no batch is in it
        self._file: IO[bytes] | None = None
        for file in journal_parts(path) if resume and path is not None else ():
            good, found = self._read(file, identity)
            if file == self.path:
                self._good, self._empty = good, not found

    def _read(self, path: str, identity: RunIdentity) -> tuple[int, int]:
        """Takes a file's batches over; bytes of its good lines, and how many batches are in them."""
        good = found = 0
        with open(path, "rb") as file:
            # What follows the last newline was cut off in the middle of being written.
            lines = file.read().split(b"\n")[:-1]
        for number, line in enumerate(lines):
            entry = _loads(line)
            if number == 0 and entry is not None and "settings" in entry:
                changed = identity.differences(entry)
                if changed:
                    raise ValueError(
                        f"resume: expected the run that {path} holds, got another ({'; '.join(changed)}); "
                        "give the same settings and files, or overwrite=True without resume=True"
                    )
            elif number == 0 or not self._take(entry):
                if number == 0 or number < len(lines) - 1:
                    raise ValueError(
                        f"{path}:{number + 1}: damaged; begin again with overwrite=True, without resume=True"
                    )
                break
            else:
                found += 1
            good += len(line) + 1
        return good, found

    def _take(self, entry: dict[str, Any] | None) -> bool:
        """Whether `entry` is a batch of this run; its values are taken over then."""
        number, values = (entry or {}).get("batch"), (entry or {}).get(self._key)
        if not isinstance(number, int) or not 0 <= number < len(self.batches) or not isinstance(values, list):
            return False
        if len(values) != len(self.batches[number]) or not all(map(self._valid, values)):
            return False
        self._note(number, values)
        return True

    def _note(self, number: int, values: Sequence[Any]) -> None:
        self.finished.add(number)
        self.values.update(zip(self.batches[number], values, strict=True))

    def __enter__(self) -> Journal:
        if self.path is None:
            return self
        # Unbuffered: what add() has returned from is in the file, whatever happens to the process.
        self._file = open(self.path, "ab", buffering=0)
        try:
            self._file.truncate(self._good)
            if not self._good:
                self._write(self.identity.as_dict())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        if self.path is not None and self._empty:  # nothing to keep: the next run may have other settings
            os.unlink(self.path)

    def add(self, number: int, values: Sequence[Any]) -> None:
        """Note the values of a batch, in the file first."""
        if self.path is not None:
            self._write({"batch": number, self._key: list(values)})
            self._empty = False
        self._note(number, values)

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        data = memoryview(json.dumps(entry).encode() + b"\n")
        while data:
            data = data[self._file.write(data) :]

    def remove(self) -> None:
        """Delete the files of all processes."""
        for file in journal_parts(self._first) if self._first is not None else ():
            os.unlink(file)

    def kept(self) -> str:
        """A sentence's end that says what a later run can take over."""
        total = sum(map(len, self.batches))
        if not self.values or self.path is None:
            return f"none of {total:,} {self._items} is {self._done} yet" if not self.values else "nothing is kept"
        return (
            f"{len(self.values):,} of {total:,} {self._items} are {self._done} and kept in {self.path}, "
            "resume=True goes on"
        )


def _loads(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
