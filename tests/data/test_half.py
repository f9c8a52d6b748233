"""Halves of a file by prompt: apart, whole, and the same whatever the seed of a split."""

from __future__ import annotations

import pytest

from clha_fast.data import RankedRecord
from clha_fast.data.split import half_of, prompt_key, split_records


def test_halves() -> None:
    records = [RankedRecord(f"prompt {number % 100}", (f"a {number}", "b")) for number in range(300)]
    halves = [half_of(records, half) for half in (0, 1)]
    keys = [{prompt_key(record) for record in half} for half in halves]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 100
    assert sum(map(len, halves)) == 300
    assert 30 < len(keys[0]) < 70
    assert half_of(list(reversed(records)), 0) == list(reversed(halves[0]))
    # Neither half is what a split by any seed holds out.
    for seed in range(3):
        train, held_out = split_records(halves[0], 0.5, seed)
        assert min(len(train), len(held_out)) > 20


def test_refused() -> None:
    records = [RankedRecord("prompt", ("a", "b"))]
    for half in (2, True, None):
        with pytest.raises(ValueError, match="half: expected 0 or 1, got"):
            half_of(records, half)  # type: ignore[arg-type]
    found = half_of([RankedRecord(f"prompt {k}", ("a", "b")) for k in range(20)], 0)
    with pytest.raises(
        ValueError, match=r"half: expected prompts in half 1, got none of \d+ records; give more prompts"
    ):
        half_of(found, 1)
