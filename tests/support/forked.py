"""Programs of the tests in processes of their own, forked from one that has imported what takes them longest.

torch, what it compiles with and transformers' Trainer take ten seconds of a processor before a program begins. A server
of each kind imports them once for all of pytest's workers and computes nothing; each program is a fork of it, and
everything but those imports is its own. What is tested by what it imports begins with torch alone, "bare"; by its
launcher, elsewhere. The servers are forks of one process (`python -m tests.support.forked SOCKET`), which has torch.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
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
from typing import NoReturn

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
    """The client's end. Programs that still run when it is closed are killed."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(300)
        self.connection.connect(address or begin())
        self.connection.sendall(json.dumps([kind, self.environment()]).encode() + b"\n")
        assert self.connection.recv(1), (
            f"the server of the tests' programs {kind!r} has not begun"
        )  # once it has imported
        # Nothing is buffered here: `select` would not see it.
        self.said = self.connection.makefile("rb", buffering=0)
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
        self.said.close()
        self.connection.close()

    def hears(self, timeout: float) -> bool:
        return bool(select.select([self.said], [], [], max(0.0, timeout))[0])

    def hear(self, timeout: float) -> int | None:
        """Reads what the process says next: that a program ended, which is kept, or the number of one that began."""
        if not self.hears(timeout):
            raise TimeoutError("a program of the tests has not ended")
        line = self.said.readline()
        assert line, "the server of the tests' programs has ended"
        program, status = json.loads(line)
        if status is not None:
            self.ended[program] = status
            return None
        return int(program)

    def start(self, module: str, arguments: Sequence[str], environment: dict[str, str], out: Path) -> Program:
        """It writes to `out` with .out and .err behind it."""
        given = [module, list(arguments), {**self.environment(), **environment}, str(out)]
        self.connection.sendall(json.dumps(given).encode() + b"\n")
        while (program := self.hear(300)) is None:
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


# Where the servers are; "" where this process has none from another yet.
address = ""


@functools.cache
def begin() -> str:
    """Starts what the servers are forked from, which ends with this process, and says where it listens."""
    folder = tempfile.mkdtemp()
    if len(folder) > 80:  # a socket's path is at most about 100 bytes long
        os.rmdir(folder)
        folder = tempfile.mkdtemp(dir="/tmp")
    path = os.path.join(folder, "servers")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.forked", str(listening.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[listening.fileno()]
        )

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    atexit.register(end)
    return path


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


def _become(module: str, arguments: list[str], environment: dict[str, str], out: str) -> NoReturn:
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


def serve(new: socket.socket) -> NoReturn:
    """Forks for each line of a client, and says to it who began, and who ended and how; `new` clients are passed on."""
    clients: dict[socket.socket, bytes] = {}  # what each has sent of a line that goes on
    running: dict[int, socket.socket] = {}

    def say(client: socket.socket, program: int, status: int | None) -> None:
        with contextlib.suppress(OSError):  # it has gone
            client.sendall(json.dumps([program, status]).encode() + b"\n")

    while True:
        for ready in select.select([new, *clients], [], [], 0.02 if running else None)[0]:
            if ready is new:
                _, handles, *_ = socket.recv_fds(new, 1, 1)
                if not handles:  # all of the tests are over
                    for program in running:
                        os.kill(program, signal.SIGKILL)
                    os._exit(0)
                client = socket.socket(fileno=handles[0])
                clients[client] = b""
                client.sendall(b"\n")
                continue
            try:
                read = ready.recv(2**20)
            except ConnectionResetError:
                read = b""
            if not read:
                del clients[ready]
                ready.close()
                for program in [program for program, client in running.items() if client is ready]:
                    os.kill(program, signal.SIGKILL)
                continue
            *lines, clients[ready] = (clients[ready] + read).split(b"\n")
            for line in lines:
                program = os.fork()
                if program == 0:
                    for other in (new, *clients):
                        other.close()
                    _become(*json.loads(line))
                running[program] = ready
                say(ready, program, None)
        for program, client in list(running.items()):
            ended, status = os.waitpid(program, os.WNOHANG)
            if ended:
                del running[program]
                say(client, ended, os.waitstatus_to_exitcode(status))


def fork_servers(listening: socket.socket) -> None:
    """Passes each client on to the server of its kind, until the standard input of this process is closed."""
    kinds: dict[str, socket.socket] = {}
    while listening in select.select([0, listening], [], [])[0]:
        client, _ = listening.accept()
        line = b""
        while not line.endswith(b"\n") and (read := client.recv(2**20)):  # it sends no more before it has an answer
            line += read
        if not line:  # it has gone
            continue
        kind, environment = json.loads(line)
        if kind not in kinds:
            importlib.import_module("torch")
            kinds[kind], new = socket.socketpair()
            if os.fork() == 0:
                for other in (listening, client, *kinds.values()):
                    other.close()
                os.environ.clear()
                os.environ.update(environment)
                for name in KINDS[kind]:
                    importlib.import_module(name)
                gc.collect()
                gc.freeze()  # no program looks at it again
                serve(new)
            new.close()
        socket.send_fds(kinds[kind], [b"."], [client.fileno()])
        client.close()
    shutil.rmtree(os.path.dirname(listening.getsockname()))


if __name__ == "__main__":
    fork_servers(socket.socket(fileno=int(sys.argv[1])))
