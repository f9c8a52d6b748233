"""Where a sweep over whole prompts is cut, and sums into repeated rows."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clha_fast.layout import Chunk, accumulate, even_share, prompt_chunks
from tests.support.helpers import make_case


def test_chunks_are_whole_prompts() -> None:
    case = make_case([3, 2, 4, 1, 9, 2], [2, 2, 1, 1])
    assert prompt_chunks(case.ranking, 21, 10) == [
        Chunk(0, 2, 0, 4, 0, 10),
        Chunk(2, 3, 4, 5, 10, 19),
        Chunk(3, 4, 5, 6, 19, 21),
    ]
    assert prompt_chunks(case.ranking, 21, 1)[1:3] == [Chunk(1, 2, 2, 4, 5, 10), Chunk(2, 3, 4, 5, 10, 19)]
    assert prompt_chunks(case.ranking, 21, 100) == [Chunk(0, 4, 0, 6, 0, 21)]


def test_chunks_are_even() -> None:
    """Not 10 prompts and then one: as many chunks, of about the same size."""
    ranking = make_case([1] * 11, [1] * 11).ranking
    assert [chunk.stop - chunk.start for chunk in prompt_chunks(ranking, 11, 10)] == [7, 4]
    ranking = make_case([4, 4, 4, 4, 4, 4, 1], [1] * 7).ranking
    sizes = [chunk.stop - chunk.start for chunk in prompt_chunks(ranking, 25, 24)]
    assert sizes == [16, 9]


def test_sizes_that_are_not_on_the_host_are_not_read() -> None:
    """On the meta device there is nothing to read: any attempt raises."""
    ranking = make_case([3, 2, 4], [2, 1]).ranking
    ranking = ranking._replace(candidate_lengths=ranking.candidate_lengths.to("meta"))
    assert prompt_chunks(ranking, 9, 2) == [Chunk(0, 2, 0, 3, 0, 9)]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20), capacity=st.integers(1, 40))
def test_chunks_cover_everything_once(lengths: list[int], capacity: int) -> None:
    ranking = make_case(lengths, [1] * len(lengths)).ranking
    chunks = prompt_chunks(ranking, sum(lengths), capacity)
    assert chunks[0].start == chunks[0].first_prompt == 0
    assert chunks[-1].stop == sum(lengths)
    assert chunks[-1].last_prompt == len(lengths)
    for one, other in itertools.pairwise(chunks):
        assert (one.last_prompt, one.last_candidate, one.stop) == (
            other.first_prompt,
            other.first_candidate,
            other.start,
        )
    for chunk in chunks:
        assert chunk.stop - chunk.start <= capacity or chunk.last_prompt - chunk.first_prompt == 1


def test_even_shares() -> None:
    assert [even_share(total, 10) for total in (0, 1, 10, 11, 21)] == [0, 1, 10, 6, 7]


def test_repeated_rows_are_summed() -> None:
    target = torch.zeros(3, 2)
    accumulate(target, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert target.tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]
