"""The routed backward's dhidden: programs of several segments, sums in one order, and what it moves by count."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import interpreter

from clha_fast.backends.triton import routed
from clha_fast.options import ROUTE_WORDS
from csrc_triton import configs
from tests.support import routed_bytes
from tests.support.triton_harness import (
    PLAIN,
    close,
    eager_gradients,
    error,
    every_dtype,
    gradients,
    over_dtypes,
    problem,
    set_routed_dhidden,
    upstream,
)

ALL = PLAIN.replace(max_dropped_mass=0.0)


def test_segments_together_by_hand() -> None:
    # 8192 x 4096 on 132 multiprocessors: 264 programs at once, 32 tiles of H, 8 rows of programs for 32 segments.
    assert routed.segments_together(32, 32, 264) == 4
    # Fewer segments than programs: one each. More tiles of H than programs: all segments to one row of programs.
    assert routed.segments_together(8, 32, 264) == 1
    assert routed.segments_together(9, 400, 264) == 9
    assert routed.segments_together(0, 1, 132) == 1


COUNTS = [[3, 0, 16, 5], [0, 0, 0, 0], [16, 16, 16, 2], [0, 1, 0, 0], [4, 0, 0, 9]]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("rows", "most_blocks", "firsts", "used", "first_row"),
    [
        (64, 5, [0, 2, 4, 5, 5, 5], [24, 64, 16, 0, 0], [0, 24, 0, 56, 0]),
        (80, 5, [0, 3, 5, 5, 5, 5], [80, 24, 0, 0, 0], [0, 24, 24, 0, 8]),
        (1000, 5, [0, 5, 5, 5, 5, 5], [104, 0, 0, 0, 0], [0, 24, 24, 80, 88]),
        (1000, 2, [0, 2, 4, 5, 5, 5], [24, 64, 16, 0, 0], [0, 24, 0, 56, 0]),
        (64, 1, [0, 1, 2, 3, 4, 5], [24, 0, 56, 8, 16], [0, 0, 0, 0, 0]),
    ],
)
def test_chunks_by_hand(rows: int, most_blocks: int, firsts: list[int], used: list[int], first_row: list[int]) -> None:
    """24, 0, 50, 1 and 13 pairs in tiles of 8 rows; the chunks that are not needed are empty."""
    found = cut(torch.tensor(COUNTS, dtype=torch.int32).cumsum(1, dtype=torch.int32), 5, rows, most_blocks, 8)
    assert [part.tolist() for part in found] == [firsts, used, first_row]


def cut(ends: torch.Tensor, chunks: int, rows: int, most_blocks: int, tile: int) -> routed._Chunks:
    return routed._cut(ends, chunks, rows, most_blocks, tile, **configs.select("route_chunks", "interpreter", "fp32"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("resident", [1, 3, 99], ids=["one program", "three, the last shorter", "a program a segment"])
def test_programs_of_several_segments(monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
    """Five segments of 32 tokens, three tiles of H: spans of 5, 2 and 1; the last block and the last tile not whole."""
    set_routed_dhidden(monkeypatch, RESIDENT=resident)
    p = problem(150, ROUTE_WORDS + 9, 70, head=ALL)
    wanted = eager_gradients(p, upstream(p), torch.float64)[0]
    value = gradients(p, upstream(p), (True, False, False))[0]
    assert value is not None
    close(value, wanted, 1e-6)


@over_dtypes(torch.float32, torch.bfloat16)
def test_no_sum_depends_on_how_segments_are_shared_out(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The same bits on devices of every size; a block in each chunk, so that every launch adds to the last one's."""
    head = PLAIN.replace(max_dropped_mass=0.01, workspace_bytes=1)
    p = problem(70, 2 * ROUTE_WORDS + 9, 64, dtype=dtype, head=head, rows=60)
    p.weight *= 2
    found = []
    # A CPU's BLAS sums a row by where its operands lie in memory; in float64 none of that reaches float32.
    plain = interpreter.np.matmul
    monkeypatch.setattr(interpreter.np, "matmul", lambda a, b, **_: plain(a, b, dtype="float64").astype("float32"))
    for resident in (1, 3, 99):
        set_routed_dhidden(monkeypatch, RESIDENT=resident)
        found.append(gradients(p, upstream(p), (True, False, False))[0])
    first, *others = found
    assert first is not None
    assert all(other is not None and torch.equal(first, other) for other in others)


@every_dtype
def test_dhidden_of_many_segments_is_no_worse_than_the_eager_one(dtype: torch.dtype) -> None:
    p = problem(100, 2 * ROUTE_WORDS + 9, 64, dtype=dtype, head=ALL.replace(workspace_bytes=1))
    exact = eager_gradients(p, upstream(p), torch.float64)[0]
    value = gradients(p, upstream(p), (True, False, False))[0]
    assert value is not None
    assert error(value, exact) <= 1.05 * error(eager_gradients(p, upstream(p), dtype)[0], exact)


def test_both_ways_through_the_kernel_are_interpreted() -> None:
    """A weight loaded once a block, and tile by tile: 16 bits on NVIDIA take the one, everything else the other."""
    entries = configs.GEMMS["routed_hidden_grad"]
    whole = {key for key, tile in entries.items() if tile["BLOCK_V"] == ROUTE_WORDS}
    assert whole == {(arch, "16-bit") for arch in ("sm_80", "sm_90", "sm_100", "interpreter")}


def test_bytes_by_hand() -> None:
    """64 tokens x 64 of H of 128 words: 4 bytes of dlogits, 4 of a sum, and the weight's 256 over the pairs."""
    assert routed_bytes.hidden_grad("sm_90", 256) == 9
    assert routed_bytes.hidden_grad("sm_90", 64) == 12
    assert routed_bytes.hidden_grad("gfx942", 128) == 2 + 4 + 4  # parts of a block: the weight for every 64 tokens
    assert routed_bytes.recompute("sm_90") == 4
    assert routed_bytes.weight_grad("sm_90") == 4
    assert routed_bytes.weight_grad("gfx942") == 4
    # A dense tile of 128 x 256 is 1 GEMM a GEMM: 3 bytes a pair.
    assert routed_bytes.gemms(3) == 1


def test_dhidden_costs_at_most_three_gemms_of_the_kept_share() -> None:
    """It was 5.3, of full tiles: 16 bytes a pair."""
    assert routed_bytes.gemms(16) == pytest.approx(16 / 3)
    assert routed_bytes.gemms(routed_bytes.hidden_grad("sm_90", 256)) <= 3
    assert routed_bytes.step("sm_90", 8192, 4096, 0.14)[0] <= 3
