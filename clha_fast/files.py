"""Files and checkpoints that appear complete or not at all, and what makes two runs the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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


def rotate(folder: str, limit: int | None, best: str | None, written: str | None = None) -> None:
    """Delete the oldest checkpoints in `folder` until `limit` are left; the newest, `best` and `written` always are.

    Args:
        written: the checkpoint that has just appeared. In a run resumed from an earlier step it is not the newest.
    """
    found = [(int(match[1]), match[0]) for name in os.listdir(folder) if (match := CHECKPOINT.fullmatch(name))]
    names = [name for _, name in sorted(found)]
    keep = {names[-1] if names else "", os.path.basename(best or ""), os.path.basename(written or "")}
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
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


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
