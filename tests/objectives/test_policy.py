"""Clipped policy gradients in closed form, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import HeadOptions, PolicyOptions, RankingInputs, linear_loss, ranking_loss, reference
from clha_fast.layout import Layout
from tests.support.helpers import make_case

GRPO = PolicyOptions(reduction="sequence_mean")
PPO = PolicyOptions(advantages="given")


def evaluate(
    objective: PolicyOptions, logps: Any, given: RankingInputs, **settings: Tensor
) -> tuple[float, list[float]]:
    leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    loss, _ = ranking_loss(leaf, given, objective, **settings)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0].tolist()


def candidates(*lengths: int, **fields: Any) -> RankingInputs:
    """One prompt."""
    tensors = {name: torch.tensor(value) for name, value in fields.items()}
    return RankingInputs(torch.tensor(lengths), torch.tensor([len(lengths)]), **tensors)


def test_on_policy_a_token_has_the_slope_of_its_advantage() -> None:
    """rho = 1. A = (2, -1) of two tokens and one: token_mean -(2 + 2 - 1) / 3; sequence_mean -(2 - 1) / 2."""
    given, logps = candidates(2, 1, advantages=[2.0, -1.0]), [-1.0, -7.0, -0.1]
    loss, slope = evaluate(PPO, logps, given)
    assert loss == pytest.approx(-1, rel=1e-12)
    assert slope == pytest.approx([-2 / 3, -2 / 3, 1 / 3], rel=1e-12)
    loss, slope = evaluate(PPO.replace(reduction="sequence_mean"), logps, given)
    assert loss == pytest.approx(-0.5, rel=1e-12)
    assert slope == pytest.approx([-0.5, -0.5, 0.5], rel=1e-12)


def test_the_clip_binds_where_it_pays_alone() -> None:
    """rho = (1.5, 1.5, 0.5, 0.5, 1.1), A = (1, -1, 1, -1, 1), the clip to 0.8 and 1.28."""
    rho, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 1.0]
    logps = [-1.0, -2.0, -3.0, -4.0, -5.0]
    old = [logp - math.log(r) for logp, r in zip(logps, rho, strict=True)]
    given = candidates(5, advantages=advantages)._replace(old_logps=torch.tensor(old, dtype=torch.float64))
    objective = PPO.replace(clip_high=0.28)
    loss, slope = evaluate(objective, logps, given)
    assert loss == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8 + 1.1) / 5, rel=1e-12)
    assert slope == pytest.approx([0, 1.5 / 5, -0.5 / 5, 0, -1.1 / 5], rel=1e-12, abs=1e-15)
    _, metrics = ranking_loss(torch.tensor(logps, dtype=torch.float64), given, objective)
    found = metrics.as_dict()
    assert found["clip_share"] == pytest.approx(2 / 5)
    assert found["ratio"] == pytest.approx(sum(rho) / 5)
    assert found["old_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in rho) / 5, rel=1e-5)
    assert "reference_kl" not in found


@pytest.mark.parametrize("log_ratio", [0.125, 0.25, 0.5, -0.125, -0.25, -0.5])
@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_at_the_border_of_the_clip_nothing_is_clipped_yet(log_ratio: float, advantage: float) -> None:
    """rho is 1 + clip_high or 1 - clip_low to the last bit: slope -rho A, of the reference too."""
    rho = float(torch.tensor(log_ratio, dtype=torch.float64).exp())
    clip = {"clip_high": rho - 1} if rho > 1 else {"clip_low": 1 - rho}
    objective, head = PPO.replace(**clip), HeadOptions()
    given = candidates(1, advantages=[advantage])._replace(old_logps=torch.tensor([-1.5], dtype=torch.float64))
    loss, slope = evaluate(objective, [-1.5 + log_ratio], given)
    leaf = torch.tensor([-1.5 + log_ratio], dtype=torch.float64, requires_grad=True)
    found, *_ = reference.policy_loss(leaf, torch.tensor([0]), given, head, objective)
    for value, slopes in ((loss, slope), (float(found.detach()), torch.autograd.grad(found, leaf)[0].tolist())):
        assert value == pytest.approx(-rho * advantage, rel=1e-15)
        assert slopes == pytest.approx([-rho * advantage], rel=1e-15)


def test_advantages_of_a_group_are_standard_scores_of_its_rewards() -> None:
    """r = (3, 1, 2): mean 2, unbiased deviation 1, so A = (1, -1, 0) / 1.0001."""
    loss, slope = evaluate(GRPO, [-1.0, -2.0, -3.0, -4.0], candidates(2, 1, 1, rewards=[3.0, 1.0, 2.0]))
    assert loss == pytest.approx(0, abs=1e-15)
    assert slope == pytest.approx([-1 / 1.0001 / 6, -1 / 1.0001 / 6, 1 / 1.0001 / 3, 0], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e9, 1 / 3])
@pytest.mark.parametrize("objective", [PolicyOptions(), GRPO])
def test_equal_rewards_are_exactly_zero(objective: PolicyOptions, value: float) -> None:
    """Not their rounding over 1e-4; and a single response has nobody to be compared with."""
    for count in (1, 3, 7):
        given = candidates(*[1] * count)._replace(rewards=torch.full((count,), value, dtype=torch.float64))
        loss, slope = evaluate(objective, [-1.0] * count, given)
        assert loss == 0
        assert slope == [0.0] * count


def test_a_reward_counts_whether_or_not_its_response_is_here() -> None:
    """r = (3, 1, 2, 2) of which the last has no token: mean 2, deviation sqrt(2/3), and four candidates in the mean."""
    advantage = 1 / (math.sqrt(2 / 3) + 1e-4)
    loss, slope = evaluate(GRPO, [-1.0, -1.0, -1.0], candidates(1, 1, 1, 0, rewards=[3.0, 1.0, 2.0, 2.0]))
    assert loss == pytest.approx(0, abs=1e-15)
    assert slope == pytest.approx([-advantage / 4, advantage / 4, 0], rel=1e-12, abs=1e-15)
    _, slope = evaluate(PolicyOptions(), [-1.0, -1.0], candidates(1, 1, 0, 0, rewards=[3.0, 1.0, 2.0, 2.0]))
    assert slope == pytest.approx([-advantage / 2, advantage / 2], rel=1e-12)


def test_prompts_of_equal_rewards_are_inert_where_they_do_not_count_among_tokens() -> None:
    """Two prompts; the first teaches nothing, and GRPO's mean is over its two candidates all the same."""
    sizes, rewards = torch.tensor([2, 3]), torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])
    layout = Layout.whole(sizes)
    assert GRPO.inert(layout, rewards, None).tolist() == [True, True, False, False, False]
    others = (
        PolicyOptions(),
        PPO.replace(reduction="sequence_mean"),
        GRPO.replace(kl_weight=0.1),
    )
    for objective in others:
        assert not objective.inert(layout, rewards, None).any()
    whole = RankingInputs(torch.tensor([2, 1, 1, 1, 2]), sizes, rewards)
    dropped = whole._replace(candidate_lengths=torch.tensor([0, 0, 1, 1, 2]))
    logps = [-1.0, math.nan, -2.0, -3.0, -4.0, -5.0, -6.0]
    loss, slope = evaluate(GRPO, logps, whole)
    other, other_slope = evaluate(GRPO, logps[3:], dropped)
    assert other == pytest.approx(loss, abs=1e-15)
    assert slope == pytest.approx([0, 0, 0, *other_slope], rel=1e-12)
    counts = GRPO.counts(Layout.of(dropped.candidate_lengths, sizes, torch.ones(4, dtype=torch.bool)), dropped, 2)
    assert float(counts["candidate_count"]) == 5
    assert not GRPO.inert(layout, rewards.double() + torch.tensor([0.0, 1e-12, 0, 0, 0]).double(), None).any()


def test_the_divergence_from_a_reference() -> None:
    """d = (log 2, -log 2): exp d - d - 1 = 1 - log 2 and log 2 - 1/2, slopes 1 - exp d; also where A = 0."""
    logps = [-2.0, -1.0]
    known = torch.tensor([-2 + math.log(2), -1 - math.log(2)], dtype=torch.float64)
    given = candidates(2, advantages=[0.0, 0.0])._replace(reference_logps=known)
    objective = PPO.replace(kl_weight=0.5)
    loss, slope = evaluate(objective, logps, given)
    assert loss == pytest.approx(0.5 * 0.5 / 2, rel=1e-12)
    assert slope == pytest.approx([0.5 * (1 - 2) / 2, 0.5 * (1 - 1 / 2) / 2], rel=1e-12)
    _, metrics = ranking_loss(torch.tensor(logps, dtype=torch.float64), given, objective)
    assert metrics.as_dict()["reference_kl"] == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [-1.0, -5000.0, -math.inf])
@pytest.mark.parametrize("old", [-1.0, -5000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_ratios_stay_finite(logp: float, old: float, advantage: float, dtype: torch.dtype) -> None:
    """exp(4999) is infinite, and its slope times the 0 of a clip that binds would be NaN."""
    given = candidates(1, advantages=[advantage], old_logps=[old], reference_logps=[old])
    logps = torch.tensor([logp], dtype=dtype, requires_grad=True)
    loss, metrics = ranking_loss(logps, given, PPO.replace(kl_weight=0.1))
    assert loss.isfinite()
    found = metrics.as_dict()
    assert math.isfinite(found["ratio"])
    assert math.isfinite(found["reference_kl"])
    assert math.isfinite(found["old_kl"]) or logp == -math.inf  # rho - 1 - log 0
    assert torch.autograd.grad(loss, logps)[0].isfinite().all()


@pytest.mark.parametrize("name", ["old_logps", "reference_logps", "advantages"])
def test_signals_of_ignored_tokens_may_be_anything(name: str) -> None:
    scored = torch.tensor([True, False, True])
    values = {"old_logps": [-1.0, 0.0, -2.5], "reference_logps": [-2.0, 0.0, -2.0], "advantages": [1.0, 0.0, -1.0]}
    objective, logps = PPO.replace(kl_weight=0.1), [-1.5, -9.0, -2.0]
    given = candidates(2, 1, **values)
    loss, slope = evaluate(objective, logps, given, scored=scored)
    short = candidates(1, 1, **{key: [value[0], value[2]] for key, value in values.items()})
    assert loss == pytest.approx(evaluate(objective, [-1.5, -2.0], short)[0], rel=1e-12)
    bad = given._replace(**{name: torch.where(scored, getattr(given, name), math.nan)})
    assert evaluate(objective, logps, bad, scored=scored) == (loss, slope)
    assert slope[1] == 0


def test_an_advantage_that_is_no_number_reaches_the_loss() -> None:
    loss, _ = evaluate(PPO, [-1.0], candidates(1, advantages=[math.nan]))
    assert math.isnan(loss)


KL = PPO.replace(kl_weight=0.1)
READ = [(of, name) for of in (PPO, PPO.replace(reduction="sequence_mean"), KL) for name in ("logps", "old_logps")]


@pytest.mark.parametrize(("objective", "name"), [*READ, (KL, "reference_logps")])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_probability_that_is_no_number_reaches_loss_and_slope(
    objective: PolicyOptions, name: str, advantage: float
) -> None:
    """And the other token's slope stays what it is. The reference's too."""
    values = {"logps": [-1.0, -2.0], "old_logps": [-1.0, -2.0], "reference_logps": [-1.0, -2.0]}
    if not objective.kl_weight:
        del values["reference_logps"]
    values[name][0] = math.nan
    logps = values.pop("logps")
    given = candidates(1, 1, advantages=[advantage, 2.0], **values)
    loss, slope = evaluate(objective, logps, given)
    leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    found, *_ = reference.policy_loss(leaf, torch.tensor([0, 0]), given, HeadOptions(), objective)
    for value, slopes in ((loss, slope), (float(found.detach()), torch.autograd.grad(found, leaf)[0].tolist())):
        assert math.isnan(value)
        assert math.isnan(slopes[0])
        assert slopes[1] == pytest.approx(-1, rel=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("objective", [PolicyOptions(), GRPO.replace(entropy_weight=0.1)])
def test_broken_hidden_states_are_seen_in_every_gradient(objective: PolicyOptions, backend: Any) -> None:
    case = make_case([2, 3], [2], dtype=torch.float32, rewards=True)
    case.hidden[0] = math.nan
    leaves = case.leaves()
    loss, _ = linear_loss(*leaves, case.targets, case.ranking, objective, backend=backend)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.isnan().any()


def test_settings_and_data_that_are_refused() -> None:
    one = candidates(1, 1, rewards=[1.0, 0.0])
    logps = -torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"advantages: expected None .* advantages='given' takes them"):
        ranking_loss(logps, one._replace(advantages=torch.ones(2)), GRPO)
    with pytest.raises(ValueError, match="advantages: expected values, which the objective 'policy' needs, got None"):
        ranking_loss(logps, one, PPO)
    with pytest.raises(ValueError, match="rewards: expected values, which the objective 'policy' needs, got None"):
        ranking_loss(logps, one._replace(rewards=None), GRPO)
    with pytest.raises(ValueError, match="reference_logps: expected values, which the objective 'policy' needs"):
        ranking_loss(logps, one, GRPO.replace(kl_weight=0.1))
    for name in ("reference_logps", "token_weights"):
        with pytest.raises(ValueError, match=f"{name}: expected None, for the objective 'policy' does not read it"):
            ranking_loss(logps, one._replace(**{name: torch.zeros(2)}), GRPO)
    longer = candidates(1, 2, rewards=[1.0, 0.0], reference_logps=[-1.0, -2.0])
    with pytest.raises(ValueError, match=r"reference_logps: expected one number a token, .* got one a candidate"):
        ranking_loss(-torch.ones(3), longer, GRPO.replace(kl_weight=0.1))
    for settings, message in (
        ({"clip_low": 1.5}, "clip_low: expected at most 1"),
        ({"clip_high": 0.0}, "clip_high: expected a positive finite number, got 0"),
        ({"kl_weight": -0.1}, r"kl_weight: expected a finite number that is not negative, got -0\.1"),
        ({"advantages": "grpo"}, "advantages: expected one of group, given, got 'grpo'"),
        ({"reduction": "mean"}, "reduction: expected one of token_mean, sequence_mean, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyOptions(**settings)


def test_why_nothing_would_be_learned() -> None:
    assert "every prompt has one response" in GRPO.silence_hint(several=False)
    assert "rewards of each prompt are all equal" in GRPO.silence_hint(several=True)
