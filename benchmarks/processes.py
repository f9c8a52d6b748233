"""Pieces of the GPU benchmark in processes of their own: what fails, hangs or breaks the GPU's context ends one piece.

A piece is a function of `benchmarks.pieces`. It gets its arguments as JSON, and prints what it knows as a line of JSON
whenever it knows more; the last line counts. One that is killed has left what it had printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.measure import Deadline

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_TIME = "out of time"
# A process that starts, imports torch and builds a batch needs about this long on a slow machine.
START_SECONDS = 15.0


def child_environment() -> dict[str, str]:
    """This process's environment, with the repository on the path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def output_within(
    command: Sequence[str], seconds: float, given: str = "", merge: bool = False
) -> tuple[str, str, int | None]:
    """(stdout, stderr, exit status, or None where it was killed after `seconds`), the processes it started included."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge else subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(given, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        return out, errors or "", None
    return out, errors or "", process.returncode


def run_piece(name: str, arguments: dict[str, Any], device: str, deadline: Deadline, log: Path) -> dict[str, Any]:
    """What a piece found, with "failed" beside it where it did not come to its end in time.

    Its stderr is added to `log`.
    """
    seconds = deadline.left()
    if seconds < START_SECONDS:
        return {"failed": OUT_OF_TIME}
    # It stops by itself before it is stopped.
    given = json.dumps(arguments | {"seconds": seconds - START_SECONDS / 3})
    out, errors, status = output_within([sys.executable, "-m", "benchmarks.pieces", device, name], seconds, given)
    if errors.strip():
        with log.open("a") as file:
            file.write(f"== {name} {json.dumps(arguments)}\n{errors.rstrip()}\n")
    lines = [line for line in out.splitlines() if line.startswith('{"')]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if status is None:
        found.setdefault("failed", OUT_OF_TIME)
    elif status != 0:
        last = (errors.strip().splitlines() or [""])[-1]
        found.setdefault("failed", f"the process ended with {status}: {last}"[:300])
    return found


def run_pieces(
    jobs: dict[str, tuple[str, dict[str, Any]]], device: str, deadline: Deadline, log: Path, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the job, what it found) of several pieces at once, each as it ends."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run_piece, *job, device, deadline, log): name for name, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
