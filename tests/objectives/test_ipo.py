"""IPO in closed form, by hand."""

from __future__ import annotations

import pytest
import torch

from clha_fast import IPOOptions, RankingInputs, ranking_loss


def test_log_ratios_a_token_are_held_to_a_lead() -> None:
    """S = (-4, -3), S^ref = (-6, -2): x = (2/2, -1/1), a lead of 2; 1 / (2 * 0.25) = 2 is what is asked: no loss."""
    inputs = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]), reference_logps=torch.tensor([-3.0, -3.0, -2.0]))
    logps = torch.tensor([-1.0, -3.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = ranking_loss(logps, inputs, IPOOptions(beta=0.25))
    assert float(loss.detach()) == 0
    assert metrics.as_dict()["implicit_rewards/margins"] == pytest.approx(2)
    # beta 0.1 asks for 5: (2 - 5)^2, slopes 2 (2 - 5) / |y| a token.
    loss, _ = ranking_loss(logps, inputs, IPOOptions(beta=0.1))
    assert float(loss.detach()) == pytest.approx(9, rel=1e-12)
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([-3, -3, 6], rel=1e-12)


def test_a_lead_that_is_too_large_costs_too() -> None:
    """x = (9, 0, 0): leads 9, 9 and 0 where 5 is asked: (16 + 16 + 25) / 3."""
    inputs = RankingInputs(torch.ones(3, dtype=torch.long), torch.tensor([3]), reference_logps=torch.full((3,), -10.0))
    logps = torch.tensor([-1.0, -10.0, -10.0], dtype=torch.float64, requires_grad=True)
    loss, _ = ranking_loss(logps, inputs, IPOOptions())
    assert float(loss.detach()) == pytest.approx(57 / 3, rel=1e-12)
    # d = 2 (4 + 4) / 3 for the first, 2 (-4 - 5) / 3 for the second, 2 (-4 + 5) / 3 for the last
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([16 / 3, -18 / 3, 2 / 3], rel=1e-12)


def test_a_beta_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="beta: expected a positive finite number, got 0"):
        IPOOptions(beta=0.0)
