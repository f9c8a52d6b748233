"""RRHF in closed form, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import RankingInputs, RRHFOptions, ranking_loss
from clha_fast.layout import Layout


def test_rewards_rank_whatever_the_order() -> None:
    """s = (-1, -2, -3), r = (0, 2, 1): the first lies above both better ones, by 1 and by 2; SFT raises the second."""
    inputs = RankingInputs(torch.tensor([1, 2, 1]), torch.tensor([3]), torch.tensor([0.0, 2.0, 1.0]))
    logps = torch.tensor([-1.0, -1.5, -2.5, -3.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = ranking_loss(logps, inputs, RRHFOptions(weight=0.5))
    assert float(loss.detach()) == pytest.approx(0.5 * (1 + 2) + 2, rel=1e-12)
    # The first: both hinges; the second: one hinge and -1 of SFT, over two tokens; the last: one hinge.
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([1, -0.75, -0.75, -0.5], rel=1e-12)
    found = metrics.as_dict()
    assert (found["kept_pair_share"], found["active_pair_share"]) == (1, pytest.approx(2 / 3))
    assert found["sft_loss"] == pytest.approx(2)


@pytest.mark.parametrize(("penalty", "hinge"), [(0.0, 2.0), (0.5, 5 / math.sqrt(2) - 3.0), (1.0, 0.0), (2.0, 0.0)])
def test_the_length_penalty_divides_sums(penalty: float, hinge: float) -> None:
    """S = (-5, -3) of two tokens and one: p = -5 / 2^penalty and -3."""
    inputs = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]), torch.tensor([1.0, 0.0]))
    logps = torch.tensor([-2.0, -3.0, -3.0], dtype=torch.float64)
    loss, _ = ranking_loss(logps, inputs, RRHFOptions(length_penalty=penalty))
    assert float(loss) == pytest.approx(hinge + 2.5, rel=1e-12)
    loss, _ = ranking_loss(logps, inputs, RRHFOptions(length_penalty=penalty, sft="sum"))
    assert float(loss) == pytest.approx(hinge + 5, rel=1e-12)


def test_ties_are_no_pair_and_the_first_of_the_best_is_raised() -> None:
    """r = (1, 3, 3, 1): pairs between the halves alone; s = (-1, -2, -3, -4)."""
    inputs = RankingInputs(torch.ones(4, dtype=torch.long), torch.tensor([4]), torch.tensor([1.0, 3.0, 3.0, 1.0]))
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    loss, metrics = ranking_loss(logps, inputs, RRHFOptions())
    assert float(loss) == pytest.approx((1 + 2) + 2, rel=1e-12)
    assert metrics.as_dict()["kept_pair_share"] == pytest.approx(4 / 6)


def test_where_all_tie_only_the_first_runs() -> None:
    sizes = torch.tensor([3, 2, 1])
    rewards = torch.tensor([2.0, 2.0, 2.0, 0.0, 1.0, -5.0])
    inert = RRHFOptions().inert(Layout.whole(sizes), rewards, torch.tensor([1, 0, 0]))
    assert inert.tolist() == [False, True, True, False, False, False]
    # Told apart by float64 alone, in which nobody compares.
    close = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert RRHFOptions().inert(Layout.whole(sizes[:1]), close, None).tolist() == [False, True, True]
    inputs = RankingInputs(torch.tensor([1, 0, 0]), torch.tensor([3]), torch.full((3,), 2.0))
    loss, _ = ranking_loss(torch.tensor([-4.0], dtype=torch.float64), inputs, RRHFOptions())
    assert float(loss) == 4


def test_what_ties_may_be_anything() -> None:
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), torch.full((2,), 2.0))
    logps = torch.tensor([-4.0, math.nan], dtype=torch.float64, requires_grad=True)
    loss, _ = ranking_loss(logps, inputs, RRHFOptions())
    assert float(loss.detach()) == 4
    assert torch.autograd.grad(loss, logps)[0].tolist() == [-1, 0]


def test_settings_and_data_that_are_refused() -> None:
    for name in ("weight", "length_penalty"):
        with pytest.raises(ValueError, match=f"{name}: expected a"):
            RRHFOptions(**{name: -1.0})
    with pytest.raises(ValueError, match="sft: expected one of mean, sum, got 'token_mean'"):
        RRHFOptions(sft="token_mean")
    with pytest.raises(ValueError, match="rewards: expected values, which the objective 'rrhf' needs, got None"):
        ranking_loss(-torch.ones(2), RankingInputs(torch.tensor([1, 1]), torch.tensor([2])), RRHFOptions())
