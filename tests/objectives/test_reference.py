"""The ranking loss on given log-probabilities: hand-worked numbers first, then plain Python loops.

Every case runs through the reference and through the torch backend, which share no code.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from clha_fast import METRIC_NAMES, CLHAOptions, HeadOptions, reference
from tests.support.helpers import make_case, plain_loss, rank

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
PUBLISHED = CLHAOptions.preset("published")
PAPER = CLHAOptions.preset("paper")
RANK_ONLY = CLHAOptions(sft_weight=0.0)

# Two prompts of two candidates: s = (-2, -1) and (-2, -4).
PAIRS = {
    "logps": [-1.0, -3.0, -1.0, -2.0, -4.0, -4.0],
    "candidate_lengths": [2, 1, 1, 2],
    "candidates_per_prompt": [2, 2],
}
# One prompt of three, one token each.
TRIPLE = {"logps": [-1.0, -2.0, -0.5], "candidate_lengths": [1, 1, 1], "candidates_per_prompt": [3]}
# One prompt of six, s_i = -1 - i: every lead is j - i, so h = 3 (j - i) - (j - i) = 2 (j - i) at margin 3.
SIX = {"logps": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], "candidate_lengths": [1] * 6, "candidates_per_prompt": [6]}


@BACKENDS
def test_two_candidates_by_hand(backend):
    # h = max(0, -1 + 2 + 3) = 4 and max(0, -4 + 2 + 3) = 1. One distance: mean 5/2.
    # SFT: 0.05 * (2 - 1)^2 * mean(4, 2) = 0.15.
    result = rank(backend, options=PUBLISHED, **PAIRS)
    assert result.loss == pytest.approx(2.65, rel=1e-12)
    assert result.scores == pytest.approx([-2, -1, -2, -4], rel=1e-12)
    # dL/ds = -1/2, +1/2 in each prompt, over |y|; and -0.05 / 2 on the targets' tokens.
    assert result.slopes == pytest.approx([-0.275, -0.275, 0.5, -0.525, 0.25, 0.25], rel=1e-12)


@BACKENDS
@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # h01 = -2 + 1 + 3 = 2, h12 = -0.5 + 2 + 3 = 4.5, h02 = -0.5 + 1 + 6 = 6.5
        ("distance_mean", (2 + 4.5) / 2 + 6.5),
        ("sum", 2 + 4.5 + 6.5),
        ("pair_mean", (2 + 4.5 + 6.5) / 3),
    ],
)
def test_three_candidates_by_hand(backend, reduction, expected):
    assert rank(backend, options=RANK_ONLY.replace(reduction=reduction), **TRIPLE).loss == pytest.approx(expected)


@BACKENDS
@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # 2 d at distance d, the same for each of the 6 - d pairs: 2 (1 + 2 + 3 + 4 + 5) = 30 over the distances,
        # 2 (5*1 + 4*2 + 3*3 + 2*4 + 1*5) = 70 over the 15 pairs.
        ("distance_mean", 30.0),
        ("sum", 70.0),
        ("pair_mean", 70.0 / 15.0),
    ],
)
def test_six_candidates_by_hand(backend, reduction, expected):
    assert rank(backend, options=RANK_ONLY.replace(reduction=reduction), **SIX).loss == pytest.approx(expected)
    # Published SFT: 0.05 * (6 - 1)^2 * 1 = 1.25.
    options = PUBLISHED.replace(reduction=reduction)
    assert rank(backend, options=options, **SIX).loss == pytest.approx(expected + 1.25)


@BACKENDS
@pytest.mark.parametrize(
    ("reduction", "expected"), [("distance_mean", 8 + 10.0), ("sum", 8 + 8 + 10.0), ("pair_mean", 26 / 3)]
)
def test_a_lead_at_the_threshold_is_noise(backend, reduction, expected):
    # Rewards 5..0: leads equal distances, and only 4 and 5 exceed 3. (0, 4), (1, 5): 8 each; (0, 5): 10.
    options = RANK_ONLY.replace(reduction=reduction)
    result = rank(backend, options=options, rewards=[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], **SIX)
    assert result.loss == pytest.approx(expected)
    assert result.metrics["kept_pair_share"] == pytest.approx(3 / 15)


@BACKENDS
def test_distances_pool_over_the_batch(backend):
    # The two-candidate prompts' 4 and 1 join the triple's 2 and 4.5 at distance 1; 6.5 is alone at distance 2.
    joined = {
        "logps": PAIRS["logps"] + TRIPLE["logps"],
        "candidate_lengths": PAIRS["candidate_lengths"] + TRIPLE["candidate_lengths"],
        "candidates_per_prompt": [2, 2, 3],
    }
    expected = {"distance_mean": 11.5 / 4 + 6.5, "sum": (4 + 1 + 13) / 3, "pair_mean": 18 / 5}
    for reduction, value in expected.items():
        assert rank(backend, options=RANK_ONLY.replace(reduction=reduction), **joined).loss == pytest.approx(value)
    # SFT mean form at (n - 1)^2: (1 * 2 + 1 * 2 + 4 * 1) / 3, weight 0.05.
    assert rank(backend, options=PAPER, **joined).loss == pytest.approx(6 + 0.05 * 8 / 3)
    # Targets' NLL alone, without the factor: (2 + 2 + 1) / 3.
    assert rank(backend, options=CLHAOptions.preset("sft_only"), **joined).loss == pytest.approx(5 / 3)


@BACKENDS
@pytest.mark.parametrize(
    ("rule", "rewards", "kept"),
    [
        ("abs", [9.0, 0.0], True),
        ("abs", [0.0, 9.0], True),  # the worse one is rewarded more: kept all the same
        ("signed", [9.0, 0.0], True),
        ("signed", [0.0, 9.0], False),
        ("none", [0.0, 9.0], True),
        ("none", [1.0, 1.0], True),
        ("abs", [1.0, 1.0], False),
        ("signed", [1.0, 1.0], False),
        ("abs", [3.0, 0.0], False),  # exactly at the margin
        ("signed", [3.0, 0.0], False),
        ("abs", [3.0 + 2**-22, 0.0], True),  # the next one in float32, in which all compare
        ("abs", [math.nextafter(3.0, 4.0), 0.0], False),
    ],
)
def test_noise_rules(backend, rule, rewards, kept):
    options = CLHAOptions(noise_rule=rule, sft_weight=0.0)
    given = torch.tensor(rewards, dtype=torch.float64)
    result = rank(backend, [-1.0, -2.0], options, candidate_lengths=[1, 1], candidates_per_prompt=[2], rewards=given)
    assert result.loss == pytest.approx(2.0 if kept else 0.0)
    assert result.slopes == ([-1.0, 1.0] if kept else [0.0, 0.0])


@BACKENDS
@pytest.mark.parametrize(("rule", "kept"), [("abs", 0), ("signed", 0), ("none", 1)])
def test_ties_are_noise_even_without_a_margin(backend, rule, kept):
    options = CLHAOptions(noise_rule=rule, reward_margin=0.0)
    shape = {"candidate_lengths": [1, 1], "candidates_per_prompt": [2]}
    result = rank(backend, [-1.0, -2.0], options, rewards=[1.0, 1.0], **shape)
    assert result.metrics["kept_pair_share"] == kept
    assert math.isnan(result.metrics["kendall_tau"])  # a tie has no order to agree with


@BACKENDS
@pytest.mark.parametrize("sft", ["sum", "mean"])
@pytest.mark.parametrize("factor", ["squared", "one"])
@pytest.mark.parametrize("floor", [0.0, 1.0, -math.inf])
def test_sft_forms_and_gates(backend, sft, factor, floor):
    # Targets: the second of three (S = -5, |y| = 2, reward 1) and the first of two (S = -2, reward -7).
    options = CLHAOptions(rank_weight=0.0, sft=sft, sft_factor=factor, reward_floor=floor, sft_weight=0.5)
    result = rank(
        backend,
        [-1.0, -2.0, -3.0, -1.0, -2.0, -9.0],
        options,
        candidate_lengths=[1, 2, 1, 1, 1],
        candidates_per_prompt=[3, 2],
        rewards=[0.0, 1.0, 0.0, -7.0, 0.0],
        sft_index=[1, 0],
    )
    first = (5.0 if sft == "sum" else 2.5) * (4 if factor == "squared" else 1)
    open_gates = {0.0: (1, 0), 1.0: (0, 0), -math.inf: (1, 1)}[floor]  # at the floor a gate is closed
    # A closed prompt counts as 0 and still counts in the mean over the two prompts.
    assert result.loss == pytest.approx(0.5 * (first * open_gates[0] + 2.0 * open_gates[1]) / 2)
    assert result.metrics["open_gate_share"] == sum(open_gates) / 2


@BACKENDS
def test_one_candidate_has_no_pairs(backend):
    shape = {"candidate_lengths": [2], "candidates_per_prompt": [1]}
    result = rank(backend, [-1.0, -3.0], PUBLISHED, **shape)
    assert result.loss == 0.0  # (n - 1)^2 = 0
    assert result.slopes == [0.0, 0.0]
    assert rank(backend, [-1.0, -3.0], CLHAOptions.preset("sft_only"), **shape).loss == pytest.approx(2.0)


@BACKENDS
def test_an_empty_candidate_keeps_its_place(backend):
    # The middle one of three has no token: its pairs go, and (0, 2) keeps distance 2, margin 6: -3 + 1 + 6 = 4.
    # n stays 3: SFT 0.05 * 4 * 1.
    result = rank(backend, [-1.0, -3.0], PUBLISHED, candidate_lengths=[1, 0, 1], candidates_per_prompt=[3])
    assert result.loss == pytest.approx(4.2)
    assert result.scores == pytest.approx([-1, 0, -3])
    assert result.slopes == pytest.approx([-1.2, 1.0])
    assert result.metrics["kept_pair_share"] == pytest.approx(1 / 3)
    # An empty target closes the gate: only the pair (1, 2) is left, -3 + 1 + 3 = 1.
    result = rank(backend, [-1.0, -3.0], PUBLISHED, candidate_lengths=[0, 1, 1], candidates_per_prompt=[3])
    assert result.loss == pytest.approx(1.0)
    assert result.slopes == pytest.approx([-1.0, 1.0])


@BACKENDS
@pytest.mark.parametrize("lengths", [[2, 2], [4, 0], [0, 0]])
@pytest.mark.parametrize("reduction", ["sum", "distance_mean", "pair_mean"])
def test_nothing_kept_is_exactly_zero(backend, lengths, reduction):
    # Equal rewards below the floor: no pair, no gate.
    case = make_case(lengths, [2]).replace(rewards=torch.tensor([-1.0, -1.0]))
    loss, (dhidden, dweight) = case.gradients(backend, options=PUBLISHED.replace(reduction=reduction))
    assert loss.item() == 0.0
    assert torch.count_nonzero(dhidden) == 0
    assert torch.count_nonzero(dweight) == 0
    assert dhidden.shape == case.hidden.shape


@BACKENDS
def test_the_kink_has_no_slope(backend):
    # s_j - s_i + margin = -1.5 + 1 + 0.5 is 0 exactly; half a step to either side it is not.
    shape = {"candidate_lengths": [1, 1], "candidates_per_prompt": [2]}
    options = CLHAOptions(margin=0.5, sft_weight=0.0)
    logps = torch.tensor([-1.0, -1.5], dtype=torch.float64, requires_grad=True)
    loss, values, _ = reference.clha_loss(
        logps, torch.zeros(2).long(), torch.ones(2).long(), torch.tensor([2]), *[None] * 4, HeadOptions(), options
    )
    loss.backward()
    assert loss.item() == 0.0
    assert logps.grad.tolist() == [0.0, 0.0]
    assert values[METRIC_NAMES.index("active_pairs")] == 0
    assert rank(backend, [-1.0, -1.5], options.replace(margin=0.4), **shape).slopes == [0.0, 0.0]
    assert rank(backend, [-1.0, -1.5], options.replace(margin=0.6), **shape).slopes == [-1.0, 1.0]
    # Equal scores and margin 0: exactly at the kink in every arithmetic.
    equal = rank(backend, [-1.0, -1.0], options.replace(margin=0.0), **shape)
    assert equal.slopes == [0.0, 0.0]
    assert equal.metrics["active_pair_share"] == 0
    assert equal.metrics["rewards/accuracies"] == 0.5  # a tie is half a win
    assert equal.metrics["kendall_tau"] == 0


@BACKENDS
@pytest.mark.parametrize("reduction", ["sum", "distance_mean", "pair_mean"])
def test_global_counts_make_two_halves_one_batch(backend, reduction):
    options = PUBLISHED.replace(reduction=reduction)
    whole = make_case([2, 1, 3, 1, 2, 4, 2, 1], [3, 2, 3], rewards=True, sft_index=True)
    rewards = whole.rewards.tolist()
    counts = [0.0, 0.0]
    for start, size in ((0, 3), (3, 2), (5, 3)):
        for i in range(start, start + size):
            for j in range(i + 1, start + size):
                counts[j - i - 1] += abs(rewards[i] - rewards[j]) > 3
    assert min(counts) > 0
    total, grads = whole.gradients(backend, options=options)
    halves, weight_grad = 0.0, torch.zeros_like(whole.weight)
    for prompts, candidates, tokens in (
        (slice(0, 2), slice(0, 5), slice(0, 9)),
        (slice(2, 3), slice(5, 8), slice(9, 16)),
    ):
        half = whole.replace(
            hidden=whole.hidden[tokens],
            targets=whole.targets[tokens],
            candidate_lengths=whole.candidate_lengths[candidates],
            candidates_per_prompt=whole.candidates_per_prompt[prompts],
            rewards=whole.rewards[candidates],
            sft_index=whole.sft_index[prompts],
            pair_counts=torch.tensor(counts),
            prompt_count=torch.tensor(3.0),
        )
        loss, (dhidden, dweight) = half.gradients(backend, options=options)
        halves += loss
        weight_grad += dweight
        torch.testing.assert_close(dhidden, grads[0][tokens], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(halves, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight_grad, grads[1], rtol=1e-12, atol=1e-14)


@BACKENDS
def test_counts_are_divisors_whatever_their_size(backend):
    # An average over processes can be below one: h = 2 over half a pair and half a prompt.
    shape = {"candidate_lengths": [1, 1], "candidates_per_prompt": [2]}
    for reduction in ("sum", "distance_mean", "pair_mean"):
        options = CLHAOptions(reduction=reduction)
        result = rank(backend, [-1.0, -2.0], options, pair_counts=[0.5], prompt_count=0.5, **shape)
        assert result.loss == pytest.approx(2 / 0.5 + 0.05 / 0.5)


@BACKENDS
@pytest.mark.parametrize("preset", ["published", "paper"])
def test_dropping_inert_candidates_changes_nothing(backend, preset):
    # By hand: leads beyond 3 are (0, 2) in the first prompt; the second's target is gated, all its leads are small.
    case = make_case([2, 3, 1, 2, 2, 3], [3, 3]).replace(rewards=torch.tensor([4.0, 2.0, 0.0, -1.0, -2.0, -3.0]))
    inert = [False, True, False, True, True, True]
    owner = torch.arange(6).repeat_interleave(case.candidate_lengths)
    here = ~torch.tensor(inert)[owner]
    dropped = case.replace(
        hidden=case.hidden[here],
        targets=case.targets[here],
        candidate_lengths=case.candidate_lengths.masked_fill(torch.tensor(inert), 0),
    )
    options = CLHAOptions.preset(preset)
    full, (dhidden, dweight) = case.gradients(backend, options=options)
    less, (dhidden_less, dweight_less) = dropped.gradients(backend, options=options)
    assert full.item() > 0
    torch.testing.assert_close(less, full, rtol=1e-14, atol=0)
    torch.testing.assert_close(dhidden_less, dhidden[here], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dweight_less, dweight, rtol=1e-12, atol=1e-15)
    assert torch.count_nonzero(dhidden[~here]) == 0


@BACKENDS
@pytest.mark.parametrize("seed", range(12))
def test_against_plain_python(backend, seed):
    """Ragged batches, every option, every metric; sums of log-probabilities are the oracle's only inputs."""
    random_ = random.Random(seed)
    options = CLHAOptions(
        margin=random_.choice([0.0, 0.3, 3.0]),
        reward_margin=random_.choice([0.0, 1.0, 3.0]),
        noise_rule=random_.choice(["abs", "signed", "none"]),
        reduction=random_.choice(["sum", "distance_mean", "pair_mean"]),
        rank_weight=random_.choice([1.0, 0.7]),
        sft=random_.choice(["sum", "mean"]),
        sft_weight=random_.choice([0.05, 1.0]),
        sft_factor=random_.choice(["squared", "one"]),
        reward_floor=random_.choice([0.0, 1.0, -math.inf]),
    )
    sizes = [random_.randint(1, 7) for _ in range(random_.randint(1, 5))]
    lengths = [random_.choice([0, 1, 1, 2, 5]) for _ in range(sum(sizes))]
    logps = [-random_.choice([0.5, 1.0, 2.5, 4.0, 6.5]) for _ in range(sum(lengths))]
    # Half-integers: leads at the reward margin exactly, and ties.
    rewards = [random_.randint(-12, 12) / 2 for _ in lengths] if seed % 4 else None
    sft_index = [random_.randrange(size) for size in sizes] if seed % 3 else None
    ranking = {"candidate_lengths": lengths, "candidates_per_prompt": sizes, "sft_index": sft_index}
    ranking["rewards"] = None if rewards is None else torch.tensor(rewards)
    result = rank(backend, logps, options, **ranking)

    edges = [sum(lengths[:c]) for c in range(len(lengths) + 1)]
    sums = [math.fsum(logps[a:b]) for a, b in itertools.pairwise(edges)]
    expected = plain_loss(sums, lengths, sizes, options, rewards, sft_index)
    assert result.loss == pytest.approx(expected["loss"], rel=1e-12, abs=1e-12)

    kept = expected["kept_pairs"]
    shares = {
        "rank_loss": (expected["rank_loss"], 1),
        "sft_loss": (expected["sft_loss"], 1),
        "rewards/margins": (expected["margin_sum"], kept),
        "logps/chosen": (expected["chosen_sum"], kept),
        "logps/rejected": (expected["rejected_sum"], kept),
        "kept_pair_share": (kept, expected["total_pairs"]),
        "open_gate_share": (expected["open_gates"], expected["prompts"]),
        "num_tokens": (expected["scored_tokens"], 1),
    }
    for name, (top, bottom) in shares.items():
        value = top / bottom if bottom else math.nan
        assert result.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name
