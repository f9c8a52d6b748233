"""Data sets by their names on the Hub: read through `datasets` from a Hub on this machine, in a second process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clha_fast.data.hub import is_hub_name
from tests.support.hub_server import hub

pytest.importorskip("datasets")
READ = """
import sys
from clha_fast.data import read_records
for name in sys.argv[1:]:
    try:
        print([record.prompt for record in read_records(name)])
    except (OSError, ValueError) as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""


def rows(number: int) -> bytes:
    lines = ({"prompt": f"p{k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(number))
    return "\n".join(map(json.dumps, lines)).encode()


def read(home: Path, names: list[str], **environment: str) -> list[str]:
    variables = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    variables.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run([sys.executable, "-c", READ, *names], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_name_is_read_and_then_from_the_cache(tmp_path: Path) -> None:
    names = ["owner/na.me:train", "owner/na.me:test", "owner/na.me", "owner/na.me:dev", "owner/other"]
    with hub("owner/na.me", {"train.jsonl": rows(5), "test.jsonl": rows(2)}) as address:
        train, test, several, unknown, missing = read(tmp_path, names, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert train == str([f"p{k}" for k in range(5)])
    assert test == "['p0', 'p1']"
    assert several.startswith("RecordError owner/na.me: expected one split of it, such as owner/na.me:train")
    assert "splits train, test" in several
    assert unknown.startswith("RecordError owner/na.me:dev: Unknown split \"dev\". Should be one of ['train', 'test']")
    assert missing.startswith("FileNotFoundError")
    assert "no such file, and the Hub gives no such data set (404 Client Error" in missing
    # The Hub is gone: nothing hangs, and what was loaded is there.
    (gone,) = read(tmp_path, names[:1], HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert gone.startswith("FileNotFoundError")
    assert "HF_HUB_OFFLINE=1 takes what is in the cache" in gone
    cached, never = read(tmp_path, ["owner/na.me:test", "owner/other:train"], HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert cached == "['p0', 'p1']"
    assert never.startswith("FileNotFoundError")
    assert "owner/other" in never


def test_the_only_split_needs_no_name(tmp_path: Path) -> None:
    with hub("somebody/ranked", {"train.jsonl": rows(3)}) as address:
        (found,) = read(tmp_path, ["somebody/ranked"], HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert found == "['p0', 'p1', 'p2']"


def test_what_looks_like_a_file_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = ("data/ranked", "other/ranked.jsonl", "a/b.csv.gz", "/owner/name", "a/b/c", "name", "./owner/name", "~/a")
    for name in names:
        assert not is_hub_name(name), name
    for name in ("owner/name", "owner/name:train", "o-w/na.me-v1.5"):
        assert is_hub_name(name), name
