"""Data sets by their names on the Hub: read through `datasets` from a Hub on this machine, in a second process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clha_fast.data.hub import is_hub_name
from tests.support import forked
from tests.support.hub_server import hub

pytest.importorskip("datasets")
_LIMIT = 240  # seconds
READ = """
import sys
names, sys.stdout = open(sys.argv[1]), open(sys.argv[2], "w")
from clha_fast.data import read_records
for line in names:
    name = line.rstrip()
    try:
        print([record.prompt for record in read_records(name)], flush=True)
    except (OSError, ValueError) as error:
        print(type(error).__name__, " ".join(str(error).split()), flush=True)
"""


def rows(number: int) -> bytes:
    lines = ({"prompt": f"p{k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(number))
    return "\n".join(map(json.dumps, lines)).encode()


@contextlib.contextmanager
def reader(home: Path, **environment: str) -> Iterator[Callable[[str], str]]:
    """A process that reads one name after another: `datasets` takes seconds to import, the Hub's address with it."""
    pipes = [str(home / name) for name in ("names", "found")]
    for pipe in pipes:
        os.mkfifo(pipe)
    given = {"HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = forked.start("bare", "-c", READ, *pipes, out=home / "said", **given, **environment)
    limit = threading.Timer(_LIMIT, os.kill, (process.pid, signal.SIGKILL))  # its end is an empty line, and a failure
    limit.start()
    with contextlib.ExitStack() as ends, open(pipes[0], "w") as names, open(pipes[1]) as found:
        ends.callback(limit.cancel)

        def read(name: str) -> str:
            print(name, file=names, flush=True)
            return found.readline().rstrip()

        yield read
    for pipe in pipes:
        os.unlink(pipe)
    assert process.wait() == 0


def test_a_name_is_read_and_then_from_the_cache(tmp_path: Path) -> None:
    sets = {"owner/na.me": {"train.jsonl": rows(5), "test.jsonl": rows(2)}, "somebody/ranked": {"train.jsonl": rows(3)}}
    with contextlib.ExitStack() as ends:
        with hub(sets) as address:
            read = ends.enter_context(reader(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0"))
            assert read("owner/na.me:train") == str([f"p{k}" for k in range(5)])
            assert read("owner/na.me:test") == "['p0', 'p1']"
            several = read("owner/na.me")
            assert several.startswith("RecordError owner/na.me: expected one split of it, such as owner/na.me:train")
            assert "splits train, test" in several
            unknown = "RecordError owner/na.me:dev: Unknown split \"dev\". Should be one of ['train', 'test']"
            assert read("owner/na.me:dev").startswith(unknown)
            missing = read("owner/other")
            assert missing.startswith("FileNotFoundError")
            assert "no such file, and the Hub gives no such data set (404 Client Error" in missing
            assert read("somebody/ranked") == "['p0', 'p1', 'p2']", "the only split needs no name"
        # The Hub is gone: nothing hangs, and what was loaded is there.
        gone = read("owner/na.me:train")
        assert gone.startswith("FileNotFoundError")
        assert "HF_HUB_OFFLINE=1 takes what is in the cache" in gone
    with reader(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1") as read:
        assert read("owner/na.me:test") == "['p0', 'p1']"
        never = read("owner/other:train")
        assert never.startswith("FileNotFoundError")
        assert "owner/other" in never


def test_what_looks_like_a_file_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = ("data/ranked", "other/ranked.jsonl", "a/b.csv.gz", "/owner/name", "a/b/c", "name", "./owner/name", "~/a")
    for name in names:
        assert not is_hub_name(name), name
    for name in ("owner/name", "owner/name:train", "o-w/na.me-v1.5"):
        assert is_hub_name(name), name
