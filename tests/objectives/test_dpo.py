"""DPO in closed form, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import DPOOptions, RankingInputs, ranking_loss

FORMS = pytest.mark.parametrize("form", ["plackett_luce", "pairs"])


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


@FORMS
def test_dpo_of_two_candidates_is_a_logistic_loss(form: str) -> None:
    """S = (-3, -4) and S^ref = (-5, -2): x = 0.5 (2, -2), so -log sigmoid(2); slopes -+0.5 sigmoid(-2) a token."""
    inputs = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]), reference_logps=torch.tensor([-4.0, -1.0, -2.0]))
    logps = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = ranking_loss(logps, inputs, DPOOptions(beta=0.5, form=form))
    assert float(loss.detach()) == pytest.approx(log1pexp(-2), rel=1e-12)
    push = 0.5 / (1 + math.exp(2))
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([-push, -push, push], rel=1e-12)
    found = metrics.as_dict()
    assert found["implicit_rewards/margins"] == pytest.approx(2)
    assert found["implicit_rewards/accuracies"] == 1
    assert found["rewards/accuracies"] == 1  # s = (-1.5, -4): what has no reference may say otherwise
    assert (found["sft_loss"], found["open_gate_share"]) == (0, 0)


def test_three_candidates_in_both_forms() -> None:
    """x = (0, 1, 3) out of order. Plackett-Luce: log(1 + e + e^3) - 0 + log(e + e^3) - 1."""
    inputs = RankingInputs(torch.tensor([1, 1, 1]), torch.tensor([3]), reference_logps=torch.tensor([-1.0, -2.0, -4.0]))
    logps = torch.full((3,), -1.0, dtype=torch.float64)
    loss, metrics = ranking_loss(logps, inputs, DPOOptions(beta=1.0))
    assert float(loss) == pytest.approx(math.log(1 + math.e + math.exp(3)) + math.log(math.e + math.exp(3)) - 1)
    loss, _ = ranking_loss(logps, inputs, DPOOptions(beta=1.0, form="pairs"))
    assert float(loss) == pytest.approx((log1pexp(1) + log1pexp(3) + log1pexp(2)) / 3)
    assert metrics.as_dict()["implicit_rewards/margins"] == pytest.approx(-2)
    assert metrics.as_dict()["implicit_rewards/accuracies"] == 0


@FORMS
def test_a_model_that_is_its_own_reference_knows_nothing(form: str) -> None:
    """All x are equal: log of n! orders, or log 2 a pair; means over prompts, of which one has a single response."""
    logps = -torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = RankingInputs(torch.tensor([2, 1, 3, 2]), torch.tensor([3, 1]), reference_logps=logps)
    loss, metrics = ranking_loss(logps, inputs, DPOOptions(form=form))
    assert float(loss) == pytest.approx(math.log(6 if form == "plackett_luce" else 2) / 2, rel=1e-12)
    assert metrics.as_dict()["implicit_rewards/accuracies"] == 0.5, "neither right nor wrong"


@FORMS
def test_extreme_log_ratios_do_not_overflow(form: str) -> None:
    """x = (-1e4, 1e4): the loss is linear there, 2e4, and its slope is all of beta."""
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), reference_logps=torch.tensor([-1.0, -2e4]))
    logps = torch.tensor([-1e4 - 1.0, -1e4], requires_grad=True)
    loss, _ = ranking_loss(logps, inputs, DPOOptions(beta=1.0, form=form))
    assert float(loss.detach()) == pytest.approx(2e4)
    assert torch.autograd.grad(loss, logps)[0].tolist() == [-1, 1]


def test_settings_and_data_that_are_refused() -> None:
    for beta in (0.0, -1, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match="beta: expected a positive finite number, got"):
            DPOOptions(beta=beta)
    with pytest.raises(ValueError, match="form: expected one of plackett_luce, pairs, got 'sigmoid'"):
        DPOOptions(form="sigmoid")
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]))
    with pytest.raises(ValueError, match="reference_logps: expected values, which the objective 'dpo' needs, got None"):
        ranking_loss(-torch.ones(2), inputs, DPOOptions())
    with pytest.raises(ValueError, match=r"reference_logps: expected floating \[N = 2\] or \[C = 2\], got \[3\]"):
        ranking_loss(-torch.ones(2), inputs._replace(reference_logps=torch.zeros(3)), DPOOptions())
