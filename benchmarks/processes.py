"""Pieces of the GPU benchmark in processes of their own: what fails, hangs or breaks the GPU's context ends one piece.

A piece is a function of `benchmarks.pieces`. It gets its arguments as JSON, and prints what it knows as a line of JSON
whenever it knows more; the last line counts. One that is killed has left what it had printed. None outlives this
process: one that goes on alone would hold the GPU, and be in the next run's times.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.measure import Deadline

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_TIME = "out of time"
NO_END = "did not end within {:.0f} s"
# A process that starts, imports torch and builds a batch needs about this long on a slow machine.
START_SECONDS = 15.0
_PARENT = "BENCHMARK_PARENT"
_RUNNING: set[subprocess.Popen[str]] = set()


def child_environment() -> dict[str, str]:
    """This process's environment, with the repository on the path, and for `end_with_parent` this process's number."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, _PARENT: str(os.getpid())}


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
    _RUNNING.add(process)
    try:
        out, errors = process.communicate(given, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        _kill(process)
        out, errors = process.communicate()
        return out, errors or "", None
    finally:
        _RUNNING.discard(process)
        if process.returncode is None:  # interrupted
            _kill(process)
    return out, errors or "", process.returncode


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """From now on this process and those that it starts are killed when the one that started it is gone."""
    parent = int(os.environ.get(_PARENT, os.getppid()))  # which may be gone already

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


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
    jobs: dict[str, tuple[str, dict[str, Any]]], device: str, deadline: Deadline, log: Path, workers: int, each: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the job, what it found) of several pieces at once, as they end; a piece has at most `each` seconds."""

    def run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return run_within(each, name, arguments, device, deadline, log)

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run, *job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # interrupted: the pool waits for what runs
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_RUNNING):
                _kill(process)


def run_within(
    seconds: float, name: str, arguments: dict[str, Any], device: str, deadline: Deadline, log: Path
) -> dict[str, Any]:
    """`run_piece` in at most so many seconds; what takes longer than that has failed, and not for want of time."""
    whole = deadline.allows(seconds)
    found = run_piece(name, arguments, device, Deadline(min(seconds, deadline.left())), log)
    if whole and found.get("failed") == OUT_OF_TIME:
        found["failed"] = NO_END.format(seconds)
    return found
