"""SimPO in closed form, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import RankingInputs, SimPOOptions, ranking_loss


def test_the_better_mean_log_probability_leads_by_gamma() -> None:
    """s = (-2, -3): -log sigmoid(2 * 1 - 0.5), slopes -+2 sigmoid(-1.5) / |y| a token."""
    logps = torch.tensor([-1.0, -3.0, -3.0], dtype=torch.float64, requires_grad=True)
    inputs = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]))
    loss, _ = ranking_loss(logps, inputs, SimPOOptions(beta=2.0, gamma=0.5))
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-12)
    push = 2 / (1 + math.exp(1.5))
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([-push / 2, -push / 2, push], rel=1e-12)


def test_four_candidates_are_six_pairs_alike() -> None:
    """s = (0, -1, -2, -3): three leads of 1, two of 2, one of 3; gamma is the same at every distance."""
    logps = torch.tensor([0.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    inputs = RankingInputs(torch.ones(4, dtype=torch.long), torch.tensor([4]))
    loss, _ = ranking_loss(logps, inputs, SimPOOptions(beta=1.0, gamma=0.0))
    wanted = sum(count * math.log1p(math.exp(-lead)) for lead, count in ((1, 3), (2, 2), (3, 1))) / 6
    assert float(loss) == pytest.approx(wanted, rel=1e-12)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="beta: expected a positive finite number, got 0"):
        SimPOOptions(beta=0)
    with pytest.raises(ValueError, match=r"gamma: expected a finite number that is not negative, got -0\.5"):
        SimPOOptions(gamma=-0.5)
    given = RankingInputs(torch.tensor([1]), torch.tensor([1]), reference_logps=torch.zeros(1))
    with pytest.raises(ValueError, match="reference_logps: expected None, for the objective 'simpo' does not read it"):
        ranking_loss(-torch.ones(1), given, SimPOOptions())
