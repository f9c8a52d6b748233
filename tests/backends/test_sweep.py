"""Where a sweep over whole prompts is cut, and sums into repeated rows."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clha_fast.backends.memory import Workspace
from clha_fast.backends.triton import workspace
from clha_fast.layout import Chunk, accumulate, even_capacity, even_share, prompt_chunks, prompt_edges
from tests.support.helpers import make_case


def edges(lengths: list[int], sizes: list[int]) -> list[int]:
    return prompt_edges(torch.tensor(lengths), torch.tensor(sizes))


def test_chunks_are_whole_prompts() -> None:
    ends = edges([3, 2, 4, 1, 9, 2], [2, 2, 1, 1])
    assert ends == [0, 5, 10, 19, 21]
    assert prompt_chunks(ends, 10) == [Chunk(0, 2, 0, 0, 10), Chunk(2, 3, 10, 10, 19), Chunk(3, 4, 19, 19, 21)]
    assert prompt_chunks(ends, 1)[1:3] == [Chunk(1, 2, 5, 9, 10), Chunk(2, 3, 10, 18, 19)]
    assert prompt_chunks(ends, 100) == [Chunk(0, 4, 0, 0, 21)]


def test_the_first_chunk_may_have_more_room() -> None:
    ends = edges([3, 2, 4, 1, 9, 2], [2, 2, 1, 1])
    assert prompt_chunks(ends, 5, first=19) == [Chunk(0, 3, 0, 0, 19), Chunk(3, 4, 19, 19, 21)]
    assert prompt_chunks(ends, 5, first=6)[0] == Chunk(0, 1, 0, 0, 5)


def test_chunks_are_even() -> None:
    """Not 10 prompts and then one: as many chunks, of about the same size."""
    ends = edges([1] * 11, [1] * 11)
    assert [chunk.stop - chunk.start for chunk in prompt_chunks(ends, even_capacity(ends, 10))] == [7, 4]
    ends = edges([4, 4, 4, 4, 4, 4, 1], [1] * 7)
    assert [chunk.stop - chunk.start for chunk in prompt_chunks(ends, even_capacity(ends, 24))] == [16, 9]


def test_sizes_that_are_not_on_the_host_are_not_read() -> None:
    """On the meta device there is nothing to read: any attempt raises."""
    ranking = make_case([3, 2, 4], [2, 1]).ranking
    ranking = ranking._replace(candidate_lengths=ranking.candidate_lengths.to("meta"))
    size = Workspace(64, 8, itemsize=4, given=2 * 64 * 4)
    assert workspace._chunks(ranking, 9, size, gradients=True) == [Chunk(0, 2, 0, 7, 9)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    capacity=st.integers(1, 40),
    first=st.none() | st.integers(1, 40),
)
def test_chunks_cover_everything_once(lengths: list[int], capacity: int, first: int | None) -> None:
    chunks = prompt_chunks(edges(lengths, [1] * len(lengths)), capacity, first)
    assert chunks[0].start == chunks[0].first == 0
    assert (chunks[-1].stop, chunks[-1].last) == (sum(lengths), len(lengths))
    for one, other in itertools.pairwise(chunks):
        assert (one.last, one.stop) == (other.first, other.start)
    for number, chunk in enumerate(chunks):
        room = first if first is not None and number == 0 else capacity
        assert chunk.stop - chunk.start <= room or chunk.last - chunk.first == 1
        assert chunk.kept == max(chunk.start, chunk.stop - room)


def test_even_shares() -> None:
    assert [even_share(total, 10) for total in (0, 1, 10, 11, 21)] == [0, 1, 10, 6, 7]


def test_repeated_rows_are_summed() -> None:
    target = torch.zeros(3, 2)
    accumulate(target, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert target.tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]
