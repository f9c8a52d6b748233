"""Programs of the tests in processes of their own, forked from one that has imported what takes them longest.

torch, what it compiles with and transformers' Trainer take ten seconds of a processor before a program begins. A server
(`python -m tests.support.forked MODULES`) imports them once and computes nothing; each program is a fork of it, and
everything but those imports is its own. Programs whose imports or launcher are what is tested are started elsewhere.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.helpers import ROOT

# By what the programs of a server are: with Triton's interpreter where the tests have it, or never.
KINDS = {
    "train": ("torch._dynamo", "transformers.trainer", "transformers.models.llama.modeling_llama"),
    "walk": ("torch._dynamo",),
}


@dataclass
class Done:
    """How a program ended, as `subprocess.run` says it."""

    returncode: int
    stdout: str
    stderr: str


class Server:
    """The client's end. Closing its input ends the process; programs that still run are killed before."""

    def __init__(self, kind: str) -> None:
        # Whoever asks whether there is a GPU must not begin CUDA, which does not survive a fork.
        given = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.environment = {**os.environ, **given, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        if kind == "walk":
            self.environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.forked", *KINDS[kind]]
        # Nothing is buffered here: `select` would not see it.
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen(command, env=self.environment, cwd=ROOT, **pipes)
        self.ended: dict[int, int] = {}
        atexit.register(self.close)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self, timeout: float) -> dict[str, int]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, timeout))[0]:
            raise TimeoutError("a program of the tests has not ended")
        line = self.process.stdout.readline()
        assert line, "the server of the tests' programs has ended"
        found: dict[str, int] = json.loads(line)
        return found

    def start(self, module: str, arguments: Sequence[str], environment: dict[str, str], out: Path) -> int:
        """The new process's id; it writes to `out` and beside it."""
        assert self.process.stdin is not None
        given = [module, list(arguments), {**self.environment, **environment}, str(out)]
        self.process.stdin.write(json.dumps(given).encode() + b"\n")
        while "started" not in (line := self._line(60)):
            self.ended[line["ended"]] = line["status"]
        return line["started"]

    def wait(self, programs: Sequence[int], timeout: float) -> list[int]:
        """Their exit statuses; the others are killed once one of them has failed."""
        end = time.monotonic() + timeout
        try:
            while not all(program in self.ended for program in programs):
                if any(self.ended.get(program) for program in programs):
                    break
                line = self._line(end - time.monotonic())
                self.ended[line["ended"]] = line["status"]
        finally:
            for program in programs:
                if program not in self.ended:
                    os.kill(program, signal.SIGKILL)
        while not all(program in self.ended for program in programs):
            line = self._line(60)
            self.ended[line["ended"]] = line["status"]
        return [self.ended.pop(program) for program in programs]


@functools.cache
def server(kind: str) -> Server:
    return Server(kind)


def _meeting(processes: int) -> list[dict[str, str]]:
    """The environment that a launcher gives each of several processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    all_of_them = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    all_of_them |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**all_of_them, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(
    kind: str, module: str, *arguments: str, processes: int | None = None, timeout: float = 300, **environment: str
) -> Done:
    """`module` as a program; with `processes` that many of it, as a launcher starts them.

    Returns the first status that is no success, or else 0, with all that was printed.
    """
    here = server(kind)
    meetings = [{}] if processes is None else _meeting(processes)
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(number) for number in range(len(meetings))]
        programs = [
            here.start(module, arguments, {**meeting, **environment}, out)
            for meeting, out in zip(meetings, outs, strict=True)
        ]
        statuses = here.wait(programs, timeout)
        said = ["".join(Path(f"{out}{end}").read_text() for out in outs) for end in (".out", ".err")]
    # The others of one that failed were killed.
    failed = sorted(status for status in statuses if status)
    return Done(failed[-1] if failed else 0, *said)


def _become(module: str, arguments: list[str], environment: dict[str, str], out: str) -> None:
    """The forked process: runs the program and does not return."""
    status = 1
    try:
        for number, end in ((0, None), (1, ".out"), (2, ".err")):
            file = os.open(os.devnull if end is None else out + end, os.O_RDWR | os.O_CREAT)
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Forks for each line of the standard input, and says on the standard output who began and who ended."""
    running: set[int] = set()
    rest = b""
    while True:
        ready = select.select([0], [], [], 0.02)[0]
        if ready:
            read = os.read(0, 2**20)
            if not read:
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                program = os.fork()
                if program == 0:
                    _become(*json.loads(line))
                running.add(program)
                os.write(1, json.dumps({"started": program}).encode() + b"\n")
        for program in list(running):
            ended, status = os.waitpid(program, os.WNOHANG)
            if ended:
                running.remove(program)
                os.write(1, json.dumps({"ended": ended, "status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    for program in running:
        os.kill(program, signal.SIGKILL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve()
