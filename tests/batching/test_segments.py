"""Rows that hold several prompts and candidates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clha_fast.batching.segments import SegmentGroup, Segments, place

GROUPS = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=4)), min_size=1, max_size=4)


def test_by_hand() -> None:
    segments = place([(2, [1, 2]), (1, [1])], multiple=4)
    assert segments == Segments(1, 8, (SegmentGroup(0, (0, 2), ((2, 1), (3, 2))), SegmentGroup(0, (5, 1), ((6, 1),))))
    tokens = segments.tokens()
    assert tokens.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 0]]
    assert tokens.segment_ids.tolist() == [[0, 0, 1, 2, 2, 0, 1, -1]]
    assert tokens.group_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, -1]]


@given(GROUPS, st.integers(1, 5))
def test_every_token_is_where_its_group_says(lengths, multiple) -> None:
    segments = place(lengths, multiple)
    positions, ids, groups = (part[0].tolist() for part in segments.tokens())
    whole = sum(prompt + sum(candidates) for prompt, candidates in lengths)
    assert len(ids) == segments.width
    assert segments.width % multiple == 0
    assert segments.width - whole in range(multiple)
    seen = set()
    for number, ((row, prompt, candidates), (length, others)) in enumerate(zip(segments.groups, lengths, strict=True)):
        assert (row, prompt[1], [size for _, size in candidates]) == (0, length, others)
        for k, (start, size) in enumerate((prompt, *candidates)):
            for place_in in range(size):
                at = start + place_in
                assert at not in seen
                seen.add(at)
                assert (ids[at], groups[at]) == (k, number)
                assert positions[at] == place_in + (length if k else 0)
    assert seen == set(range(whole))
    assert all(ids[at] == groups[at] == -1 for at in range(whole, segments.width))
