"""What `benchmarks.kept_blocks` counts, in closed form."""

import pytest
import torch

from benchmarks.kept_blocks import DROPPED, Counts
from clha_fast.options import ROUTE_WORDS


@pytest.mark.parametrize("cut", [0, 1])
def test_blocks_and_tokens_that_are_nearly_dense(cut: int) -> None:
    """A token with all its mass on its target beside one with a flat softmax; with a last block that is not whole."""
    vocabulary = 4 * ROUTE_WORDS - cut
    peaked = torch.zeros(vocabulary)
    peaked[ROUTE_WORDS] = 1.0
    flat = torch.full((vocabulary,), 1 / vocabulary)
    counts = Counts(vocabulary)
    for row in (peaked, flat):  # prompt after prompt
        counts.add(row.unsqueeze(0), torch.tensor([ROUTE_WORDS]))
    for found, dropped in zip(counts.figures(), DROPPED, strict=True):
        expected = {
            "max_dropped_mass": dropped,
            "kept_share": 5 / 8,
            "dense_blocks": 1 / 4,
            "pairs_of_dense_blocks": 2 / 5,
            "dense_tokens": 1 / 2,
            "pairs_of_dense_tokens": 4 / 5,
        }
        assert found == pytest.approx(expected)
