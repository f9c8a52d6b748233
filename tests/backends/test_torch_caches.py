"""Block sizes of the torch backend follow the caches that the operating system reports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clha_fast.backends.torch import backend, caches, head
from clha_fast.backends.torch.caches import USUAL, Caches
from clha_fast.options import HeadOptions
from clha_fast.types import HeadInputs, Needs

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


def test_blocks_of_few_tokens_count_the_weight_s_rows(monkeypatch) -> None:
    """At most a block of logits, and two of logits with the words' rows of the weight."""
    monkeypatch.setattr(head, "block_bytes", lambda device: 4 * 1024 * 1024)
    zeros = torch.zeros(1, 1024), torch.zeros(5000, 1024), None, torch.zeros(1, dtype=torch.int64), None
    blocks = {count: head.TorchHead(HeadInputs(*zeros), HeadOptions()).blocks(count) for count in (1, 512, 1024, 4096)}
    # 2 MiB elements over 1025 numbers a word, over 1536; 1 MiB over 1024 and 4096: whole blocks of 128 words.
    assert [found[0] for found in blocks.values()] == [(0, 1920), (0, 1280), (0, 1024), (0, 256)]
    assert [found[-1][1] for found in blocks.values()] == [5000] * 4


@pytest.mark.parametrize("late", [0, 5])
@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (10, [(10, 64)]),  # all in the gradient's memory
        (64, [(64, 64)]),
        (70, [(64, 64), (6, 6)]),
        (112, [(64, 64), (48, 48)]),
    ],
)
def test_what_the_gradient_cannot_take_goes_to_the_store(count, parts, late) -> None:
    """(tokens, elements from one row to the next) of the gradient's memory, for 64 tokens, and the store, for 48.

    Late tokens are scored, and nothing of them is kept.
    """
    words, width, options = 640, 64, HeadOptions(workspace_bytes=48 * 640 * 4)
    total = count + late
    zeros = torch.zeros(total, width), torch.zeros(words, width), None, torch.zeros(total, dtype=torch.int64), None
    sweep = backend._Sweep(HeadInputs(*zeros), options, Needs(True, True, False))
    sweep.allocate(Needs(True, True, False))
    sweep.logps.fill_(torch.nan)
    kept = sweep.kept(sweep.tokens(late, total), sweep.tokens(0, late))
    assert [(len(scan.tokens), store.stride(0)) for scan, store in kept] == parts
    assert torch.cat([scan.tokens for scan, _ in kept]).tolist() == list(range(late, total))
    torch.testing.assert_close(sweep.logps, torch.full((total,), -math.log(words)))
    assert all(store.shape == (words, len(scan.tokens)) for scan, store in kept)
    # Exponentials of equal logits.
    assert all(bool((store == 1).all()) for _, store in kept)
