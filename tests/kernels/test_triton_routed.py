"""The routed backward: which pairs are kept, gradients over exactly those, and d = 0 as good as the dense path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clha_fast import functional
from clha_fast.backends.triton import backend as triton_backend
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.options import ROUTE_WORDS, HeadOptions
from clha_fast.types import Needs, RankingInputs
from tests.support.parameters import covered
from tests.support.triton_harness import (
    DEVICE,
    NAMED_DTYPES,
    NAMED_HALVES,
    PLAIN,
    RICH,
    Problem,
    both_halves,
    eager_gradients,
    error,
    every_dtype,
    forward,
    gradients,
    loss,
    problem,
)

KEEP_ALL = PLAIN.replace(max_dropped_mass=0.0)
PERCENT = PLAIN.replace(max_dropped_mass=1e-2)


def peaked(tokens: int = 40, vocabulary: int = 450, width: int = 24, factor: float = 6.0, **more: object) -> Problem:
    """A problem whose softmax has most of its mass in few of its four blocks, the last of them not whole."""
    p = problem(tokens, vocabulary, width, **{"head": PERCENT, **more})  # type: ignore[arg-type]
    p.weight *= factor * 0.3
    return p


def upstream(p: Problem, seed: int = 1) -> Tensor:
    return torch.randn(p.targets.shape[0], generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def all_logps(p: Problem) -> tuple[list[Tensor], Tensor, Tensor]:
    """Float64 (leaves, raw logits, log-probabilities of every word [N, V])."""
    leaves = p.leaves(torch.float64)
    rows = leaves[0] if p.row_index is None else leaves[0][p.row_index]
    raw = rows @ leaves[1].T + (leaves[2] if p.bias is not None else 0)
    z = raw * p.head.scale
    if p.head.softcap is not None:
        z = p.head.softcap * torch.tanh(z / p.head.softcap)
    return leaves, raw, (z / p.head.temperature).log_softmax(1)


def by_block(values: Tensor) -> Tensor:
    """[N, V] -> [blocks, N, ROUTE_WORDS], zeros behind the last word."""
    missing = -values.shape[1] % ROUTE_WORDS
    return torch.nn.functional.pad(values, (0, missing)).unflatten(1, (-1, ROUTE_WORDS)).transpose(0, 1)


def keeps(p: Problem) -> Tensor:
    """[blocks, N] bool: the pairs that the forward's route keeps."""
    return ~(forward(p).route <= 0)


def kept_pairs(p: Problem, most: float) -> Tensor:
    """[blocks, N] bool, by sorting each token's masses: the rule as it is written down."""
    mass = by_block(all_logps(p)[2].detach().exp()).sum(2)
    scored = p.targets != p.head.ignore_index
    own = torch.arange(mass.shape[0], device=DEVICE)[:, None] == p.targets[None, :] // ROUTE_WORDS
    weight = torch.where(own, float("inf"), mass)
    ascending, order = weight.sort(0)
    dropped = torch.zeros_like(own).scatter(0, order, ascending.cumsum(0) <= most)
    return ~dropped & scored


def routed_gradients(p: Problem, grad: Tensor, kept: Tensor, means: bool = True) -> list[Tensor]:
    """Float64 gradients over the kept pairs by hand: dlogits masked, then products; dhidden's means of the others."""
    leaves, raw, logps = all_logps(p)
    scored = p.targets != p.head.ignore_index
    picked = logps.gather(1, torch.where(scored, p.targets, 0)[:, None])[:, 0]
    (dz,) = torch.autograd.grad((picked * torch.where(scored, grad, 0).double()).sum(), raw, retain_graph=True)
    words = torch.arange(p.weight.shape[0], device=DEVICE)
    dz = torch.where(kept.T[:, words // ROUTE_WORDS], dz, 0.0)
    values = list(torch.autograd.grad(raw, leaves, dz))
    if means:
        values[0] += mean_part(p, torch.where(scored, grad, 0).double(), ~kept & scored)
    return values


def mean_part(p: Problem, grad: Tensor, dropped: Tensor) -> Tensor:
    """Float64 [rows, H]: -grad * mass * slope of the softcap * mean row, over each token's dropped blocks."""
    leaves, raw, logps = all_logps(p)
    mass = by_block(logps.detach().exp()).sum(2)
    factor, slope = p.head.scale / p.head.temperature, torch.ones_like(mass)
    if p.head.softcap is not None:
        z = p.head.softcap * torch.tanh(raw.detach() * p.head.scale / p.head.softcap) / p.head.temperature
        words = by_block(torch.ones_like(z)).sum(2)
        mean_logit = by_block(z.exp()).sum(2).div(words).log() * p.head.temperature
        slope = 1 - (mean_logit / p.head.softcap) ** 2
    share = torch.where(dropped & (grad != 0), mass * slope, 0.0) * grad * -factor
    means = torch.stack([part.mean(0) for part in p.weight.double().split(ROUTE_WORDS)])
    row = torch.arange(grad.shape[0], device=DEVICE) if p.row_index is None else p.row_index
    return torch.zeros_like(leaves[0]).detach().index_add(0, row, share.T @ means)


def close(value: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    size = 1 + float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(value.double(), wanted, rtol=0, atol=tolerance * size)


def test_three_blocks_by_hand() -> None:
    # Three blocks of one hot word each with probabilities about (0.9, 0.09, 0.009 + rest): logits of the others -30.
    weight = torch.full((3 * ROUTE_WORDS, 1), -30.0, device=DEVICE)
    share = torch.tensor([0.901, 0.09, 0.009], dtype=torch.float64)
    weight[[5, ROUTE_WORDS, 2 * ROUTE_WORDS + 7], 0] = share.log().float().to(DEVICE)
    hidden = torch.ones(4, 1, device=DEVICE)
    targets = torch.tensor([5, 5, 5, 2 * ROUTE_WORDS], device=DEVICE)
    for most, kept in [(0.0, [3, 3, 3, 3]), (0.0095, [2, 2, 2, 3]), (0.0995, [1, 1, 1, 2]), (0.95, [1, 1, 1, 2])]:
        head = PLAIN.replace(max_dropped_mass=most)
        route = forward(Problem(hidden, weight, None, targets, None, head)).route
        assert route.shape == (3, 4)
        assert (route > 0).sum(0).tolist() == kept, most
        # The masses are there for pairs that are left out, too.
        masses = share.float()[:, None].expand(3, 4)
        torch.testing.assert_close(route.abs().cpu(), masses, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("most", "head"), [(0.0, PLAIN), (1e-3, RICH), (0.05, PLAIN), (0.5, RICH)], ids=str)
def test_the_rule_of_what_is_kept(most: float, head: HeadOptions) -> None:
    p = peaked(30, head=head.replace(max_dropped_mass=most), ignored=0.1, bias=True, rows=11)
    assert torch.equal(keeps(p), kept_pairs(p, most))
    values = []
    for backend in ("triton", "torch"):
        _, metrics = functional.linear_clha_loss(
            p.hidden,
            p.weight,
            p.targets,
            torch.tensor([30]),
            torch.tensor([1]),
            bias=p.bias,
            row_index=p.row_index,
            head=p.head,
            backend=backend,  # type: ignore[arg-type]
        )
        values.append(metrics.values[-3:].cpu())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bias", "rows", "workspace_bytes", "head"),
    covered({"own rows": (True, None, None), "shared rows": (True, 11, 1)}, {"plain": PLAIN, "rich": RICH}),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_over_the_kept_pairs(
    bias: bool, rows: int | None, head: HeadOptions, workspace_bytes: int | None
) -> None:
    head = head.replace(max_dropped_mass=0.02, workspace_bytes=workspace_bytes)
    p = peaked(50, head=head, bias=bias, rows=rows, ignored=0.2, factor=2.0)
    kept = kept_pairs(p, 0.02)
    assert 0.1 < float(kept.float().mean()) < 0.9
    # A logit's rounding error is multiplied by the head's slope, and what it does to the gradient once more.
    tolerance = 1e-6 * max(1.0, head.scale / head.temperature) ** 2
    wanted = routed_gradients(p, upstream(p), kept)
    for value, exact in zip([g for g in gradients(p, upstream(p)) if g is not None], wanted, strict=True):
        close(value, exact, tolerance)


def equal_rows(p: Problem) -> Problem:
    """The problem with every block's rows and biases made its first: each row is its block's mean."""
    for t in (p.weight, p.bias):
        for part in () if t is None else t.split(ROUTE_WORDS):
            part[:] = part[:1].clone()
    return p


@pytest.mark.parametrize(
    ("most", "head", "dtype"),
    covered({"little": (0.02, PLAIN), "most": (0.9, PLAIN), "rich": (0.1, RICH)}, NAMED_DTYPES),
)
@pytest.mark.usefixtures("bfloat16_kernels", "poisoned_memory")
def test_blocks_of_equal_rows_lose_nothing(most: float, head: HeadOptions, dtype: torch.dtype) -> None:
    """dhidden is the exact gradient whatever is left out: there is nothing but means."""
    head = head.replace(max_dropped_mass=most)
    p = equal_rows(peaked(30, width=5, dtype=dtype, head=head, bias=True, rows=11, ignored=0.1))
    grad = upstream(p)
    kept = keeps(p)
    exact = eager_gradients(p, grad, torch.float64)[0]
    value = gradients(p, grad)[0]
    assert value is not None
    assert error(value, exact) <= 1.05 * error(eager_gradients(p, grad, dtype)[0], exact)
    assert error(routed_gradients(p, grad, kept, means=False)[0], exact) > 2e-3


@pytest.mark.parametrize(("dtype", "most"), covered(NAMED_DTYPES, {"little": 1e-2, "more": 1e-1}))
@pytest.mark.usefixtures("bfloat16_kernels")
def test_what_rows_of_a_block_have_in_common_is_not_lost(most: float, dtype: torch.dtype) -> None:
    """Words sorted by frequency, which one coordinate carries: with the means dhidden is three times as close."""
    p = peaked(30, 1100, 24, factor=1.5, dtype=dtype, head=PLAIN.replace(max_dropped_mass=most))
    p.hidden *= 4
    p.hidden[:, 0] = 8
    p.weight[:, 0] = torch.arange(1, 1101, device=DEVICE).log() * (-1.69 / 8)
    p.targets = (p.hidden.double() @ p.weight.double().T).argmax(1)
    grad = upstream(p)
    kept = keeps(p)
    exact = eager_gradients(p, grad, torch.float64)[0]
    value = gradients(p, grad)[0]
    assert value is not None
    assert error(value, exact) < error(routed_gradients(p, grad, kept, means=False)[0], exact) / 3


@pytest.mark.parametrize(
    ("tokens", "width", "scale", "dtype"),
    covered({"parts": (50, 200, 1.0), "many parts": (2, 2200, 1.0), "large": (20, 5, 600.0)}, NAMED_HALVES),
)
@pytest.mark.usefixtures("bfloat16_kernels")
def test_means_in_parts_and_out_of_range_of_float16(tokens: int, width: int, scale: float, dtype: torch.dtype) -> None:
    """A workspace that holds masses and products of some tokens, of none, and sums of rows beyond 65504."""
    head = PLAIN.replace(max_dropped_mass=0.9, workspace_bytes=1)
    p = equal_rows(problem(tokens, 2 * ROUTE_WORDS + 9, width, dtype=dtype, head=head))
    p.weight *= scale
    p.hidden *= 8 / (width**0.5 * scale)
    grad = torch.ones_like(upstream(p))
    assert not keeps(p).all()
    value = gradients(p, grad, (True, False, False))[0]
    assert value is not None
    exact = eager_gradients(p, grad, torch.float64)[0]
    assert error(value, exact) <= 1.05 * error(eager_gradients(p, grad, dtype)[0], exact)


def test_means_of_what_has_no_mass_add_nothing() -> None:
    """d = 0 forms no means; a d that only blocks of mass 0 are within gives the same bits."""
    p = peaked(20, bias=True)
    assert p.bias is not None
    p.bias[ROUTE_WORDS : 2 * ROUTE_WORDS] = float("-inf")
    p.targets %= ROUTE_WORDS
    p.head = KEEP_ALL
    nothing = gradients(p, upstream(p))
    p.head = PLAIN.replace(max_dropped_mass=1e-30)
    for value, wanted in zip(gradients(p, upstream(p)), nothing, strict=True):
        assert value is not None
        assert wanted is not None
        assert torch.equal(value, wanted)
    none = gradients(problem(0, 300, 8, head=PERCENT), torch.zeros(0, device=DEVICE))
    assert [tuple(value.shape) for value in none[:2] if value is not None] == [(0, 8), (300, 8)]


@settings(max_examples=5)
@given(
    tokens=st.integers(0, 40),
    vocabulary=st.integers(1, 400),
    width=st.integers(1, 36),
    bias=st.booleans(),
    rows=st.none() | st.integers(1, 9),
    skipped=st.sampled_from([0.0, 0.6, 1.1]),
    workspace_bytes=st.sampled_from([None, 1]),
    seed=st.integers(0, 99),
)
def test_keeping_all_is_exact(
    tokens: int,
    vocabulary: int,
    width: int,
    bias: bool,
    rows: int | None,
    skipped: float,
    workspace_bytes: int | None,
    seed: int,
) -> None:
    head = KEEP_ALL.replace(workspace_bytes=workspace_bytes)
    p = problem(tokens, vocabulary, width, bias=bias, rows=rows, head=head, ignored=0.1, seed=seed)
    skip = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < skipped
    grad = torch.where(skip.to(DEVICE), 0, upstream(p, seed))
    for value, wanted in zip(
        [g for g in gradients(p, grad) if g is not None], eager_gradients(p, grad, torch.float64), strict=True
    ):
        close(value, wanted)


@every_dtype
def test_keeping_all_is_no_worse_than_the_eager_path(dtype: torch.dtype) -> None:
    p = problem(50, 300, 64, dtype=dtype, head=KEEP_ALL.replace(workspace_bytes=1), bias=True)
    grad = upstream(p)
    exact = eager_gradients(p, grad, torch.float64)
    for value, eager, wanted in zip(gradients(p, grad), eager_gradients(p, grad, dtype), exact, strict=True):
        assert value is not None
        assert error(value, wanted) <= 1.05 * error(eager, wanted)


@pytest.mark.usefixtures("poisoned_memory")
def test_a_block_that_nobody_keeps_has_no_gradient() -> None:
    p = peaked(20, head=PLAIN.replace(max_dropped_mass=0.9), bias=True)
    p.targets[:] = torch.arange(20, device=DEVICE) % ROUTE_WORDS + ROUTE_WORDS
    p.bias[ROUTE_WORDS : 2 * ROUTE_WORDS] += 40  # type: ignore[index]
    _, dweight, dbias = gradients(p, upstream(p))
    assert dweight is not None
    assert dbias is not None
    others = torch.arange(450, device=DEVICE) // ROUTE_WORDS != 1
    assert (dweight[others] == 0).all()
    assert (dbias[others] == 0).all()
    assert (dweight[~others] != 0).any(1).all()


@pytest.mark.usefixtures("poisoned_memory")
def test_tokens_without_a_gradient_keep_nothing() -> None:
    p = peaked(36, 300)
    grad = upstream(p)
    grad[::2] = 0
    route = forward(p).route
    wanted = routed_gradients(p, grad, route > 0)
    p.hidden[::2] = float("nan")  # Not multiplied by 0: not read.
    _, lse, poisoned = forward(p)
    assert poisoned[:, ::2].isnan().all()
    for masses in (route, poisoned):
        values = triton_backend.token_logps_backward(grad, p.inputs, lse, masses, p.head, Needs(True, True, False))
        for value, exact in zip(values[:2], wanted, strict=True):
            assert value is not None
            close(value, exact)
    none = triton_backend.token_logps_backward(grad * 0, p.inputs, lse, route, p.head, Needs(True, True, False))
    for value in none[:2]:
        assert value is not None
        assert (value == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_keeps_everything(poison: float) -> None:
    p = peaked(20, 300)
    p.hidden[5, 3] = poison
    kept = keeps(p)
    assert kept[:, 5].all()
    assert not kept.all()
    dhidden, dweight, _ = gradients(p, upstream(p))
    assert dhidden is not None
    assert dweight is not None
    assert dweight.isnan().all()
    assert dhidden.isnan().any(1).nonzero().flatten().tolist() == [5]


def test_a_row_that_is_not_finite_stays_out_of_the_blocks_its_token_drops() -> None:
    """A softcap makes a finite softmax of infinite logits; tiles are filled up with the first row, times 0."""
    head = HeadOptions(softcap=5.0, max_dropped_mass=0.1)
    p = problem(10, 3 * ROUTE_WORDS, 1, head=head)
    p.hidden[0], p.hidden[1:] = float("inf"), 0.1
    p.weight[:] = p.weight.abs() + 0.1
    p.weight[ROUTE_WORDS:] *= -1
    p.targets[0] = 3
    kept = keeps(p)
    assert kept[:, 0].tolist() == [True, False, False]
    assert kept[:, 1:].all()
    _, dweight, _ = gradients(p, upstream(p))
    assert dweight is not None
    assert dweight[ROUTE_WORDS:].isfinite().all()


def test_a_target_out_of_range_is_nan() -> None:
    p = peaked(20, 300)
    lse, route = forward(p)[1:]
    p.targets[4] = 300
    _, dweight, _ = triton_backend.token_logps_backward(
        upstream(p), p.inputs, lse, route, p.head, Needs(True, True, False)
    )
    assert dweight is not None
    assert dweight.isnan().any()


def test_masses_of_zero_are_dropped_even_at_zero_but_for_the_target() -> None:
    p = problem(6, 4 * ROUTE_WORDS, 8, bias=True, head=KEEP_ALL)
    assert p.bias is not None
    p.bias[ROUTE_WORDS:] = float("-inf")
    p.targets[:] = torch.tensor([0, 1, 2, 3, 4, 3 * ROUTE_WORDS], device=DEVICE)
    kept = keeps(p)
    assert kept[0].all()
    assert not kept[1:3].any()
    assert kept[3].tolist() == [False] * 5 + [True]


def test_one_token_heavier_than_the_bound_in_every_block() -> None:
    p = problem(10, 4 * ROUTE_WORDS, 8, head=PLAIN.replace(max_dropped_mass=0.2))
    p.weight *= 0.0  # all masses are 1/4
    assert keeps(p).all()
    p.head = PLAIN.replace(max_dropped_mass=0.6)
    # Two of the three others would fit, but equal masses go together.
    assert keeps(p).all()
    p.head = PLAIN.replace(max_dropped_mass=0.75)
    assert (keeps(p).sum(0) == 1).all()


def test_metrics_tell_what_was_left_out() -> None:
    p = peaked(30, ignored=0.2)
    lengths = torch.tensor([10, 12, 0, 8], device=DEVICE)
    r = RankingInputs(lengths, torch.tensor([4], device=DEVICE), torch.tensor([9.0, 5.0, 4.0, 1.0], device=DEVICE))
    result = loss(p, r, PUBLISHED)
    sums = dict(zip(METRIC_NAMES, result.metrics.tolist(), strict=True))
    kept = kept_pairs(p, 1e-2)
    scored = p.targets != p.head.ignore_index
    assert sums["kept_blocks"] == int(kept.sum())
    assert sums["routable_blocks"] == int(scored.sum()) * kept.shape[0]
    mass = by_block(all_logps(p)[2].detach().exp()).sum(2)
    dropped = torch.where(kept, 0, mass).sum(0)[scored]
    assert float(dropped.max()) <= 1e-2
    torch.testing.assert_close(sums["dropped_mass"], float(dropped.sum()), rtol=1e-4, atol=1e-8)
    assert torch.equal(result.route, forward(p).route)
    p.head = PLAIN
    dense = loss(p, r, PUBLISHED)
    assert (dense.metrics[16:] == 0).all()
    # Statistics of narrower blocks add up to the same loss, to rounding.
    torch.testing.assert_close(result.loss, dense.loss, rtol=1e-6, atol=0)


@both_halves
@pytest.mark.usefixtures("poisoned_memory")
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    p = peaked(40, bias=True, rows=9, dtype=dtype, head=RICH.replace(max_dropped_mass=0.05, workspace_bytes=1))
    for first, second in zip(gradients(p, upstream(p)), gradients(p, upstream(p)), strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_only_what_is_needed(needs: tuple[int, int, int]) -> None:
    p = peaked(20, 300, bias=True)
    full = gradients(p, upstream(p))
    for need, value, wanted in zip(needs, gradients(p, upstream(p), needs), full, strict=True):  # type: ignore[arg-type]
        assert (value is not None) == bool(need)
        assert value is None or torch.equal(value, wanted)  # type: ignore[arg-type]


def test_through_autograd_twice() -> None:
    """The route is a saved tensor that no backward may change."""
    p = peaked(20, 300)
    hidden, weight = p.leaves(torch.float32)
    logps = functional.token_logps(hidden, weight, p.targets, head=p.head, backend="triton")
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(logps.sum(), [hidden, weight])
    wanted = routed_gradients(p, torch.ones(20, device=DEVICE), kept_pairs(p, 1e-2))
    for one, other, exact in zip(first, second, wanted, strict=True):
        assert torch.equal(one, other)
        close(one, exact)
