"""PRO in closed form, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import PROOptions, RankingInputs, ranking_loss


def test_pro_of_two_candidates_is_a_logistic_loss():
    """Paper: L_1 = log(1 + exp(s_2 - s_1)). Here s = (-1, -2): log(1 + e^-1); SFT 0.05 * 1 * 1."""
    given = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]))
    loss, metrics = ranking_loss(torch.tensor([-1.0, -2.0], dtype=torch.float64), given, PROOptions(form="paper"))
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)) + 0.05)
    assert metrics.as_dict()["best_first"] == 1
    loss, metrics = ranking_loss(torch.tensor([-2.0, -1.0], dtype=torch.float64), given, PROOptions(form="paper"))
    assert float(loss) == pytest.approx(math.log1p(math.exp(1)) + 0.1)
    assert metrics.as_dict()["best_first"] == 0


def test_published_pro_by_hand():
    """s = (-1, -2, -4), r = (3, 1, 0).

    k = 1: T = (2, 3), T_1 = 3: log(1e-10 + e^-3 + e^-4 + e^-12) + 3. k = 2: T = 1: log(1e-10 + e^-2 + e^-4) + 2.
    """
    inputs = RankingInputs(torch.tensor([1, 1, 1]), torch.tensor([3]), torch.tensor([3.0, 1.0, 0.0]))
    loss, _ = ranking_loss(torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64), inputs, PROOptions(sft_weight=0.0))
    first = math.log(1e-10 + math.exp(-3) + math.exp(-4) + math.exp(-12)) + 3
    second = math.log(1e-10 + math.exp(-2) + math.exp(-4)) + 2
    assert float(loss) == pytest.approx(first + second, rel=1e-12)


def test_the_epsilon_of_published_pro_rules_where_scores_are_far_below_zero():
    """s = (-30, -40), r = (2, 0): beside 1e-10 stand e^-60 and e^-80; log(1e-10) + 60 is left, and no slope of s_2."""
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), torch.tensor([2.0, 0.0]))
    logps = torch.tensor([-30.0, -40.0], dtype=torch.float64, requires_grad=True)
    loss, _ = ranking_loss(logps, inputs, PROOptions(sft_weight=0.0))
    assert float(loss.detach()) == pytest.approx(math.log(1e-10) + 60, rel=1e-12)
    (slope,) = torch.autograd.grad(loss, logps)
    assert slope.tolist() == pytest.approx([-2.0, 0.0], abs=1e-12)


def test_published_pro_does_not_overflow_for_rewards_out_of_order():
    """T = r_1 - r_2 = -200 turns s into exp(+2000): inf as an exponential, 0 as a difference of logarithms."""
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), torch.tensor([0.0, 200.0]))
    logps = torch.tensor([-10.0, -10.0], requires_grad=True)
    loss, _ = ranking_loss(logps, inputs, PROOptions(sft_weight=0.0))
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-4)
    (slope,) = torch.autograd.grad(loss, logps)
    assert slope.isfinite().all()


@pytest.mark.parametrize("form", ["paper", "published"])
def test_a_last_candidate_at_minus_infinity_adds_nothing(form: str) -> None:
    """s = (-1, -2, -inf), r = (9, 5, 1): its exponentials are 0; nobody is ranked below it."""
    inputs = RankingInputs(torch.tensor([1, 1, 1]), torch.tensor([3]), torch.tensor([9.0, 5.0, 1.0]))
    logps = torch.tensor([-1.0, -2.0, -math.inf], dtype=torch.float64, requires_grad=True)
    loss, _ = ranking_loss(logps, inputs, PROOptions(form=form, sft_weight=0.0))
    if form == "paper":
        wanted = math.log1p(math.exp(-1))
    else:
        wanted = math.log(1e-10 + math.exp(-8) + math.exp(-8)) + 8 + math.log(1e-10 + math.exp(-8)) + 8
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-9)
    (slope,) = torch.autograd.grad(loss, logps)
    assert slope.isfinite().all()
    assert slope[2] == 0


def test_the_best_comes_first_whether_or_not_a_prompt_of_one_has_run() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    both = RankingInputs(torch.tensor([1, 1, 1]), torch.tensor([2, 1]))
    dropped = both._replace(candidate_lengths=torch.tensor([1, 1, 0]))
    for given, values in ((both, logps), (dropped, logps[:2])):
        _, metrics = ranking_loss(values, given, PROOptions(form="paper"))
        assert metrics.as_dict()["best_first"] == 1
