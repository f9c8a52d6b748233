"""Chain of Hindsight in closed form, by hand; settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clha_fast import CoHOptions, RankingInputs, ranking_loss


def test_every_token_of_every_chain_counts_alike():
    """Chains of 1, 2, 1 tokens and one of 2: (1 + 2 + 3 + 4 + 5 + 6) / 6, and the slope of each is -1/6."""
    given = RankingInputs(torch.tensor([1, 2, 1, 2]), torch.tensor([3, 1]), torch.tensor([5.0, 1.0, 0.0, 2.0]))
    logps = -torch.arange(1, 7, dtype=torch.float64)
    leaf = logps.clone().requires_grad_()
    loss, metrics = ranking_loss(leaf, given, CoHOptions())
    assert float(loss.detach()) == pytest.approx(21 / 6)
    (slope,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(slope, torch.full((6,), -1 / 6, dtype=torch.float64))
    found = metrics.as_dict()
    # The first chains have -1 and (-5 - 6) / 2.
    assert found["good_nll"] == pytest.approx((1 + 5.5) / 2)
    assert found["num_tokens"] == 6
    assert found["kept_pair_share"] == found["open_gate_share"] == 0
    assert math.isnan(found["kendall_tau"])
    assert math.isnan(found["rewards/accuracies"])


def test_the_step_s_tokens_divide():
    given = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), token_count=torch.tensor(8.0))
    loss, _ = ranking_loss(torch.tensor([-3.0, -1.0], dtype=torch.float64), given, CoHOptions())
    assert float(loss) == pytest.approx(4 / 8)


def test_it_has_markers_and_the_others_have_none():
    assert CoHOptions(good_marker="Gut:", bad_marker="Schlecht:").markers == ("Gut:", "Schlecht:")
    assert not CoHOptions().ranks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"good_marker": "Good: "}, "good_marker: expected a text that does not end with a blank"),
        ({"bad_marker": "Bad:\n"}, "bad_marker: expected a text that does not end with a blank"),
        ({"good_marker": ""}, "good_marker: expected a text"),
        ({"good_marker": 3}, "good_marker: expected a text"),
        ({"good_marker": "A:", "bad_marker": " A:"}, "bad_marker: expected another text than good_marker, got ' A:'"),
    ],
)
def test_markers_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        CoHOptions(**settings)
