"""ORPO in closed form, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import ORPOOptions, RankingInputs, ranking_loss

TWO = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]))


def test_the_odds_of_two_candidates() -> None:
    """exp s = (1/2, 1/3): odds 1 and 1/2, so -log sigmoid(log 2) = log(3/2), and NLL log 2.

    do/ds = 1 / (1 - exp s) = 2 and 3/2; sigmoid(-log 2) = 1/3.
    """
    half, third = math.log(1 / 2), math.log(1 / 3)
    logps = torch.tensor([2 * half, 0.0, third], dtype=torch.float64, requires_grad=True)
    loss, metrics = ranking_loss(logps, TWO, ORPOOptions(beta=0.3))
    assert float(loss.detach()) == pytest.approx(math.log(2) + 0.3 * math.log(3 / 2), rel=1e-12)
    first = -0.5 - 0.3 * (1 / 3) * 2 / 2
    wanted = [first, first, 0.3 * (1 / 3) * 1.5]
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx(wanted, rel=1e-12)
    assert metrics.as_dict()["implicit_rewards/margins"] == pytest.approx(math.log(2))


def test_its_likelihood_means_over_prompts_or_over_tokens() -> None:
    """Targets with S = -4 of two tokens, and -1 of one."""
    inputs = RankingInputs(torch.tensor([2, 1, 1]), torch.tensor([2, 1]))
    logps = torch.tensor([-1.0, -3.0, -2.0, -1.0], dtype=torch.float64)
    pair = 0.1 * math.log(2) / 2  # s = (-2, -2)
    for sft, nll in (("prompt_mean", 3 / 2), ("token_mean", 5 / 3)):
        assert float(ranking_loss(logps, inputs, ORPOOptions(sft=sft))[0]) == pytest.approx(nll + pair, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [(0.0, 0.0, -1.0), (0.0, 0.0, 0.0), (-1e-9, 0.0, -1e-12), (-1.0, -1.0, 0.0)])
def test_a_response_that_is_certain_has_finite_odds(values: tuple[float, ...], dtype: torch.dtype) -> None:
    """s = 0 is infinite odds, and two of them inf - inf; 1 - exp s counts as 2^-23 at least."""
    logps = torch.tensor(values, dtype=dtype, requires_grad=True)
    loss, _ = ranking_loss(logps, TWO, ORPOOptions())
    (slope,) = torch.autograd.grad(loss, logps)
    assert loss.isfinite()
    assert slope.isfinite().all()
    assert slope[0] < 0 < slope[2]


def test_two_certain_responses_are_equal() -> None:
    loss, _ = ranking_loss(torch.zeros(3, dtype=torch.float64), TWO, ORPOOptions())
    assert float(loss) == pytest.approx(0.1 * math.log(2), rel=1e-12)
    far = torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64)  # odds e^-1 / (1 - e^-1) and 2^23
    loss, _ = ranking_loss(far, TWO, ORPOOptions())
    lead = -1 - math.log1p(-math.exp(-1)) - 23 * math.log(2)
    assert float(loss) == pytest.approx(1 + 0.1 * (math.log1p(math.exp(lead)) - lead), rel=1e-12)


def test_a_score_near_zero_is_exact() -> None:
    """s = -1e-6 is well above the epsilon: 1 - exp s without cancellation."""
    logps = torch.tensor([-1e-6, -1e-6, -1.0], dtype=torch.float64)
    odds = -1e-6 - math.log(-math.expm1(-1e-6)) - (-1 - math.log1p(-math.exp(-1)))
    assert float(ranking_loss(logps, TWO, ORPOOptions(beta=1.0))[0]) == pytest.approx(
        1e-6 + math.log1p(math.exp(-odds)), rel=1e-9
    )


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="beta: expected a positive finite number, got 0"):
        ORPOOptions(beta=0)
    with pytest.raises(ValueError, match="sft: expected one of prompt_mean, token_mean, got 'mean'"):
        ORPOOptions(sft="mean")
