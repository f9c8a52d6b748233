"""Block sizes of the torch backend follow the caches that the operating system reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clha_fast.backends.torch import caches, head
from clha_fast.backends.torch.caches import USUAL, Caches

MIB = 2**20


def listed(folder: Path, *rows: tuple[str, str, str, str]) -> Path:
    for number, row in enumerate(rows):
        index = folder / f"index{number}"
        index.mkdir(parents=True)
        for name, text in zip(("level", "type", "size", "shared_cpu_list"), row, strict=True):
            (index / name).write_text(text + "\n")
    return folder


def test_linux_s_list_is_read(tmp_path: Path) -> None:
    first = [("1", "Data", "32K", "0"), ("1", "Instruction", "32K", "0")]
    found = listed(tmp_path / "a", *first, ("2", "Unified", "512K", "0"), ("3", "Unified", "8192K", "0-1,8"))
    assert caches._listed(found) == Caches(MIB // 2, 8 * MIB, 3)
    # Two levels: the second is the last.
    assert caches._listed(listed(tmp_path / "b", *first, ("2", "Unified", "2M", "0-3"))) == Caches(2 * MIB, 2 * MIB, 4)


@pytest.mark.parametrize("rows", [[], [("1", "Data", "32K", "0")], [("2", "Unified", "many", "0")]])
def test_a_machine_that_does_not_say_is_taken_to_be_usual(tmp_path, monkeypatch, rows) -> None:
    monkeypatch.setattr(caches, "_SYSTEM", listed(tmp_path / "cpu", *rows))
    monkeypatch.setattr("os.sysconf", lambda name: 0)
    assert caches.caches.__wrapped__() == USUAL
    monkeypatch.setattr("os.sysconf", {"SC_LEVEL2_CACHE_SIZE": MIB, "SC_LEVEL3_CACHE_SIZE": 16 * MIB}.__getitem__)
    assert caches.caches.__wrapped__()[:2] == (MIB, 16 * MIB)


@pytest.mark.parametrize(
    ("found", "threads", "block", "piece"),
    [
        # A quarter of each thread's half of 8 MiB; half of 512 KiB.
        (Caches(MIB // 2, 8 * MIB, 2), 2, MIB, MIB // 4),
        # One thread has all of it.
        (Caches(MIB // 2, 8 * MIB, 2), 1, 2 * MIB, MIB // 4),
        # Large caches: no more than was best on one that was measured.
        (Caches(2 * MIB, 100 * MIB, 64), 2, 3 * MIB, MIB // 2),
        # A thread's share of the last level is less than its own second level.
        (Caches(2 * MIB, 100 * MIB, 64), 64, 2 * MIB, MIB // 2),
        (USUAL, 2, 3 * MIB, MIB // 2),
    ],
)
def test_blocks_follow_the_caches(found, threads, block, piece, monkeypatch) -> None:
    monkeypatch.setattr(head, "caches", lambda: found)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert head.block_bytes(torch.device("cpu")) == min(64 * MIB, block * threads)
    assert head.piece_bytes() == piece * threads
    assert head.block_bytes(torch.device("cuda")) == 64 * MIB
