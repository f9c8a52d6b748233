"""Folders that hold one run each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence

from clha_fast.files import CHECKPOINT, WRITING, RunIdentity, last_checkpoint, write_json

RUN_FILE = "run.json"


class RunFolderError(ValueError):
    """The output folder holds another run."""


def check_folder(folder: str, identity: RunIdentity, *, resume: bool = False, overwrite: bool = False) -> str | None:
    """The checkpoint to resume from, if any; writes nothing.

    Args:
        resume: continue the run that `folder` holds; it must be the same one. One without a checkpoint begins anew.
        overwrite: a run that `folder` holds may be removed.

    Raises:
        RunFolderError: the folder holds a run and neither is set; there is no run to resume, or it is another one; the
            folder holds files that no run of this program has written, or is a file itself.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise RunFolderError(f"output_dir: expected a folder, got {folder}, which is a file")
    path = os.path.join(folder, RUN_FILE)
    content = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    known = os.path.isfile(path)
    if resume and not content:
        state = "empty" if os.path.isdir(folder) else "not there"
        raise RunFolderError(f"resume: expected a folder that holds a run, got {folder} ({state})")
    if overwrite or not content:
        return None
    if not known:
        raise RunFolderError(
            f"output_dir: expected a new or empty folder, got {folder} with {len(content)} entries "
            f"({', '.join(content[:3])}{', ...' if len(content) > 3 else ''}) that are no run of this program"
        )
    if not resume:
        raise RunFolderError(
            f"output_dir: {folder} holds a run already; give resume=True, overwrite=True or another folder"
        )
    with open(path, encoding="utf-8") as file:
        changed = identity.differences(json.load(file))
    if changed:
        raise RunFolderError(
            f"resume: expected the run that {folder} holds, got other settings ({'; '.join(changed)}); "
            "give the same ones, another output_dir, or overwrite=True"
        )
    return last_checkpoint(folder)


def check_apart(folder: str, sources: Mapping[str, str | None]) -> None:
    """RunFolderError where the run would remove one of its `sources` (setting -> folder or name)."""
    own = os.path.realpath(folder)
    for name, source in sources.items():
        place = os.path.realpath(source) if source is not None and os.path.isdir(source) else None
        if place is not None and (
            place == own or (os.path.dirname(place) == own and CHECKPOINT.fullmatch(os.path.basename(place)))
        ):
            raise RunFolderError(
                f"output_dir: expected another folder than that of {name}, {source}, which the run would replace, got "
                f"{folder}"
            )


def claim_folder(folder: str, identity: RunIdentity, owned: Sequence[str] = (), **notes: str | None) -> None:
    """Make `folder` this run's own: removes what a run has left (checkpoints, the files `owned`), nothing else.

    `notes` that are not None stand beside the identity, and make no other run.

    Raises:
        OSError: the folder cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and (CHECKPOINT.fullmatch(name) or name == WRITING):
            shutil.rmtree(path)
        elif name in owned:
            os.unlink(path)
    given = {name: note for name, note in notes.items() if note is not None}
    write_json(os.path.join(folder, RUN_FILE), {**identity.as_dict(), **given})
