"""The workspace's memory in closed form, and the bounds that it is held to."""

from __future__ import annotations

import pytest
import torch

from clha_fast.backends.memory import Workspace, padded_width
from clha_fast.backends.triton import workspace as workspace_backend
from clha_fast.types import RankingInputs

GIB = 2**30


def test_by_hand() -> None:
    """V 1000, H 10: rows of 1024 logits."""
    size = Workspace(1000, 10, 2)
    assert (padded_width(1000), size.tokens) == (1024, 2**26 // 2048)
    # Sums of hidden's gradient 4,000, logits 204,800, rows 2,000, the weight's gradient 20,000 and in float32 40,000.
    assert size.peak(100) == 270_800
    # 300 hidden states behind an index: sums 12,000.
    assert size.peak(100, rows=300) == 278_800
    # 10 tokens at a time: sums 44,000, and later what they are rounded to, 22,000; logits and rows take 20,780.
    small = Workspace(1000, 10, 2, given=20_480)
    assert (small.tokens, small.keeps_factors(10), small.keeps_factors(11)) == (10, True, False)
    assert small.peak(100) == 66_000
    # Several chunks of 10 tokens, their rows read by an index, whatever the number of tokens; of so small a head one
    # chunk, with its product beside the rounded gradient, takes more.
    assert small.beyond(11) == small.beyond(10**6) == 40_000 + 20_480 + 600 + 300
    assert small.worst == small.beyond(10) == 20_480 + 200 + 20_000 + 40_000
    assert size.worst == size.beyond(2**15 + 1) == 40_000 + 2**26 + (6 + 3) * 2**15 * 10
    # A frozen weight: sums and logits alone. In float32 the sums are the gradients.
    assert Workspace(1000, 10, 2, trains=False).peak(100) == 208_800
    frozen = Workspace(128256, 4096, 2, trains=False)
    assert [frozen.tokens_for(largest) for largest in (0, 1046, 5000, 8192, 8193)] == [1046, 1046, 5000, 8192, 1046]
    assert frozen.peak(10**6, largest=5000) - 16_384 * 10**6 == max(2 * 128256 * 5000, 8192 * 10**6)
    assert Workspace(1000, 10, 4).peak(100) == 4_000 + 40_000 + 409_600 + 6_000
    assert not Workspace(1000, 10, 4).keeps_factors(1)
    assert not size.keeps_factors(0)


@pytest.mark.parametrize(("tokens", "limit"), [(4096, 1.2), (8192, 2.2)])
def test_one_chunk_beyond_its_gradients(tokens: int, limit: float) -> None:
    """One chunk of 16-bit logits, and no float32 gradient of the weight."""
    beyond = Workspace(128256, 4096, 2).peak(tokens) - 2 * 4096 * (tokens + 128256)
    assert 2 * tokens * 128256 < beyond <= limit * GIB


def test_no_number_of_tokens_takes_more_than_the_worst_and_its_own_share() -> None:
    for size in (Workspace(128256, 4096, 2), Workspace(32000, 1024, 2), Workspace(151936, 8192, 2, given=2**28)):
        for tokens in (1, 1000, size.tokens, size.tokens + 1, 2**20):
            assert size.peak(tokens) <= size.worst + 6 * tokens * size.width
            assert size.peak(tokens, rows=3 * tokens, largest=tokens) <= size.beyond(tokens) + 18 * tokens * size.width


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("given", [None, 2**24, 2**30])
@pytest.mark.parametrize(("vocabulary", "width"), [(128256, 4096), (32000, 2048), (50257, 768)])
def test_the_most_tokens_within_a_budget(
    vocabulary: int, width: int, given: int | None, itemsize: int, trains: bool
) -> None:
    """One token more is beyond it, and no fewer are; from what the worst takes on there is no limit."""
    size = Workspace(vocabulary, width, itemsize, given, trains)
    assert size.fitting(size.worst) is None
    assert size.fitting(0) == 0
    for tokens in {1, 2, 100, size.most // 2, size.most - 1} - {0}:
        if tokens < size.most:
            found = size.fitting(size.beyond(tokens))
            assert found is None or (found >= tokens and size.beyond(found) == size.beyond(tokens))
            assert (found is None) == (size.beyond(tokens) >= size.worst)
            if found is not None and found < size.most:
                assert size.beyond(found + 1) > size.beyond(tokens)


def test_the_most_tokens_by_hand() -> None:
    """V 151936, H 2048: the gradient in 16 bits and 64 MiB of it in float32; logits and rows 307,968 bytes a token."""
    size = Workspace(151936, 2048, 2)
    budget = 2**30
    tokens = (budget - 2 * 151936 * 2048 - 2**26) // (2 * 151936 + 2 * 2048)
    assert (size.fitting(budget), tokens) == (tokens, 1247)


def test_a_frozen_head_takes_a_small_workspace() -> None:
    """Chunks of 256 MiB of logits, but what one prompt needs more; all that is allowed for sizes on a GPU."""
    size = Workspace(128256, 4096, 2, trains=False)
    assert (size.tokens, size.most) == (1046, 8192)
    assert Workspace(128256, 4096, 2, given=2**31, trains=False).tokens == 8371
    given = RankingInputs(torch.tensor([400, 500, 600, 700, 1000]), torch.tensor([2, 2, 1]))
    chunks = workspace_backend._chunks(given, 3200, size, gradients=True)
    assert [(chunk.start, chunk.kept, chunk.stop) for chunk in chunks] == [
        (0, 0, 900),
        (900, 900, 2200),
        (2200, 2200, 3200),
    ]
    (scored,) = workspace_backend._chunks(given, 3200, size, gradients=False)
    assert (scored.first, scored.last, scored.kept, scored.stop) == (0, 3, 3200 - 1046, 3200)
