"""Routed gradients of the torch backend: what is left out is bounded, counted and nothing else changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from clha_fast import CLHAOptions, HeadOptions, linear_clha_loss, reference, token_logps
from clha_fast.backends.torch import backend as torch_backend
from clha_fast.backends.torch.routing import kept_blocks
from clha_fast.options import ROUTE_WORDS
from clha_fast.types import HeadInputs, Needs, RankingInputs
from tests.support.helpers import IGNORE, Case, make_case

PUBLISHED = CLHAOptions.preset("published")
PAPER = CLHAOptions.preset("paper")
HEADS = {
    "plain": HeadOptions(),
    "scale and temperature": HeadOptions(scale=0.8, temperature=0.6),
    "softcap": HeadOptions(softcap=6.0),
}
# Words of a peaked softmax: blocks 0 to 4, the last of 88 words.
WORDS = 4 * ROUTE_WORDS + 88
DROPS = (0.0, 1e-3, 0.05, 0.3, 0.9)


def peaked_case(dtype=torch.float64, seed=0, lengths=(3, 5, 0, 4, 6, 2), sizes=(3, 1, 2), **changes) -> Case:
    settings = {"hidden_size": 12, "vocab_size": WORDS, "weight_scale": 0.8, "rows": 9, "ignored": 0.1}
    return make_case(lengths, sizes, dtype=dtype, seed=seed, bias=True, rewards=True, **{**settings, **changes})


def zipf_case(dtype=torch.float64) -> Case:
    """Logits fall with a word's place through a coordinate that all hidden states share: 16 blocks, the last of 80."""
    case = make_case([30, 20, 30], [3], dtype=torch.float64, hidden_size=24, vocab_size=2000, rewards=True)
    weight, hidden = case.weight * 0.13, case.hidden * 5.0
    hidden[:, 0] = 8.0
    weight[:, 0] = torch.arange(1, 2001).double().log() * (-1.69 / 8)
    targets = (hidden @ weight.T).argmax(1)
    return case.replace(weight=weight.to(dtype), hidden=hidden.to(dtype), targets=targets)


def logits(case: Case, head: HeadOptions) -> torch.Tensor:
    rows = case.hidden if case.row_index is None else case.hidden[case.row_index]
    return reference.logits(
        rows.double(), case.weight.double(), None if case.bias is None else case.bias.double(), head
    )


def plain_route(case: Case, head: HeadOptions, dropped_mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept [N, blocks], masses [N, blocks]) in plain loops over float64 softmaxes."""
    probabilities = logits(case, head).softmax(-1)
    masses = torch.stack([part.sum(-1) for part in probabilities.split(ROUTE_WORDS, dim=1)], dim=1)
    kept = torch.ones_like(masses, dtype=torch.bool)
    for t, row in enumerate(masses):
        left, own = 0.0, int(case.targets[t]) // ROUTE_WORDS if case.targets[t] != IGNORE else -1
        for block in row.argsort().tolist():
            if block == own:
                continue
            left += float(row[block])
            if left > dropped_mass:
                break
            kept[t, block] = False
    return kept, masses


def plain_gradients(
    case: Case, head: HeadOptions, route: tuple[torch.Tensor, torch.Tensor], upstream: torch.Tensor, means: bool = True
) -> list[torch.Tensor]:
    """Gradients of sum_t upstream_t * logp_t over the kept pairs, by autograd; then dhidden's means of the others."""
    kept, masses = route
    case = case.to(torch.float64)
    leaves = case.leaves()
    rows = case.hidden if case.row_index is None else case.hidden[case.row_index]
    z = reference.logits(rows, case.weight, case.bias, head)
    lse = z.detach().logsumexp(1)
    scored = case.targets != IGNORE
    upstream = torch.where(scored, upstream.double(), 0.0)
    slope = z.detach().softmax(-1)
    slope = torch.nn.functional.one_hot(torch.where(scored, case.targets, 0), z.shape[1]) - slope
    keep = kept.repeat_interleave(ROUTE_WORDS, dim=1)[:, : z.shape[1]]
    slope = torch.where(keep & scored.unsqueeze(1), slope, 0.0) * upstream.unsqueeze(1)
    gradients = list(torch.autograd.grad(z, leaves, slope))
    if means:
        row = range(len(scored)) if case.row_index is None else case.row_index.tolist()
        for block, words in enumerate(case.weight.detach().split(ROUTE_WORDS)):
            for t in (~kept[:, block] & scored & (upstream != 0)).nonzero().flatten().tolist():
                size = float(upstream[t] * masses[t, block]) * head.scale / head.temperature
                if head.softcap is not None:
                    logit = float(lse[t] + (masses[t, block] / len(words)).log()) * head.temperature
                    size *= 1 - (logit / head.softcap) ** 2
                gradients[0][row[t]] -= size * words.mean(0)
    return gradients


def routed_gradients(case: Case, head: HeadOptions, upstream: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    case = case.to(case.hidden.dtype)
    leaves = case.leaves()
    arguments = {"bias": case.bias, "row_index": case.row_index, "head": head, "backend": "torch"}
    logps = token_logps(case.hidden, case.weight, case.targets, **arguments)
    return logps.detach(), list(torch.autograd.grad(logps, leaves, upstream.to(logps.dtype)))


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", [None, 9])
def test_gradients_are_exactly_those_of_the_kept_blocks(head, drop, rows):
    case = peaked_case(rows=rows)
    upstream = torch.linspace(-1, 2, len(case.targets), dtype=torch.float64)
    upstream[::5] = 0
    kept, masses = route = plain_route(case, head, drop)
    logps, gradients = routed_gradients(case, head.replace(max_dropped_mass=drop), upstream)
    expected_logps, _ = routed_gradients(case, head, upstream)
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=0)
    assert bool((torch.where(kept, 0.0, masses).sum(1) <= drop).all())
    for gradient, expected in zip(gradients, plain_gradients(case, head, route, upstream), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("drop", DROPS[2:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_bounded(dtype, drop):
    """|error of dhidden_t| <= |c_t| * sum of m_tb * max |w_v - wbar_b| * scale / temperature; some error there is."""
    head = HEADS["scale and temperature"]
    # What the dtype holds, in float64: the dtype's own rounding comes last.
    case = peaked_case(dtype=dtype, rows=None).to(torch.float64)
    upstream = torch.linspace(-1, 2, len(case.targets), dtype=torch.float64)
    _, exact = routed_gradients(case, head, upstream)
    _, routed = routed_gradients(case, head.replace(max_dropped_mass=drop), upstream)
    error = (routed[0] - exact[0]).norm(dim=1)
    kept, masses = plain_route(case, head, drop)
    spread = torch.stack([(words - words.mean(0)).norm(dim=1).max() for words in case.weight.split(ROUTE_WORDS)])
    bound = upstream.abs() * (torch.where(kept, 0.0, masses) @ spread) * head.scale / head.temperature
    assert (error <= bound + 1e-12).all()
    assert error.max() > 0.01 * bound.max()
    _, routed = routed_gradients(case.to(torch.float32), head.replace(max_dropped_mass=drop), upstream)
    _, narrow = routed_gradients(case.to(dtype), head.replace(max_dropped_mass=drop), upstream)
    for got, want in zip(narrow, routed, strict=True):
        assert (got.float() - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("drop", DROPS[1:])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", [None, 9])
def test_blocks_of_equal_rows_lose_nothing(head, drop, rows):
    """Every row of a block is its mean, every logit of it the logit of its mean: dhidden is exact for any d."""
    case = peaked_case(rows=rows, hidden_size=3, weight_scale=1.5)
    weight, bias = (
        torch.cat([part[:1].expand_as(part) for part in t.split(ROUTE_WORDS)]) for t in (case.weight, case.bias)
    )
    case = case.replace(weight=weight, bias=bias)
    upstream = torch.linspace(-1, 2, len(case.targets), dtype=torch.float64)
    route = plain_route(case, head, drop)
    assert not route[0].all()
    _, exact = routed_gradients(case, head, upstream)
    _, routed = routed_gradients(case, head.replace(max_dropped_mass=drop), upstream)
    torch.testing.assert_close(routed[0], exact[0], rtol=1e-11, atol=1e-12)
    without = plain_gradients(case, head, route, upstream, means=False)
    assert (without[0] - exact[0]).norm() > 1e-5 * exact[0].norm()


@pytest.mark.parametrize("drop", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_rows_of_a_block_have_in_common_is_not_lost(dtype, drop):
    """Words sorted by frequency, which one coordinate carries: with the means dhidden is three times as close."""
    case = zipf_case(dtype)
    upstream = torch.linspace(-1, 2, len(case.targets), dtype=torch.float64)
    route = plain_route(case, HEADS["plain"], drop)
    assert 0.03 < route[0].double().mean() < 0.85
    _, exact = routed_gradients(case.to(torch.float64), HEADS["plain"], upstream)
    _, routed = routed_gradients(case, HeadOptions(max_dropped_mass=drop), upstream)
    without = plain_gradients(case, HEADS["plain"], route, upstream, means=False)
    errors = [float((dhidden.double() - exact[0]).norm() / exact[0].norm()) for dhidden in (routed[0], without[0])]
    assert errors[0] < errors[1] / 3, errors


def test_means_of_what_has_no_mass_add_nothing():
    """d = 0 forms no means; a d too small for any block, or for more than blocks of mass 0, gives the same bits."""
    case = peaked_case(dtype=torch.float32)
    bias = case.bias.clone()
    bias[ROUTE_WORDS : 2 * ROUTE_WORDS] = -math.inf
    for bias_now in (case.bias, bias):
        now = case.replace(bias=bias_now, targets=case.targets.clamp(max=ROUTE_WORDS - 1))
        upstream = torch.linspace(-1, 2, len(now.targets))
        _, nothing = routed_gradients(now, HeadOptions(max_dropped_mass=0.0), upstream)
        _, little = routed_gradients(now, HeadOptions(max_dropped_mass=1e-30), upstream)
        for a, b in zip(nothing, little, strict=True):
            assert torch.equal(a, b)


def test_a_token_without_a_gradient_is_not_multiplied_by_zero():
    """The prompt of one candidate has the coefficient 0: its NaN reaches no gradient, by means neither."""
    case = peaked_case(rows=None, ignored=0.0, dtype=torch.float32)
    case.hidden[9] = math.nan
    head = HeadOptions(max_dropped_mass=0.5)
    result, gradients = torch_backend.loss_sweep(case.head, case.ranking, head, PAPER, Needs(True, True, True))
    assert (result.slopes[9:12] == 0).all()
    assert result.scores[3].isnan()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("options", [PUBLISHED, PAPER], ids=["published", "paper"])
@pytest.mark.parametrize("words", [1, 100, ROUTE_WORDS, ROUTE_WORDS + 1, WORDS])
def test_nothing_dropped_is_the_exact_loss(head, options, words):
    case = peaked_case(vocab_size=words)
    routed = head.replace(max_dropped_mass=0.0)
    loss, gradients = case.gradients("torch", -0.7, head=routed, options=options)
    expected_loss, expected = case.gradients("reference", -0.7, head=head, options=options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)
    _, metrics = case.loss("torch", head=routed, options=options)
    assert metrics.sum_of("kept_blocks") == metrics.sum_of("routable_blocks")
    assert metrics.sum_of("dropped_mass") == 0


@pytest.mark.parametrize("drop", DROPS)
def test_metrics_count_what_is_left_out(drop):
    case = peaked_case()
    head = HEADS["plain"]
    kept, masses = plain_route(case, head, drop)
    scored = case.targets != IGNORE
    exact_loss, exact = case.loss("torch", head=head)
    for needs in (Needs(True, True, True), Needs(False, False, False)):
        result, _ = torch_backend.loss_sweep(
            case.head, case.ranking, head.replace(max_dropped_mass=drop), PUBLISHED, needs
        )
        metrics = exact.__class__(result.metrics, result.scores)
        torch.testing.assert_close(result.loss, exact_loss.detach(), rtol=1e-13, atol=0)
        assert metrics.sum_of("kept_blocks") == kept[scored].sum()
        assert metrics.sum_of("routable_blocks") == kept[scored].numel()
        left_out = torch.where(kept, 0.0, masses)[scored].sum()
        torch.testing.assert_close(metrics.sum_of("dropped_mass").double(), left_out, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(metrics.values[:16], exact.values[:16], rtol=1e-6, atol=0)


def test_the_loss_routes_as_its_log_probabilities_do():
    """Gradients of the loss are those of the kept blocks under the loss's own slopes."""
    case, head = peaked_case(), HEADS["softcap"]
    routed = head.replace(max_dropped_mass=0.1)
    result, gradients = torch_backend.loss_sweep(case.head, case.ranking, routed, PAPER, Needs(True, True, True))
    upstream = result.slopes
    assert (upstream == 0).any()
    route = plain_route(case, head, 0.1)
    for gradient, expected in zip(gradients, plain_gradients(case, head, route, upstream), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


def test_blocks_that_nobody_keeps_get_no_gradient():
    """One token all of whose mass is in block 1, target in block 3: rows of blocks 0, 2 and 4 are exactly zero."""
    weight = torch.zeros(WORDS, 2, dtype=torch.float64)
    weight[ROUTE_WORDS + 5, 0] = 30.0
    hidden = torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    head = HeadOptions(max_dropped_mass=1e-6)
    logps = token_logps(hidden, weight, torch.tensor([3 * ROUTE_WORDS]), head=head, backend="torch")
    (dweight,) = torch.autograd.grad(logps.sum(), weight)
    rows = dweight.abs().sum(1)
    blocks = [bool(part.any()) for part in rows.split(ROUTE_WORDS)]
    assert blocks == [False, True, False, True, False]
    # The target's own gradient is 1 - p, p about exp(-30); its word was far below the threshold.
    assert dweight[3 * ROUTE_WORDS, 0] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_token_keeps_everything(value):
    case = peaked_case(rows=None, ignored=0.0, dtype=torch.float32)
    case.hidden[1, 0] = value
    head = HeadOptions(max_dropped_mass=0.5)
    result, gradients = torch_backend.loss_sweep(case.head, case.ranking, head, PAPER, Needs(True, True, True))
    assert result.loss.isnan()
    assert gradients.hidden is not None
    assert gradients.weight is not None
    assert gradients.hidden.isnan().any(1).nonzero().flatten().tolist() == [1]
    assert gradients.hidden[1].isnan().all()
    assert gradients.weight.isnan().all()  # every block has the NaN token
    kept, _ = plain_route(case.replace(hidden=case.hidden[2:], targets=case.targets[2:]), HEADS["plain"], 0.5)
    assert not kept.all()


def test_masked_words_drop_first():
    """A block of -inf logits alone has mass 0 and is left out even at d = 0; the loss is still finite."""
    case = peaked_case(ignored=0.0)
    bias = case.bias.clone()
    bias[ROUTE_WORDS : 2 * ROUTE_WORDS] = -math.inf
    targets = torch.where((case.targets >= ROUTE_WORDS) & (case.targets < 2 * ROUTE_WORDS), 0, case.targets)
    case = case.replace(bias=bias, targets=targets)
    head = HeadOptions(max_dropped_mass=0.0)
    loss, gradients = case.gradients("torch", head=head)
    expected_loss, expected = case.gradients("reference")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)
    _, metrics = case.loss("torch", head=head)
    tokens = int((case.targets != IGNORE).sum())
    assert metrics.sum_of("kept_blocks") == metrics.sum_of("routable_blocks") - tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(dtype):
    case = peaked_case(dtype=dtype, lengths=[40] * 6)
    head = HeadOptions(max_dropped_mass=0.05)
    first, second = case.gradients("torch", 0.3, head=head), case.gradients("torch", 0.3, head=head)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_asked_for(needs):
    case, head = peaked_case(), HeadOptions(max_dropped_mass=0.1)
    _, everything = torch_backend.loss_sweep(case.head, case.ranking, head, PAPER, Needs(True, True, True))
    _, some = torch_backend.loss_sweep(case.head, case.ranking, head, PAPER, Needs(*needs))
    for need, got, want in zip(needs, some, everything, strict=True):
        assert (got is not None) == need
        if need:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
def test_poisoned_memory_stays_out():
    case, head = peaked_case(), HeadOptions(max_dropped_mass=0.9)
    kept, _ = route = plain_route(case, HeadOptions(), 0.9)
    assert not kept.any(0).all() or kept.float().mean() < 0.6
    upstream = torch.ones(len(case.targets), dtype=torch.float64)
    _, gradients = routed_gradients(case, head, upstream)
    for gradient, expected in zip(gradients, plain_gradients(case, HeadOptions(), route, upstream), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


def test_the_targets_block_takes_nothing_of_the_bound():
    """Masses 0.3 (the target's), 0.5 and 0.2: at d = 0.75 both others go, which with the 0.3 would be too much."""
    masses = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    weight = (masses / ROUTE_WORDS).log().repeat_interleave(ROUTE_WORDS).unsqueeze(1)
    head = HeadOptions(max_dropped_mass=0.75)
    inputs = HeadInputs(torch.ones(1, 1, dtype=torch.float64), weight, None, torch.tensor([5]), None)
    ranking = RankingInputs(torch.tensor([1]), torch.tensor([1]), None, None, None, None)
    result, _ = torch_backend.loss_sweep(inputs, ranking, head, PUBLISHED, Needs(True, True, False))
    assert result.metrics[-3:].tolist() == pytest.approx([1, 3, 0.7])


def test_no_tokens():
    case = make_case([0, 0], [2], vocab_size=WORDS, bias=True)
    loss, gradients = case.gradients("torch", head=HeadOptions(max_dropped_mass=0.1))
    assert loss == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


def test_equal_masses_are_not_dropped_past_the_bound():
    """Five equal blocks of 0.2 and d = 0.5: two would fit, but one threshold cannot tell them from the others."""
    assert kept_blocks(torch.full((5, 1), 0.2), 0.5).all()
    # 0.05 and 0.1 go, 0.2 would make it 0.35.
    masses = torch.tensor([[0.65], [0.1], [0.2], [0.05]])
    assert kept_blocks(masses, 0.3).flatten().tolist() == [True, False, True, False]
    # The heaviest stays for any d, even where rounding leaves the sum below it.
    assert kept_blocks(torch.tensor([[0.3], [0.6]]), 0.95).flatten().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_dropped_meets_the_accuracy_bar(dtype):
    """spec.md's bar: no error beyond 1.05 times that of the eager loss in the dtype, both against float64."""
    squares = torch.zeros(2, 4)
    for seed in range(4):
        case = peaked_case(lengths=[40, 23, 57, 31, 48, 60], weight_scale=0.3, hidden_size=96, seed=seed, rows=None)
        case = case.replace(rewards=torch.tensor([6.0, 2.0, -2.0, 5.0, -1.0, 1.0])).to(dtype)
        exact_loss, exact = case.to(torch.float64).gradients("reference")
        for total, backend, head in (
            (squares[0], "torch", HeadOptions(max_dropped_mass=0.0)),
            (squares[1], "reference", HeadOptions()),
        ):
            loss, gradients = case.gradients(backend, head=head)
            pairs = zip([loss, *gradients], [exact_loss, *exact], strict=True)
            total += torch.tensor([float((g.double() - e).norm() / e.norm()) ** 2 for g, e in pairs]) / 4
    ours, eager = squares.sqrt()
    allowed = 1.05 * eager
    allowed[0] = max(float(allowed[0]), 2.0**-24)  # half a unit in the last place of a float32 result
    assert (ours <= allowed).all(), (ours / eager, eager)


def test_a_loss_twice_the_size_drops_the_same():
    """What is left out depends on the softmax, not on the size of the upstream gradient."""
    case, head = peaked_case(), HeadOptions(max_dropped_mass=0.05)
    leaves = case.leaves()
    loss, _ = linear_clha_loss(**case.arguments(), head=head, backend="torch")
    once = torch.autograd.grad(loss, leaves, torch.tensor(1.0, dtype=loss.dtype))
    loss, _ = linear_clha_loss(**case.arguments(), head=head, backend="torch")
    twice = torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=loss.dtype))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rows", [None, 5], ids=["own rows", "shared rows"])
def test_autocast_takes_its_dtype(rows):
    """The sweep runs under autocast: its own float32 products must stay what they are."""
    case, head = peaked_case(torch.float32, rows=rows), HeadOptions(max_dropped_mass=0.01)
    loss, expected = case.to(torch.bfloat16).gradients(head=head)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        cast_loss = case.loss(head=head)[0]
        assert torch.equal(cast_loss, loss)
        gradients = torch.autograd.grad(cast_loss, leaves)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, wanted.float())
