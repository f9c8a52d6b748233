"""The hinge of SLiC in closed form, by hand."""

from __future__ import annotations

import pytest
import torch

from clha_fast import HingeOptions, RankingInputs, ranking_loss

INPUTS = RankingInputs(torch.tensor([2, 1, 1]), torch.tensor([3]))
LOGPS = torch.tensor([-1.0, -1.0, -4.0, -5.0], dtype=torch.float64)


def test_without_a_reference_sums_are_compared() -> None:
    """S = (-2, -4, -5), beta 0.5: leads 1, 1.5 and 0.5. The last falls short by 0.5; the first lies on the kink."""
    logps = LOGPS.clone().requires_grad_()
    loss, metrics = ranking_loss(logps, INPUTS, HingeOptions(beta=0.5, reference_free=True))
    assert float(loss.detach()) == pytest.approx(0.5 / 3, rel=1e-12)
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([0, 0, -0.5 / 3, 0.5 / 3], rel=1e-12)
    assert metrics.as_dict()["active_pair_share"] == pytest.approx(1 / 3)
    assert metrics.as_dict()["implicit_rewards/margins"] == pytest.approx(1)


def test_with_a_reference_log_ratios_are() -> None:
    """S - S^ref = (0, 1, -3): leads -0.5, 1.5 and 2 at beta 0.5, of which the first loses 1.5."""
    inputs = INPUTS._replace(reference_logps=torch.tensor([-2.0, -5.0, -2.0]))
    loss, _ = ranking_loss(LOGPS, inputs, HingeOptions(beta=0.5))
    assert float(loss) == pytest.approx(1.5 / 3, rel=1e-12)


def test_a_reference_is_needed_or_refused_never_ignored() -> None:
    with pytest.raises(ValueError, match="reference_logps: expected values, which the objective 'hinge' needs"):
        ranking_loss(LOGPS, INPUTS, HingeOptions())
    inputs = INPUTS._replace(reference_logps=torch.zeros(3))
    with pytest.raises(ValueError, match="reference_logps: expected None, for the objective 'hinge' does not read it"):
        ranking_loss(LOGPS, inputs, HingeOptions(reference_free=True))
    with pytest.raises(ValueError, match="reference_free: expected True or False, got 1"):
        HingeOptions(reference_free=1)
    with pytest.raises(ValueError, match="beta: expected a positive finite number, got -1"):
        HingeOptions(beta=-1)
