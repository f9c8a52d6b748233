"""Programs of the tests in processes of their own, forked from one that has imported what takes them longest.

torch, what it compiles with and transformers' Trainer take ten seconds of a processor before a program begins. A server
(`python -m tests.support.forked MODULES`) imports them once and computes nothing; each program is a fork of it, and
everything but those imports is its own. What is tested by what it imports begins with torch alone, "bare"; by its
launcher, elsewhere.
"""

from __future__ import annotations

import atexit
import contextlib
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

# The package itself is for the programs to import.
ROOT = Path(__file__).resolve().parents[2]
# By what the programs of a server are: with Triton's interpreter where the tests have it ("train"), or never.
KINDS = {
    "bare": ("torch",),
    "train": ("torch._dynamo", "transformers.trainer", "transformers.models.llama.modeling_llama"),
    "walk": ("torch._dynamo",),
}


@dataclass
class Done:
    """How a program ended, as `subprocess.run` says it."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Program:
    """One that was started, as `subprocess.Popen` has it."""

    server: Server
    pid: int

    def poll(self) -> int | None:
        """Its exit status, once it has ended."""
        while self.pid not in self.server.ended and self.server.hears(0.0):
            self.server.hear(0.0)
        return self.server.ended.get(self.pid)

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            self.server.hear(end - time.monotonic())
        return status


class Server:
    """The client's end. Closing its input ends the process; programs that still run are killed before."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.forked", *KINDS[kind]]
        # Nothing is buffered here: `select` would not see it.
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = subprocess.Popen(command, env=self.environment(), cwd=ROOT, **pipes)
        self.ended: dict[int, int] = {}
        atexit.register(self.close)

    def environment(self) -> dict[str, str]:
        # Whoever asks whether there is a GPU must not begin CUDA, which does not survive a fork.
        given = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        found = {**os.environ, **given, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        if self.kind != "train":
            found.pop("TRITON_INTERPRET", None)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def hears(self, timeout: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], max(0.0, timeout))[0])

    def hear(self, timeout: float) -> int | None:
        """Reads what the process says next: that a program ended, which is kept, or the number of one that began."""
        assert self.process.stdout is not None
        if not self.hears(timeout):
            raise TimeoutError("a program of the tests has not ended")
        line = self.process.stdout.readline()
        assert line, "the server of the tests' programs has ended"
        program, status = json.loads(line)
        if status is not None:
            self.ended[program] = status
            return None
        return int(program)

    def start(self, module: str, arguments: Sequence[str], environment: dict[str, str], out: Path) -> Program:
        """It writes to `out` with .out and .err behind it."""
        assert self.process.stdin is not None
        given = [module, list(arguments), {**self.environment(), **environment}, str(out)]
        self.process.stdin.write(json.dumps(given).encode() + b"\n")
        while (program := self.hear(300)) is None:  # the first waits for the imports
            pass
        self.ended.pop(program, None)  # numbers of processes come back
        return Program(self, program)

    def wait(self, programs: Sequence[Program], timeout: float) -> list[int]:
        """Their exit statuses; the others are killed once one of them has failed."""
        end = time.monotonic() + timeout
        try:
            while None in (found := [program.poll() for program in programs]) and not any(found):
                self.hear(end - time.monotonic())
        finally:
            for program in programs:
                program.kill()
        return [program.wait() for program in programs]


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


def start(kind: str, module: str, *arguments: str, out: Path, **environment: str) -> Program:
    """As `run`, without waiting for its end; what it prints is in `out` with .out and .err behind it."""
    return server(kind).start(module, arguments, environment, out)


def run(
    kind: str,
    module: str,
    *arguments: str,
    processes: int | None = None,
    timeout: float = 300,
    given: str = "",
    **environment: str,
) -> Done:
    """`module` as a program, or with "-c" the source that follows; `processes` of it, as a launcher starts them.

    Each is `given` a text on its standard input.

    Returns the status of one that failed, or else 0, with all that was printed.
    """
    here = server(kind)
    meetings = [{}] if processes is None else _meeting(processes)
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(number) for number in range(len(meetings))]
        for out in outs:
            Path(f"{out}.in").write_text(given)
        programs = [
            here.start(module, arguments, {**meeting, **environment}, out)
            for meeting, out in zip(meetings, outs, strict=True)
        ]
        statuses = here.wait(programs, timeout)
        said = ["".join(Path(f"{out}{end}").read_text() for out in outs) for end in (".out", ".err")]
    # The others of one that failed were killed.
    failed = sorted(status for status in statuses if status)
    return Done(failed[-1] if failed else 0, *said)


def output(kind: str, source: str) -> str:
    """What a program, given as its source, prints before it ends well."""
    done = run(kind, "-c", source)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _become(module: str, arguments: list[str], environment: dict[str, str], out: str) -> None:
    """The forked process: runs the program and does not return."""
    status = 1
    try:
        for number, end in ((0, ".in"), (1, ".out"), (2, ".err")):
            file = os.open(out + end, os.O_RDWR | os.O_CREAT)
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        if module == "-c":
            source, *arguments = arguments
            sys.argv = ["-c", *arguments]
            exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
        else:
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
        atexit._run_exitfuncs()  # the program's own, as an interpreter's end has it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Forks for each line of the standard input, and says on the standard output who began, and who ended and how."""
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
                os.write(1, json.dumps([program, None]).encode() + b"\n")
        for program in list(running):
            ended, status = os.waitpid(program, os.WNOHANG)
            if ended:
                running.remove(program)
                os.write(1, json.dumps([ended, os.waitstatus_to_exitcode(status)]).encode() + b"\n")
    for program in running:
        os.kill(program, signal.SIGKILL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve()
