"""`tests.support.forked`, by which other tests start programs: what it says of their ends, and that each is alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.support import forked

ENDS = {
    "import sys; print(sys.argv[1:]); print('said', file=sys.stderr)": (0, "['a', 'b c']\n", "said\n"),
    "raise SystemExit(3)": (3, "", ""),
    "raise SystemExit('no')": (1, "", "no\n"),
    "import atexit; atexit.register(print, 'last'); raise SystemExit": (0, "last\n", ""),
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": (-signal.SIGTERM, "", ""),
}


@pytest.mark.parametrize("source", ENDS)
def test_an_end_is_that_of_an_interpreter(source: str) -> None:
    assert forked.run("train", "-c", source, "a", "b c") == forked.Done(*ENDS[source])


def test_an_error_is_printed() -> None:
    done = forked.run("train", "-c", "def f():\n    raise KeyError('here')\nf()")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("KeyError: 'here'\n")
    assert forked.run("train", "tests.support.no_such_module").returncode == 1


def test_nothing_is_left_for_the_next() -> None:
    """Nor of this process's own settings, but for those that it has at the time."""
    source = "import os, torch; print(hasattr(torch, 'mine'), os.environ.get('MINE')); torch.mine = 1"
    for value in ("one", "two"):
        assert forked.run("train", "-c", source, MINE=value).stdout == f"False {value}\n"
    assert forked.run("train", "-c", source).stdout == "False None\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINE", "three")
        assert forked.run("train", "-c", source).stdout == "False three\n"


def test_where_one_fails_none_goes_on() -> None:
    source = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(4); time.sleep(1000)"
    begun = time.monotonic()
    assert forked.run("train", "-c", source, processes=2).returncode == 4
    assert time.monotonic() - begun < 200


def test_who_does_not_end_is_killed(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        forked.run("train", "-c", "import time; time.sleep(1000)", timeout=0.2)
    program = forked.start("train", "-c", "import time; time.sleep(1000)", out=tmp_path / "said")
    assert program.poll() is None
    program.kill()
    assert program.wait() == -signal.SIGKILL
    program.kill()  # of one that has ended nothing


def test_who_shares_a_server_is_alone_too(tmp_path: Path) -> None:
    """As pytest's workers do: whose programs end is heard by none but itself, and only they are killed when it goes."""
    clients = [forked.Server("train") for _ in range(2)]
    wait = ["import os, time; print(os.getppid(), flush=True); time.sleep(1000)"]
    first, second = (client.start("-c", wait, {}, tmp_path / f"said-{k}") for k, client in enumerate(clients))
    outs = [tmp_path / f"said-{k}.out" for k in range(2)]
    while not all(out.exists() and out.read_text() for out in outs):
        time.sleep(0.01)
    assert outs[0].read_text() == outs[1].read_text(), "one server"
    short = clients[0].start("-c", ["raise SystemExit(5)"], {}, tmp_path / "short")
    assert short.wait() == 5
    assert second.poll() is None
    assert clients[1].ended == {}
    clients[0].close()
    end = time.monotonic() + 30
    while Path(f"/proc/{first.pid}").exists():
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.01)
    assert second.poll() is None
    second.kill()
    assert second.wait() == -signal.SIGKILL
    clients[1].close()
