"""The metrics vector against plain Python, its ratios by hand, and what merging means."""

from __future__ import annotations

import math

import pytest
import torch

from clha_fast import METRIC_NAMES, CLHAMetrics, CLHAOptions, token_logps
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
