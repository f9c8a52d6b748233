"""The ranking kernels: hand-worked losses, then the reference in float64 over every option and ragged shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clha_fast import reference
from clha_fast.backends.triton import backend as triton_backend
from clha_fast.backends.triton.head import Head
from clha_fast.objectives.clha import PRESETS, PUBLISHED, CLHAOptions
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.types import RankingInputs
from tests.support.triton_harness import DEVICE, PLAIN, Problem, eager_logps, every_dtype, exact_loss, loss, problem


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def with_scores(logps: list[list[float]]) -> tuple[Problem, Tensor]:
    """A head whose token log-probabilities are the given ones, by a softmax over two words, and the lengths.

    Token t has logits (l, log(1 - e^l)): log-probability l for word 0.
    """
    flat = torch.tensor([value for candidate in logps for value in candidate], dtype=torch.float64)
    hidden = torch.stack([flat, torch.log1p(-flat.exp())], 1).float().to(DEVICE)
    targets = torch.zeros(len(flat), dtype=torch.int64, device=DEVICE)
    weight = torch.eye(2, device=DEVICE)
    return Problem(hidden, weight, None, targets, None, PLAIN), integers(*map(len, logps))


def metric(metrics: Tensor, name: str) -> float:
    return float(metrics[METRIC_NAMES.index(name)])


def random_ranking(sizes: list[int], longest: int, seed: int, rewards: bool = True) -> RankingInputs:
    draw = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    lengths = torch.randint(0, longest + 1, (count,), generator=draw)
    return RankingInputs(
        candidate_lengths=lengths.to(DEVICE),
        candidates_per_prompt=integers(*sizes),
        # Whole numbers tie often and sit exactly on the threshold.
        rewards=torch.randint(-4, 5, (count,), generator=draw).float().to(DEVICE) if rewards else None,
    )


def check(p: Problem, r: RankingInputs, options: CLHAOptions) -> None:
    total, metrics, scores, slopes, *_ = loss(p, r, options)
    exact, exact_metrics, exact_scores, slope = exact_loss(p, r, options)
    torch.testing.assert_close(total.double(), exact, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(metrics, exact_metrics, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=3e-6, atol=3e-6)
    per_token = torch.where(p.targets == p.head.ignore_index, 0.0, slopes)
    torch.testing.assert_close(per_token.double(), slope, rtol=1e-6, atol=1e-7)


def test_two_candidates_by_hand() -> None:
    # s = (-2, -1): S_0 = -1 - 3 over 2 tokens. h = max(0, -1 + 2 + 3) = 4 at distance 1, one pair.
    # SFT: 0.05 * (2 - 1)^2 * 4 = 0.2. dL/dS_0 = -1/2 - 0.05, dL/dS_1 = 1.
    p, lengths = with_scores([[-1.0, -3.0], [-1.0]])
    total, metrics, scores, slopes, *_ = loss(p, RankingInputs(lengths, integers(2), floats(5.0, 1.0)), PUBLISHED)
    torch.testing.assert_close(total.cpu(), torch.tensor(4.2))
    torch.testing.assert_close(scores.cpu(), torch.tensor([-2.0, -1.0]))
    torch.testing.assert_close(slopes.cpu(), torch.tensor([-0.55, -0.55, 1.0]))
    expected = [4, 0.2, 1, 1, 0, -1, -2, -1, 1, 1, 0, 1, 1, 1, 3, 2, 0, 0, 0]
    torch.testing.assert_close(metrics.cpu(), torch.tensor(expected))


def test_three_candidates_by_hand_in_every_reduction() -> None:
    # Prompt A: s = (-1, -2, -3), rewards (9, 5, 4): pair (1, 2) is noise. h_01 = -1 + 3 = 2, h_02 = -2 + 6 = 4.
    # Prompt B: s = (-1, -1): h_01 = 3. Kept: distance 1 twice, distance 2 once.
    p, lengths = with_scores([[-1.0], [-2.0], [-3.0], [-1.0], [-1.0]])
    r = RankingInputs(lengths, integers(3, 2), floats(9.0, 5.0, 4.0, 8.0, 1.0))
    rank = {"distance_mean": (2 + 3) / 2 + 4, "sum": (2 + 4 + 3) / 2, "pair_mean": (2 + 4 + 3) / 3}
    slope = {
        "distance_mean": [-1.5, 0.5, 1.0, -0.5, 0.5],
        "sum": [-1.0, 0.5, 0.5, -0.5, 0.5],
        "pair_mean": [-2 / 3, 1 / 3, 1 / 3, -1 / 3, 1 / 3],
    }
    for reduction in ("distance_mean", "sum", "pair_mean"):
        total, _, _, slopes, *_ = loss(p, r, PUBLISHED.replace(reduction=reduction, sft_weight=0.0))
        torch.testing.assert_close(float(total), rank[reduction], rtol=1e-6, atol=0)
        torch.testing.assert_close(slopes.cpu(), torch.tensor(slope[reduction]))


def test_the_kink_and_equal_scores() -> None:
    # Equal scores and margin 0: the hinge's argument is exactly 0, and so are loss and slope.
    p, lengths = with_scores([[-1.5], [-1.5], [-1.5]])
    options = CLHAOptions(margin=0.0, sft_weight=0.0)
    total, metrics, _, slopes, *_ = loss(p, RankingInputs(lengths, integers(3)), options)
    assert float(total) == 0
    assert (slopes == 0).all()
    assert metric(metrics, "active_pairs") == 0
    assert metric(metrics, "correct_pairs") == 1.5
    assert metric(metrics, "kept_pairs") == metric(metrics, "ordered_pairs") == 3


@pytest.mark.parametrize("reduction", ["sum", "distance_mean", "pair_mean"])
@pytest.mark.parametrize("noise_rule", ["abs", "signed", "none"])
@pytest.mark.parametrize("sft", ["sum", "mean"])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_option_against_the_reference(reduction: str, noise_rule: str, sft: str) -> None:
    for seed, (factor, given_counts) in enumerate([("squared", True), ("one", False)]):
        options = CLHAOptions(
            margin=0.4,
            reward_margin=1.0,
            noise_rule=noise_rule,
            reduction=reduction,
            sft=sft,
            sft_factor=factor,
            rank_weight=0.7,
            reward_floor=-2.0,
        )
        r = random_ranking([3, 1, 5, 2], 6, seed)
        if given_counts:
            counts, prompts = floats(7, 5, 3, 2, 9), torch.tensor(6.0, device=DEVICE)
            r = r._replace(pair_counts=counts, prompt_count=prompts, sft_index=integers(2, 0, 4, 1))
        check(problem(int(r.candidate_lengths.sum()), 30, 8, ignored=0.2, seed=seed), r, options)


@pytest.mark.parametrize(
    ("sizes", "preset"),
    [([70], "published"), ([70], "sft_only"), ([17, 1, 33], "paper"), ([16, 16], "published")],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_memory")
def test_more_candidates_than_a_tile_holds(preset: str, sizes: list[int]) -> None:
    r = random_ranking(sizes, 2, seed=len(sizes))
    check(problem(int(r.candidate_lengths.sum()), 20, 8), r, PRESETS[preset].replace(margin=0.1))


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    longest=st.integers(0, 9),
    rewards=st.booleans(),
    preset=st.sampled_from(sorted(PRESETS)),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    seed=st.integers(0, 99),
)
def test_any_shape(sizes: list[int], longest: int, rewards: bool, preset: str, ignored: float, seed: int) -> None:
    r = random_ranking(sizes, longest, seed, rewards)
    check(problem(int(r.candidate_lengths.sum()), 19, 6, ignored=ignored, seed=seed), r, PRESETS[preset])


def test_all_pairs_dropped_and_no_open_gate_is_exactly_zero() -> None:
    r = RankingInputs(integers(3, 2, 4), integers(3), floats(-1.0, -1.0, -1.0))
    for preset in ("published", "paper"):
        total, metrics, _, slopes, *_ = loss(problem(9), r, PRESETS[preset])
        assert float(total) == 0
        assert (slopes == 0).all()
        assert metric(metrics, "kept_pairs") == metric(metrics, "open_gates") == 0
        assert metric(metrics, "total_pairs") == 3


def test_a_single_candidate_and_no_token_at_all() -> None:
    total, _, scores, slopes, *_ = loss(problem(5), RankingInputs(integers(5), integers(1)), PUBLISHED)
    assert float(total) == 0
    assert (slopes == 0).all()
    assert float(scores) < 0
    total, metrics, scores, slopes, lse, _ = loss(problem(0), RankingInputs(integers(0, 0), integers(2)), PUBLISHED)
    assert (scores == 0).all()
    assert (slopes == 0).all()
    assert float(total) == metric(metrics, "scored_tokens") == lse.numel() == 0


def test_a_candidate_without_tokens_keeps_its_place() -> None:
    # Of ranks 0, 1, 2 the middle one has no token: its pairs are dropped, the others' distance stays 2.
    p, lengths = with_scores([[-1.0], [], [-1.0]])
    total, _, scores, slopes, *_ = loss(p, RankingInputs(lengths, integers(3)), CLHAOptions(sft_weight=0.0))
    torch.testing.assert_close(float(total), 6.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes.cpu(), torch.tensor([-1.0, 1.0]))
    assert float(scores[1]) == 0


def test_nan_reaches_the_loss_only_through_what_counts() -> None:
    rewards = floats(9.0, 1.0, 1.0)
    for poisoned, is_nan in ((1, True), (2, False)):
        # Candidate 2 is as good as candidate 1 and, with the margin at 20, in no kept pair with 0 when reward 1 -> -20.
        p, lengths = with_scores([[-1.0], [-2.0], [-3.0]])
        p.hidden[poisoned] = float("nan")
        options = CLHAOptions(noise_rule="signed", reward_margin=3.0)
        r = RankingInputs(lengths, integers(3), rewards if is_nan else floats(9.0, 1.0, 8.0))
        total, _, scores, slopes, *_ = loss(p, r, options)
        assert math.isnan(float(total)) == is_nan
        assert math.isnan(float(scores[poisoned]))
        assert slopes.isfinite().all()
        assert (float(slopes[poisoned]) != 0) == is_nan


def test_an_sft_index_outside_its_prompt_is_nan() -> None:
    for index in (-1, 2, 2**40):
        r = RankingInputs(integers(4, 5), integers(2), sft_index=integers(index))
        assert math.isnan(float(loss(problem(9), r, PUBLISHED)[0]))


def test_lengths_that_do_not_add_up_read_nothing_out_of_bounds() -> None:
    p = problem(6)
    total, metrics, *_ = loss(p, RankingInputs(integers(4, 2**40), integers(2)), PUBLISHED)
    assert metric(metrics, "scored_tokens") == 6
    assert math.isfinite(float(total))
    for sizes in ((2**40,), (2, 0), (1, 1), (0, 2)):
        loss(p, RankingInputs(integers(4, 2), integers(*sizes)), PUBLISHED)


def test_too_few_given_counts_are_nan() -> None:
    r = RankingInputs(integers(3, 3, 3), integers(3), pair_counts=floats(2.0))
    assert math.isnan(float(loss(problem(9), r, PUBLISHED)[0]))


@pytest.mark.parametrize("tokens", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_long_candidates_add_up(tokens: int) -> None:
    # The statistics of the head are given, for its GEMM would take minutes here: one vocabulary block of sum 1.
    draw = torch.Generator().manual_seed(0)
    logit = -torch.rand(tokens, generator=draw).to(DEVICE) * 11
    p = problem(tokens, 4, 2)
    ready = Head.of(p.inputs, PLAIN)
    statistics = torch.zeros(1, tokens, device=DEVICE), torch.ones(1, tokens, device=DEVICE), logit
    r = RankingInputs(integers(tokens - 1, 1), integers(2))
    total, metrics, scores, *_ = triton_backend.rank(*statistics, ready, r, PUBLISHED)
    exact, _, exact_scores = reference.clha_loss(logit.double(), p.targets, *r[:6], PLAIN, PUBLISHED)
    torch.testing.assert_close(total.double(), exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-7, atol=0)
    assert metric(metrics, "scored_tokens") == tokens


@every_dtype
def test_no_worse_than_the_eager_path(dtype: torch.dtype) -> None:
    ours = eagers = 0.0
    for seed in range(4):
        r = random_ranking([4, 3], 12, seed)
        p = problem(int(r.candidate_lengths.sum()), 150, 64, dtype=dtype, seed=seed)
        exact = float(exact_loss(p, r, PUBLISHED)[0])
        eager, _, _ = reference.clha_loss(eager_logps(p, p.leaves(dtype)), p.targets, *r[:6], PLAIN, PUBLISHED)
        # Both results are float32: neither can be expected to be nearer than its rounding.
        rounding = exact * 2.0**-24
        ours += max(abs(float(loss(p, r, PUBLISHED)[0]) - exact), rounding) ** 2
        eagers += max(abs(float(eager.detach()) - exact), rounding) ** 2
    assert math.sqrt(ours) <= 1.05 * math.sqrt(eagers)


@pytest.mark.usefixtures("poisoned_memory")
def test_bitwise_repeatable() -> None:
    r = random_ranking([5, 20, 2], 9, seed=3)
    p = problem(int(r.candidate_lengths.sum()), 50, 8)
    for first, second in zip(loss(p, r, PUBLISHED), loss(p, r, PUBLISHED), strict=True):
        assert torch.equal(first, second)
