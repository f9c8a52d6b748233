"""What losses of preferences share: absent candidates, references a token or a candidate, prompts of one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clha_fast import (
    CPOOptions,
    DPOOptions,
    HingeOptions,
    IPOOptions,
    Objective,
    ORPOOptions,
    RankingInputs,
    RRHFOptions,
    SimPOOptions,
    ranking_loss,
    reference,
)
from clha_fast.layout import Layout
from clha_fast.objectives import Group, Terms
from clha_fast.options import HeadOptions

WITH_REFERENCE = [DPOOptions(), DPOOptions(form="pairs"), IPOOptions(), HingeOptions()]
PREFERENCES = [*WITH_REFERENCE, SimPOOptions(), HingeOptions(reference_free=True), ORPOOptions(), CPOOptions()]


def ids(objective: Objective) -> str:
    return objective.name


def evaluate(objective: Objective, logps: Tensor, given: RankingInputs, **settings: Tensor) -> tuple[float, Tensor]:
    leaf = logps.clone().requires_grad_()
    loss, _ = ranking_loss(leaf, given, objective, **settings)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


LENGTHS, SIZES = torch.tensor([2, 3, 1, 4, 2]), torch.tensor([3, 2])
LOGPS = -torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.1
REFERENCE = -torch.rand(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.1


def sums(values: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in values.split(LENGTHS.tolist())])


@pytest.mark.parametrize("objective", WITH_REFERENCE, ids=ids)
def test_a_reference_is_given_a_token_or_a_candidate(objective: Objective) -> None:
    given = RankingInputs(LENGTHS, SIZES, reference_logps=REFERENCE)
    loss, slope = evaluate(objective, LOGPS, given)
    other, other_slope = evaluate(objective, LOGPS, given._replace(reference_logps=sums(REFERENCE)))
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(other_slope, slope, rtol=1e-12, atol=1e-15)
    a_candidate, targets = given._replace(reference_logps=sums(REFERENCE)), torch.zeros(12, dtype=torch.long)
    wanted, _, _ = reference.loss(LOGPS, targets, a_candidate, HeadOptions(), objective)
    assert loss == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("objective", WITH_REFERENCE, ids=ids)
def test_where_tokens_are_as_many_as_candidates_a_reference_is_one_a_token(objective: Objective) -> None:
    """Three candidates of 0, 2 and 1 tokens: as [C], the second would have -9 and not -1 - 9."""
    lengths, logps = torch.tensor([0, 2, 1]), torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    given = RankingInputs(lengths, torch.tensor([3]), reference_logps=torch.tensor([-1.0, -9.0, -4.0]))
    two = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]), reference_logps=torch.tensor([-10.0, -4.0]))
    assert evaluate(objective, logps, given)[0] == pytest.approx(evaluate(objective, logps, two)[0], rel=1e-12)


@pytest.mark.parametrize("a_token", [True, False])
@pytest.mark.parametrize("objective", WITH_REFERENCE, ids=ids)
def test_references_of_what_does_not_count_may_be_anything(objective: Objective, a_token: bool) -> None:
    """NaN for an ignored token, and for a candidate that did not run."""
    scored = torch.ones(12, dtype=torch.bool)
    scored[3] = False
    lengths = torch.tensor([2, 3, 1, 0, 4, 2])  # a fourth candidate of the first prompt, which did not run
    sizes = torch.tensor([4, 2])
    known = torch.where(scored, REFERENCE, torch.nan)
    if not a_token:
        known = sums(torch.where(scored, REFERENCE, 0.0))
        known = torch.cat([known[:3], known.new_tensor([torch.nan]), known[3:]])
    loss, slope = evaluate(objective, LOGPS, RankingInputs(lengths, sizes, reference_logps=known), scored=scored)
    plain = RankingInputs(LENGTHS, SIZES, reference_logps=torch.where(scored, REFERENCE, 0.0))
    wanted, wanted_slope = evaluate(objective, LOGPS, plain, scored=scored)
    assert loss == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", [*PREFERENCES, RRHFOptions()], ids=ids)
def test_absent_candidates_have_no_effect(objective: Objective) -> None:
    """First, in the middle and last of a prompt, with the highest reward, and a target that is another one's."""
    rewards = torch.tensor([3.0, 5.0, 1.0, 2.0, 4.0])
    known = REFERENCE if "reference_logps" in objective.needs else None
    given = RankingInputs(LENGTHS, SIZES, rewards, torch.tensor([1, 0]), reference_logps=known)
    places = torch.tensor([1, 2, 4, 6, 7])
    lengths, more = torch.zeros(9, dtype=torch.long), torch.full((9,), 9.0)
    lengths[places], more[places] = LENGTHS, rewards
    padded = RankingInputs(lengths, torch.tensor([6, 3]), more, torch.tensor([2, 0]), reference_logps=known)
    (loss, slope), (other, other_slope) = evaluate(objective, LOGPS, given), evaluate(objective, LOGPS, padded)
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(other_slope, slope, rtol=1e-12, atol=1e-15)
    assert slope.any()


@pytest.mark.parametrize("objective", PREFERENCES, ids=ids)
def test_prompts_of_one_have_no_pair(objective: Objective) -> None:
    """They count among the prompts of the mean, add their SFT term where there is one, and are inert where not."""
    known = torch.zeros(3) if "reference_logps" in objective.needs else None
    given = RankingInputs(torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([5.0, 2.0]), reference_logps=known)
    loss, slope = evaluate(objective, torch.tensor([-1.0, -3.0, -4.0], dtype=torch.float64), given)
    has_sft = objective.name in ("orpo", "cpo")
    assert loss == pytest.approx({"orpo": (2 + 4) / 2, "cpo": 8 / 3}.get(objective.name, 0))
    assert bool(slope.any()) == has_sft
    inert = objective.inert(Layout.whole(given.candidates_per_prompt), given.rewards, None)
    assert inert.tolist() == [not has_sft] * 2
    assert objective.silence_hint(several=False) == "give prompts that have several responses"


def test_own_metrics_are_means_over_what_they_say() -> None:
    """Two prompts and one pair: the pair's lead is not halved, and where there is no pair there is no mean."""
    logps = torch.tensor([-1.0, -2.0, -5.0], dtype=torch.float64)
    _, metrics = ranking_loss(logps, RankingInputs(torch.tensor([1, 1, 1]), torch.tensor([2, 1])), SimPOOptions())
    assert metrics.as_dict()["implicit_rewards/margins"] == pytest.approx(2)
    assert metrics.as_dict()["implicit_rewards/accuracies"] == 1
    assert float(metrics.sum_of("implicit_rewards/margins")) == pytest.approx(2)
    merged = type(metrics).merge([metrics, metrics])
    assert merged.as_dict()["implicit_rewards/margins"] == pytest.approx(2)
    _, metrics = ranking_loss(logps[:1], RankingInputs(torch.tensor([1]), torch.tensor([1])), SimPOOptions())
    assert math.isnan(metrics.as_dict()["implicit_rewards/margins"])


def test_a_divisor_that_is_no_sum_is_refused() -> None:
    class Own(Objective):
        name = "own"
        metric_names = {"lead": "pairs"}  # noqa: RUF012 - as anybody might write it

        def terms(self, group: Group) -> Terms:
            return Terms(-group.sums.sum() / group.totals.prompts, group.logps.new_zeros(()))

        def report(self, group: Group) -> dict[str, Tensor]:
            return {"lead": group.sums.sum()}

    with pytest.raises(ValueError, match="metric_names: expected divisors of METRIC_NAMES, got pairs"):
        ranking_loss(LOGPS, RankingInputs(LENGTHS, SIZES), Own())


@pytest.mark.parametrize("objective", PREFERENCES, ids=ids)
def test_equal_implicit_rewards_are_half_right(objective: Objective) -> None:
    """Three alike: three pairs, each half; eager code says the same."""
    needs = "reference_logps" in objective.needs
    given = RankingInputs(torch.tensor([1, 1, 1]), torch.tensor([3]), reference_logps=torch.zeros(3) if needs else None)
    logps, targets = torch.full((3,), -1.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    _, metrics = ranking_loss(logps, given, objective)
    assert metrics.as_dict()["implicit_rewards/accuracies"] == 0.5
    _, values, _ = reference.loss(logps, targets, given, HeadOptions(), objective)
    torch.testing.assert_close(values, metrics.values)
    assert float(values[-1]) == 1.5
