"""Rows that hold several prompts and candidates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clha_fast.batching.batch import CandidateBatch, first_prompts, pack_candidates
from clha_fast.batching.segments import SegmentGroup, Segments, place
from tests.batching.test_batch import feature

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


def pack(*features, layout, **settings):
    return pack_candidates(features, pad_token_id=0, layout=layout, **settings)


def test_packed_by_hand() -> None:
    features = feature([1, 2], [[3], [4, 5]]), feature([7], [[8]])
    batch = pack(*features, layout="packed", drop_inert=False, pad_to_multiple_of=5)
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 4, 5, 7, 8, 0]]
    assert batch.attention_mask.tolist() == [[1] * 9 + [0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 0]]
    assert batch.group_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, -1]]
    assert batch.targets.tolist() == [3, 4, 5, 8]
    assert batch.row_index.tolist() == [1, 4, 5, 7]
    assert batch.segments.longest == 4


def test_shared_by_hand() -> None:
    features = feature([1, 2], [[3], [4, 5]]), feature([7], [[8]])
    batch = pack(*features, layout="shared", drop_inert=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8]]
    assert batch.attention_mask.tolist() == [[1] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 2, 2, 0, 1]]
    assert batch.targets.tolist() == [3, 4, 5, 8]
    assert batch.row_index.tolist() == [1, 1, 3, 5]  # the prompt's last row is read by both


def test_inert_candidates_have_no_segment() -> None:
    # Rewards 5, 4, -1 at margin 3: all are in a pair. Rewards 2, 1, 1.5: no pair, the first trains SFT. -1, -2: none.
    features = (
        feature([1, 2], [[3], [4], [5]], [2.0, 1.0, 1.5]),
        feature([6], [[7], [8] * 9], [-1.0, -2.0]),
        feature([1], [[2], [3, 4], [5]], [5.0, 4.0, -1.0]),
    )
    batch = pack(*features, layout="shared")
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 3, 4, 5]]
    assert [len(group.candidates) for group in batch.segments.groups] == [1, 3]
    assert batch.candidate_lengths.tolist() == [1, 0, 0, 0, 0, 1, 2, 1]
    assert batch.num_inert == 4


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_all_inert_leaves_one_token(layout) -> None:
    batch = pack(feature([4, 2], [[3], [4]], [-1.0, -2.0]), layout=layout)
    assert batch.input_ids.tolist() == [[4]]
    assert batch.segments.groups == (SegmentGroup(0, (0, 1), ()),)
    assert batch.targets.numel() == batch.row_index.numel() == 0


def test_bad_layout_and_lone_fields() -> None:
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, auto, got 'tree'"):
        pack(feature([1], [[2]]), layout="tree")
    batch = pack(feature([1], [[2]]), layout="shared", drop_inert=False).as_dict()
    with pytest.raises(ValueError, match="group_ids: expected beside segments, and only there, got none"):
        CandidateBatch.from_dict({name: value for name, value in batch.items() if name != "group_ids"})
    assert not {"segments", "position_ids"} & pack(feature([1], [[2]]), layout="padded").as_dict().keys()


FEATURES = st.lists(
    st.tuples(
        st.lists(st.integers(1, 9), min_size=1, max_size=5),
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
        st.lists(st.sampled_from([-2.0, 0.5, 4.0]), min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def read(batch: CandidateBatch) -> list[tuple[list[int], int]]:
    """What each scored token is predicted from, and the token."""
    found = []
    width = batch.input_ids.shape[1]
    owner = torch.repeat_interleave(torch.arange(len(batch.candidate_lengths)), batch.candidate_lengths).tolist()
    own = [k for k, length in enumerate(batch.candidate_lengths.tolist()) if length]
    numbers = [
        (group, k + 1)
        for group, part in enumerate(batch.segments.groups if batch.segments else ())
        for k in range(len(part.candidates))
    ]
    for token, at in enumerate(batch.row_index.tolist()):
        row, place_in = divmod(at, width)
        if batch.segments is None:
            seen = batch.input_ids[row, : place_in + 1]
        else:
            group, segment = numbers[own.index(owner[token])]
            ids, positions = batch.segment_ids[row], batch.position_ids[row]
            there = (batch.group_ids[row] == group) & ((ids == 0) | (ids == segment))
            there &= positions <= positions[place_in]
            seen = batch.input_ids[row, there]
            assert positions[there].tolist() == list(range(len(seen)))
        found.append((seen.tolist(), int(batch.targets[token])))
    return found


@given(FEATURES, st.sampled_from(["packed", "shared"]), st.booleans(), st.sampled_from([None, 4]))
def test_every_layout_asks_the_same(drawn, layout, drop, multiple) -> None:
    features = [feature(prompt, own, rewards[: len(own)]) for prompt, own, rewards in drawn]
    padded, other = (
        pack(*features, layout=name, drop_inert=drop, pad_to_multiple_of=multiple) for name in ("padded", layout)
    )
    assert read(other) == read(padded)
    for name in ("targets", "candidate_lengths", "candidates_per_prompt", "rewards", "sft_index"):
        assert torch.equal(getattr(other, name), getattr(padded, name))
    assert (other.num_inert, other.inert_for) == (padded.num_inert, padded.inert_for)
    again = CandidateBatch.from_dict(other.as_dict()).to("cpu")
    assert again.segments == other.segments
    assert torch.equal(again.position_ids, other.position_ids)
    assert read(first_prompts(other, 1)) == read(first_prompts(padded, 1))
    kept = int((other.candidate_lengths > 0).sum())
    spans = [tuple(map(tuple, group.candidates)) for group in other.segments.groups]
    assert sum(map(len, spans)) == kept
    if layout == "packed" and kept:
        assert all(len(span) == 1 for span in spans)
