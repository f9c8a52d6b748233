"""Runs in folders of a comparison's own, which go on where they were stopped, wherever the folders lie by now."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from clha_fast.experiments.folder import RunFolderError
from clha_fast.experiments.run import Run


class Maker(Protocol):
    """Makes the run; the arguments are those of `RunOptions`."""

    def __call__(self, *, resume: bool, overwrite: bool) -> Run: ...


def prepared(make: Maker, folder: str) -> Run:
    """The run in `folder`, prepared: resumed where the folder holds a part of it.

    The folder is named by a hash of all that decides the run, so what lies in it is the same run, wherever its files
    and models lie. What cannot be gone on with (an older release has called things otherwise, or was killed before it
    said what the folder holds) is begun anew.

    Raises:
        ValueError, OSError: as `Run`.
    """
    holds = os.path.isdir(folder) and bool(os.listdir(folder))
    try:
        return _prepared(lambda: make(resume=holds, overwrite=False))
    except RunFolderError:
        if not holds:
            raise
        return _prepared(lambda: make(resume=False, overwrite=True))


def _prepared(make: Callable[[], Run]) -> Run:
    run = make()
    run.by_content = True
    return run.prepare()
