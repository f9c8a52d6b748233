"""Attention masks of rows that hold several candidates, by hand, and whose calls they reach."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import masking_utils

from clha_fast.batching.segments import place
from clha_fast.models import segment_masks
from clha_fast.models.segment_masks import UnsupportedLayoutError, by_position, segmented


def seen(function, segments) -> list[str]:
    tokens = segments.tokens()
    at = torch.arange(segments.width)
    mask = by_position(function, tokens)(torch.zeros(1, 1, dtype=torch.long), None, at[:, None], at[None, :])
    return ["".join("x" if there else "." for there in row) for row in mask.tolist()]


def test_masks_by_hand() -> None:
    segments = place([(2, [1, 2]), (1, [1])], multiple=8)
    causal = masking_utils.causal_mask_function
    assert seen(causal, segments) == [
        "x.......",
        "xx......",
        "xxx.....",
        "xx.x....",
        "xx.xx...",
        ".....x..",
        ".....xx.",
        ".......x",
    ]
    # A window of two tokens: positions, not places, are counted.
    assert seen(masking_utils.sliding_window_causal_mask_function(2), segments)[2:5] == [
        ".xx.....",
        ".x.x....",
        "...xx...",
    ]


def test_other_calls_are_left_alone() -> None:
    segments = place([(2, [1, 2])])
    arguments = {"batch_size": 1, "q_length": 5, "kv_length": 5}
    make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    plain = make["sdpa"](**arguments, allow_is_causal_skip=False)
    with segmented(segments, segments.tokens()):
        inside = make["sdpa"](**arguments)
        other: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: other.append(make["sdpa"](**arguments, allow_is_causal_skip=False)))
        thread.start()
        thread.join()
    assert torch.equal(plain, torch.ones(5, 5, dtype=torch.bool).tril()[None, None])
    assert torch.equal(other[0], plain)
    assert not torch.equal(inside, plain)
    assert torch.equal(make["sdpa"](**arguments, allow_is_causal_skip=False), plain)


def test_a_mask_too_large_for_memory_is_refused(monkeypatch) -> None:
    segments = place([(30, [40, 50])])
    monkeypatch.setattr(segment_masks, "MASK_BYTES", 100**2)
    with (
        segmented(segments, segments.tokens()),
        pytest.raises(UnsupportedLayoutError, match=r"at most 100 tokens.*got 120; fewer prompts.*flex_attention"),
    ):
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"](batch_size=1, q_length=120, kv_length=120)


def test_other_implementations_are_refused_by_name() -> None:
    segments = place([(2, [1, 2])])
    with segmented(segments, segments.tokens()), pytest.raises(UnsupportedLayoutError) as error:
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"](batch_size=1, q_length=5, kv_length=5)
    assert "expected one of sdpa, eager, flex_attention" in str(error.value)
    assert "got 'flash_attention_2'" in str(error.value)


def test_flex_attention_gets_a_block_mask() -> None:
    segments = place([(3, [2, 4]), (2, [3])])
    plain = by_position(masking_utils.causal_mask_function, segments.tokens())
    at = torch.arange(segments.width)
    expected = plain(torch.zeros(1, 1, dtype=torch.long), None, at[:, None], at[None, :])
    given = segment_masks._in_segments(
        "flex_attention", segments.tokens(), {"q_length": segments.width, "kv_length": segments.width}
    )
    got = torch.stack(
        [torch.stack([given["mask_function"](torch.tensor(0), torch.tensor(0), q, k) for k in at]) for q in at]
    )
    assert torch.equal(got, expected)
    assert given["attention_mask"] is None
