"""CPO in closed form, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import CPOOptions, RankingInputs, ranking_loss

# S = (-4, -6) and (-1, -1); targets of two tokens and of one.
INPUTS = RankingInputs(torch.tensor([2, 1, 1, 1]), torch.tensor([2, 2]))
LOGPS = torch.tensor([-1.0, -3.0, -6.0, -1.0, -1.0], dtype=torch.float64)
PAIRS = (math.log1p(math.exp(-1)) + math.log(2)) / 2  # beta 0.5: leads 1 and 0


@pytest.mark.parametrize(
    ("alpha", "sft", "nll"), [(1.0, "token_mean", 5 / 3), (0.5, "prompt_mean", 0.5 * 3 / 2), (0.0, "token_mean", 0.0)]
)
def test_pairs_and_the_likelihood_of_targets(alpha: float, sft: str, nll: float) -> None:
    loss, metrics = ranking_loss(LOGPS, INPUTS, CPOOptions(beta=0.5, alpha=alpha, sft=sft))
    assert float(loss) == pytest.approx(PAIRS + nll, rel=1e-12)
    found = metrics.as_dict()
    assert (found["rank_loss"], found["sft_loss"]) == pytest.approx((PAIRS, nll))
    assert found["open_gate_share"] == (alpha > 0)


def test_the_target_may_be_another_one() -> None:
    loss, _ = ranking_loss(LOGPS, INPUTS._replace(sft_index=torch.tensor([1, 0])), CPOOptions(beta=0.5))
    assert float(loss) == pytest.approx(PAIRS + 7 / 2, rel=1e-12)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="alpha: expected a finite number that is not negative, got -1"):
        CPOOptions(alpha=-1)
    with pytest.raises(ValueError, match="sft: expected one of prompt_mean, token_mean, got 'sum'"):
        CPOOptions(sft="sum")
    with pytest.raises(ValueError, match="beta: expected a positive finite number, got 0"):
        CPOOptions(beta=0)
