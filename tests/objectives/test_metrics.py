"""The metrics vector against plain Python, its ratios by hand, and what merging means."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import (
    METRIC_NAMES,
    CLHAMetrics,
    CLHAOptions,
    Objective,
    PolicyOptions,
    PROOptions,
    RankingInputs,
    RRHFOptions,
    SFTOptions,
    linear_loss,
    ranking_loss,
    token_logps,
)
from tests.support.helpers import Case, make_case, plain_loss

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
# Every sum different from every other, so that a swapped index shows.
VALUES = (6, 2, 8, 20, 5, 12, -16, -28, 3, 10, 7, 2.5, 1, 4, 90, 9, 30, 120, 0.9)
SUMS = dict(zip(METRIC_NAMES, map(float, VALUES), strict=True))


def metrics_of(**sums: float) -> CLHAMetrics:
    values = torch.tensor([{**SUMS, **sums}[name] for name in METRIC_NAMES])
    return CLHAMetrics(values, torch.arange(2.0))


def test_the_order_of_the_vector():
    assert (
        *("rank_loss", "sft_loss", "kept_pairs", "total_pairs", "correct_pairs", "margin_sum"),
        *("chosen_sum", "rejected_sum", "active_pairs", "ordered_pairs", "concordant_pairs", "discordant_pairs"),
        *("open_gates", "prompts", "scored_tokens", "scored_candidates"),
        *("kept_blocks", "routable_blocks", "dropped_mass"),
    ) == METRIC_NAMES


def test_ratios_by_hand():
    metrics = metrics_of()
    expected = {
        "rank_loss": 6.0,
        "sft_loss": 2.0,
        "rewards/accuracies": 5 / 8,
        "rewards/margins": 12 / 8,
        "logps/chosen": -2.0,
        "logps/rejected": -3.5,
        "kept_pair_share": 8 / 20,
        "active_pair_share": 3 / 8,
        "open_gate_share": 1 / 4,
        "kendall_tau": (7 - 2.5) / 10,
        "num_tokens": 90.0,
        "kept_block_share": 0.25,
        "dropped_mass": 0.01,
    }
    assert metrics.as_dict() == pytest.approx(expected)
    properties = {
        "rewards/accuracies": metrics.ranking_accuracy,
        "rewards/margins": metrics.margin,
        "logps/chosen": metrics.chosen_logp,
        "logps/rejected": metrics.rejected_logp,
    }
    for name in (
        "rank_loss",
        "sft_loss",
        "kept_pair_share",
        "kendall_tau",
        "num_tokens",
        "kept_block_share",
        "dropped_mass",
    ):
        properties[name] = getattr(metrics, name)
    for name, value in properties.items():
        assert value.item() == pytest.approx(expected[name]), name
    assert metrics.sum_of("scored_candidates") == 9
    assert "kendall_tau=0.45" in repr(metrics)
    exact = metrics_of(kept_blocks=0.0, routable_blocks=0.0, dropped_mass=0.0)
    assert set(expected) - set(exact.as_dict()) == {"kept_block_share", "dropped_mass"}
    assert exact.kept_block_share.isnan()


def test_a_mean_over_nothing_is_nan():
    metrics = CLHAMetrics(torch.zeros(len(METRIC_NAMES)), torch.zeros(0))
    numbers = metrics.as_dict()
    sums = {"rank_loss", "sft_loss", "num_tokens"}
    assert {name for name, value in numbers.items() if math.isnan(value)} == set(numbers) - sums
    assert metrics.ranking_accuracy.isnan()
    assert metrics.kendall_tau.isnan()


def test_merging_weighs_pairs_alike_and_losses_by_call():
    # 5 of 8 pairs and 1 of 2: 6 of 10, not the mean of the shares. Losses: the mean of 6 and 3.
    merged = CLHAMetrics.merge([metrics_of(), metrics_of(kept_pairs=2.0, correct_pairs=1.0, rank_loss=3.0)])
    assert merged.ranking_accuracy.item() == pytest.approx(6 / 10)
    assert merged.rank_loss.item() == pytest.approx(4.5)
    assert merged.as_dict()["rank_loss"] == pytest.approx(4.5)
    assert merged.as_dict()["num_tokens"] == 180
    assert merged.scores.tolist() == [0, 1, 0, 1]
    # Merging merged ones is merging all: three calls of 6, 3 and 0.
    nested = CLHAMetrics.merge([merged, metrics_of(rank_loss=0.0)])
    assert nested.rank_loss.item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match=r"^parts: expected at least one CLHAMetrics, got none$"):
        CLHAMetrics.merge([])


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (PROOptions(), SFTOptions(), "best_first and target_nll"),
        (SFTOptions(), CLHAOptions(), "target_nll and none"),
        (PolicyOptions(), PolicyOptions(kl_weight=0.1), "ratio, clip_share, old_kl and ratio, .*, reference_kl"),
        (CLHAOptions().watched(), CLHAOptions(), "entropy, mean_token_accuracy and none"),
    ],
)
def test_metrics_of_several_objectives_are_not_merged(one: Objective, other: Objective, said: str) -> None:
    def metrics(objective: Objective) -> CLHAMetrics:
        inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), torch.tensor([5.0, 1.0]))
        if "reference_logps" in objective.needs:
            inputs = inputs._replace(reference_logps=-torch.ones(2))
        statistics = dict.fromkeys(objective.wanted, torch.ones(2))
        return ranking_loss(-torch.ones(2), inputs, objective, statistics=statistics)[1]

    with pytest.raises(ValueError, match=f"^parts: expected metrics of one objective, got own metrics {said}, each"):
        CLHAMetrics.merge([metrics(one), metrics(one), metrics(other)])
    for same in (one, other):
        assert CLHAMetrics.merge([metrics(same)] * 2).num_tokens == 4


def brute_force(case: Case, options: CLHAOptions) -> dict[str, float]:
    logps = token_logps(case.hidden, case.weight, case.targets, row_index=case.row_index, backend="reference")
    sums, tokens, start = [], [], 0
    for length in case.candidate_lengths.tolist():
        span = slice(start, start + length)
        sums.append(math.fsum(logps[span].tolist()))
        tokens.append(int((case.targets[span] != -100).sum()))
        start += length
    rewards = None if case.rewards is None else case.rewards.tolist()
    sft_index = None if case.sft_index is None else case.sft_index.tolist()
    return plain_loss(sums, tokens, case.candidates_per_prompt.tolist(), options, rewards, sft_index)


@BACKENDS
@pytest.mark.parametrize("rule", ["abs", "signed", "none"])
@pytest.mark.parametrize("rewards", [True, False])
def test_every_sum_against_plain_python(backend, rule, rewards):
    """Ties, empty and wholly ignored candidates, a single candidate and small margins, so that no sum is trivial."""
    case = make_case(
        [3, 0, 2, 4, 1, 2, 3, 1, 2, 5], [4, 1, 5], rewards=rewards, rows=9, ignored=0.25, sft_index=True, seed=11
    )
    case.targets[9] = -100  # the fifth candidate's only token
    if rewards:
        case.rewards[6] = case.rewards[7]
    options = CLHAOptions(margin=0.2, noise_rule=rule)
    loss, metrics = case.loss(backend, options=options)
    expected = brute_force(case, options)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    for name, value in zip(METRIC_NAMES, metrics.values.tolist(), strict=True):
        assert value == pytest.approx(expected[name], rel=1e-6), name
    assert 0 < expected["active_pairs"] < expected["kept_pairs"]
    assert 0 < expected["concordant_pairs"] < expected["ordered_pairs"] < expected["total_pairs"]


@BACKENDS
def test_metrics_of_two_batches_add_up(backend):
    cases = [make_case([2, 3, 1], [3], rewards=True, seed=1), make_case([1, 2, 2, 4], [2, 2], rewards=True, seed=2)]
    merged = CLHAMetrics.merge([case.loss(backend)[1] for case in cases])
    expected = [brute_force(case, CLHAOptions()) for case in cases]
    for name in METRIC_NAMES:
        assert merged.sum_of(name).item() == pytest.approx(sum(e[name] for e in expected), rel=1e-6), name
    assert merged.scores.shape == (7,)


BY_REWARD = pytest.mark.parametrize("objective", [RRHFOptions(), PolicyOptions(), PolicyOptions(advantages="given")])


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@BY_REWARD
@pytest.mark.parametrize("seed", range(3))
def test_who_goes_by_reward_says_the_same_in_any_order(objective: Objective, backend: str, seed: int) -> None:
    """Candidates shuffled within their prompts, some tied, one without tokens; the triton backend ranks in torch."""
    lengths, sizes, rewards = [3, 2, 0, 4, 1, 5], [4, 2], [1.0, -2.0, 0.5, 1.0, 3.0, -1.0]
    case = make_case(lengths, sizes, dtype=torch.float32)
    given = objective.needs == ("advantages",)

    def values(order: list[int]) -> list[float]:
        tokens = [token for c in order for token in range(sum(lengths[:c]), sum(lengths[: c + 1]))]
        picked = torch.tensor(order)
        inputs = RankingInputs(torch.tensor(lengths)[picked], torch.tensor(sizes), torch.tensor(rewards)[picked])
        if given:
            inputs = inputs._replace(advantages=torch.arange(6.0)[picked])
        _, metrics = linear_loss(
            case.hidden[tokens], case.weight, case.targets[tokens], inputs, objective, backend=backend
        )
        numbers: list[float] = metrics.values.tolist()
        return numbers

    draw = torch.Generator().manual_seed(seed)
    shuffled = [*torch.randperm(4, generator=draw).tolist(), *(4 + torch.randperm(2, generator=draw)).tolist()]
    wanted = values([*range(6)])
    # The target is the first of the best: place 0 or 3, whose log-probabilities differ.
    skipped = {METRIC_NAMES.index("sft_loss")} if objective.name == "rrhf" else set()
    for at, (got, want) in enumerate(zip(values(shuffled), wanted, strict=True)):
        if at not in skipped:
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6), METRIC_NAMES[at]


@BY_REWARD
def test_pairs_by_reward_by_hand(objective: Objective) -> None:
    """s = (-1, -2, -3, -4), r = (1, 3, 3, 1): leads of the better are -1, -2, 2 and 1; two pairs tie."""
    inputs = RankingInputs(torch.ones(4, dtype=torch.long), torch.tensor([4]), torch.tensor([1.0, 3.0, 3.0, 1.0]))
    if objective.needs == ("advantages",):
        inputs = inputs._replace(advantages=torch.arange(4.0))
    found = ranking_loss(torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64), inputs, objective)[1].as_dict()
    wanted = {"accuracies": 0.5, "margins": 0.0}
    assert {name: found[f"rewards/{name}"] for name in wanted} == pytest.approx(wanted)
    assert (found["logps/chosen"], found["logps/rejected"]) == pytest.approx((-2.5, -2.5))
    assert (found["kept_pair_share"], found["kendall_tau"]) == pytest.approx((4 / 6, 0))
    # The second of two is the better one, and the less likely.
    two = inputs._replace(
        candidate_lengths=torch.tensor([1, 1]),
        candidates_per_prompt=torch.tensor([2]),
        rewards=torch.tensor([0.0, 1.0]),
        advantages=None if inputs.advantages is None else torch.zeros(2),
    )
    found = ranking_loss(torch.tensor([-1.0, -4.0]), two, objective)[1].as_dict()
    assert (found["rewards/accuracies"], found["rewards/margins"], found["kendall_tau"]) == (0, -3, -1)
    assert (found["logps/chosen"], found["logps/rejected"]) == (-4, -1)


def test_without_rewards_the_first_is_the_better() -> None:
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]), advantages=torch.tensor([1.0, -1.0]))
    found = ranking_loss(torch.tensor([-1.0, -4.0]), inputs, PolicyOptions(advantages="given"))[1].as_dict()
    assert (found["rewards/accuracies"], found["rewards/margins"], found["kendall_tau"]) == (1, 3, 1)
