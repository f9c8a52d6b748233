"""The workspace backend: whole prompts at a time, the vendor's products, Triton's passes over the logits in place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from clha_fast import BackendError, CLHAOptions, HeadOptions, linear_clha_loss
from clha_fast.backends.memory import Workspace, padded_width
from clha_fast.backends.triton import softmax as triton_softmax
from clha_fast.backends.triton import workspace as workspace_backend
from clha_fast.backends.triton.head import Head
from clha_fast.layout import Chunk
from clha_fast.objectives.clha import PRESETS, PUBLISHED
from clha_fast.ops.loss import _rounded_product
from clha_fast.types import Factors, Needs
from tests.support.helpers import Case, make_case, rank
from tests.support.parameters import covered
from tests.support.triton_harness import (
    DEVICE,
    NAMED_DTYPES,
    PLAIN,
    RICH,
    both_halves,
    check,
    close,
    eager_gradients,
    error,
    every_dtype,
    forward,
    gradients,
    problem,
    upstream,
)

RAGGED = ([5, 3, 0, 7, 2, 4, 6, 1, 3], [3, 1, 2, 3])
PAPER = PRESETS["paper"]


def on_device(case: Case) -> Case:
    """The head's tensors where kernels run; the ranking's stay on the CPU."""
    names = ("hidden", "weight", "bias", "targets", "row_index")
    return dataclasses.replace(case, **{n: t.to(DEVICE) for n in names if (t := getattr(case, n)) is not None})


@pytest.mark.parametrize(
    ("spread", "head", "workspace_bytes", "dtype"),
    covered({"flat": 0.1, "peaked": 3.0}, {"chunks": (PLAIN, 20_000), "rich": (RICH, None)}, NAMED_DTYPES),
)
@pytest.mark.usefixtures("bfloat16_kernels")
def test_no_worse_than_the_eager_path(
    dtype: torch.dtype, head: HeadOptions, workspace_bytes: int | None, spread: float
) -> None:
    """Flat logits leave nothing but the roundings of gradients and coefficients: a second one would show."""
    p = problem(50, 130, 64, dtype=dtype, head=head.replace(workspace_bytes=workspace_bytes), bias=True, seed=4)
    p.weight *= spread
    grad = upstream(p)
    exact = eager_gradients(p, grad, torch.float64)
    eagers = eager_gradients(p, grad, dtype)
    for value, eager, wanted in zip(gradients(p, grad, backend=workspace_backend), eagers, exact, strict=True):
        assert value is not None
        assert error(value, wanted) <= 1.05 * error(eager, wanted)


def test_rows_beyond_int32(tmp_path: Path) -> None:
    """Rows of the workspace 2^30 elements apart, in memory that is nearly all hole."""
    p = problem(4, 101, 8, dtype=torch.float16)
    sweep = workspace_backend._Sweep(p.inputs, PLAIN, Needs(False, False, False))
    sweep.reserve(4)
    near = sweep.load(0, 4)
    size = 3 * 2**30 + 128
    if DEVICE == "cuda":
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=torch.float16)
    far = memory.as_strided((4, 128), (2**30, 1))
    far.copy_(near.z)
    grad = upstream(p)
    logps, lse, _ = near.statistics()
    for found, wanted in zip(triton_softmax.statistics(far, near.targets, sweep.ready)[:2], (logps, lse), strict=True):
        assert torch.equal(found, wanted)
    for z in (near.z, far):
        triton_softmax.gradient(z, near.targets, lse, grad, sweep.ready)
    assert torch.equal(near.z[:, :101], far[:, :101])
    assert float(far[3, :101].abs().max()) > 0


@pytest.mark.parametrize("programs", [1, 40])
def test_rows_in_parts(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens: a row is cut into as many parts as keep the GPU busy, and no number of them changes the result."""
    monkeypatch.setattr(triton_softmax, "_PROGRAMS", programs)
    p = problem(9, 333, 24, head=RICH)
    check(p, upstream(p), backend=workspace_backend)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "row",
    [
        [float("-inf")],
        [float("-inf"), LOWEST],
        [-1e38, -2e38, -3e38, LOWEST],
        [-2e38],
        [float("-inf"), -1e38, 3e38],
        [0.0, float("inf")],
        [float("-inf"), float("inf"), LOWEST],
        [-2e38, float("nan")],
        [float("-inf"), float("nan"), float("inf")],
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [0, 64, 299])
def test_statistics_of_logits_at_the_end_of_float32(row: list[float], at: int) -> None:
    """One value everywhere, the others from word `at` on: the same log-probabilities as float64's, inf and NaN too."""
    vocabulary = 300
    p = problem(4, vocabulary, 8)
    z = torch.full((4, padded_width(vocabulary)), float("nan"), device=DEVICE)
    z[:, :vocabulary] = row[0]
    for n, value in enumerate(row):
        z[:, (at + n) % vocabulary] = value
    p.targets[:] = torch.tensor([at, (at + len(row) - 1) % vocabulary, (at + 150) % vocabulary, -100], device=DEVICE)
    logps, lse, _ = triton_softmax.statistics(z, p.targets, Head.of(p.inputs, PLAIN))
    exact = z[:, :vocabulary].double().log_softmax(1).gather(1, p.targets.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(logps[:3].double(), exact[:3].float().double(), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert logps[3] == 0
    if not z[:, :vocabulary].isnan().any() and float("inf") not in row:
        torch.testing.assert_close(lse, z[:, :vocabulary].double().logsumexp(1), rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("power", [-16, -40])
def test_small_coefficients_survive_float16_beside_tokens_without_one(power: int) -> None:
    """The sums before their rounding, which an upstream gradient scales: no worse for tokens that have no gradient."""
    p = problem(24, 70, 40, dtype=torch.float16)
    grad = upstream(p)
    grad[::3] = 0
    lse = forward(p, workspace_backend).lse
    wide = []
    for n in (0, power):
        sweep = workspace_backend._Sweep(p.inputs, p.head, Needs(True, True, False))
        sweep.reserve(24)
        sweep.load(0, 24).backward(grad * 2.0**n, lse)
        assert sweep.factors is not None
        dweight = workspace_backend.weight_gradient(sweep.factors, None, 70, torch.float32)
        wide.append((sweep.dhidden, dweight))
    for one, other in zip(*wide, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(other, one * 2.0**power)


@pytest.mark.parametrize("unit", [None, 0.25])
def test_sums_in_parts(unit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the sum 64 at a time, the last part shorter: float16, and any 16 bits in torch 2.8 and 2.9."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=draw).to(DEVICE, torch.float16) for shape in ((5, 150), (5, 6)))
    start = torch.randn(150, 6, generator=draw).to(DEVICE)
    out, scale = start.clone(), None if unit is None else torch.tensor(unit, device=DEVICE)
    monkeypatch.setattr(workspace_backend, "PART_BYTES", 1)
    workspace_backend._add_in_parts(a.t(), b, out, scale)
    torch.testing.assert_close(out, start + (unit or 1.0) * (a.t().float() @ b.float()))


class Sizes(TorchDispatchMode):
    """The bytes of everything that is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.taken.append(result.untyped_storage().nbytes())
        return result


def hide_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and kernels take no memory of their own on a GPU; here a CPU widens what they read."""

    def unseen(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    for name in ("gradient", "statistics", "_library_product"):
        monkeypatch.setattr(workspace_backend, name, unseen(getattr(workspace_backend, name)))


@every_dtype
def test_nothing_as_large_as_the_workspace_or_the_gradient_stands_beside_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later chunk's backward, all gradients; products and kernels aside, which a CPU widens."""
    head = PLAIN.replace(workspace_bytes=32 * 448 * dtype.itemsize)
    p = problem(64, 400, 48, bias=True, dtype=dtype, head=head)
    lse = forward(p, workspace_backend).lse
    monkeypatch.setattr(workspace_backend, "PART_BYTES", 1)

    sweep = workspace_backend._Sweep(p.inputs, p.head, Needs(True, True, True))
    sweep.reserve(32)
    sweep.load(0, 32).backward(upstream(p)[:32], lse[:32])
    loaded = sweep.load(32, 64)
    hide_kernels(monkeypatch)
    with Sizes() as sizes:
        loaded.backward(upstream(p)[32:], lse[32:])
    assert 0 < max(sizes.taken) < min(4 * 400 * 48, 4 * 32 * 400) / 2


@both_halves
def test_one_chunk_has_no_float32_gradient_of_the_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its size, from the logits to the rounded gradient, but the logits and that gradient in 16 bits."""
    case = on_device(make_case([10] * 6, [2, 2, 2], hidden_size=48, vocab_size=400, rewards=True, dtype=dtype))
    monkeypatch.setattr(workspace_backend, "PART_BYTES", 1)
    hide_kernels(monkeypatch)
    with Sizes() as sizes:
        _, swept = workspace_backend.loss_sweep(case.head, case.ranking, PLAIN, PUBLISHED, Needs(True, True, False))
        assert isinstance(swept.weight, Factors)
        scale = torch.tensor(0.3, device=DEVICE)
        dweight = workspace_backend.weight_gradient(swept.weight, scale, 400, dtype)
    assert dweight.dtype == dtype
    assert sorted(sizes.taken)[-2:] == [2 * 400 * 48, 2 * 60 * 448]


@both_halves
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_loss_in_one_chunk_is_no_worse_than_the_eager_one(dtype: torch.dtype, factor: float) -> None:
    """A power of two: with any other the eager path rounds other numbers, and of few tokens luck decides."""
    case = make_case(*RAGGED, hidden_size=64, vocab_size=300, rewards=True, dtype=dtype, weight_scale=0.2)
    assert Workspace(300, 64, 2).keeps_factors(31)
    exact_loss, exact = case.to(torch.float64).gradients("reference", factor, options=PAPER)
    _, eagers = case.gradients("reference", factor, options=PAPER)
    loss, found = on_device(case).gradients("workspace", factor, options=PAPER)
    close(loss.cpu(), exact_loss, 1e-2)
    for value, eager, wanted in zip(found, eagers, exact, strict=True):
        assert value.dtype == dtype
        assert error(value.cpu(), wanted) <= 1.05 * error(eager, wanted)


@both_halves
def test_the_weight_s_gradient_is_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times an upstream gradient that is no power of two: half a unit in the last place from the exact product."""
    monkeypatch.setattr(workspace_backend, "PART_BYTES", 1)
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, columns, generator=draw).to(DEVICE, dtype) for columns in (192, 24))
    factors = Factors(left, right, torch.tensor(0.5, device=DEVICE))
    found = workspace_backend.weight_gradient(factors, torch.tensor(0.3, device=DEVICE), 150, dtype).double()
    exact = 0.5 * float(torch.tensor(0.3)) * (left[:, :150].double().t() @ right.double())
    assert found.shape == (150, 24)
    assert ((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()


@both_halves
def test_gradients_of_some_inputs_alone(dtype: torch.dtype) -> None:
    """Asked for one at a time, by a graph that stays: the same bits as all at once. Nobody's NaN is multiplied by 0."""
    case = make_case(*RAGGED, rewards=True, dtype=dtype, ignored=0.1)
    hidden = case.hidden.clone()
    hidden[case.targets == -100] = torch.nan
    case = on_device(case.replace(hidden=hidden))
    leaves = case.leaves()
    loss, _ = case.loss("workspace")
    alone = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in leaves]
    together = torch.autograd.grad(loss, leaves)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
    loss, _ = case.loss("workspace")
    factors = torch.tensor([1.0, 0.5, -2.0], device=DEVICE)
    batch = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True)
    for many, one in zip(batch, alone, strict=True):
        torch.testing.assert_close(many, factors.to(dtype).view(-1, 1, 1) * one, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("budget", "rows", "options"),
    [
        (1, None, PUBLISHED),
        (5 * 64 * 4, 8, PAPER),
        (7 * 64 * 4 + 3, None, PUBLISHED.replace(reduction="pair_mean")),
        (10**9, 8, PUBLISHED),
    ],
    ids=["1 token", "5 tokens", "7 tokens", "all"],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_any_workspace_gives_the_loss(budget: int, rows: int | None, options: CLHAOptions) -> None:
    """From one token at a time to all at once; 5 and 7 rows split the largest prompts."""
    case = make_case(*RAGGED, rows=rows, bias=True, rewards=True, ignored=0.1, sft_index=True, dtype=torch.float32)
    head = HeadOptions(softcap=4.0, workspace_bytes=budget)
    exact_loss, exact = case.to(torch.float64).gradients("reference", 0.5, head=head, options=options)
    loss, found = on_device(case).gradients("workspace", 0.5, head=head, options=options)
    close(loss.cpu(), exact_loss, 1e-6)
    for value, wanted in zip(found, exact, strict=True):
        close(value.cpu(), wanted, 3e-6)


@pytest.mark.parametrize("rewards", [True, False])
def test_metrics_and_scores_are_the_reference_s(rewards: bool) -> None:
    case = make_case(*RAGGED, rewards=rewards, dtype=torch.float32, ignored=0.1)
    counts = torch.tensor([4.0, 3.0])
    case = case.replace(pair_counts=counts, prompt_count=torch.tensor(9.0))
    head = HeadOptions(workspace_bytes=6 * 64 * 4)
    _, found = on_device(case).loss("workspace", head=head)
    _, wanted = case.to(torch.float64).loss("reference", head=head)
    torch.testing.assert_close(found.values.cpu(), wanted.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores.cpu().double(), wanted.scores, rtol=1e-5, atol=1e-5)


def test_the_hinge_by_hand() -> None:
    """Scores -2 and -1, margin 3: the gap is 1 + 3, its slope 1 a score, and nothing else is in the loss."""
    by_hand = rank(
        "reference", [-2.0, -1.0], PAPER.replace(sft_weight=0.0), candidate_lengths=[1, 1], candidates_per_prompt=[2]
    )
    assert by_hand.loss == pytest.approx(4.0)
    weight = torch.tensor([[1.8545865, 0.0], [0.0, 0.0]])  # logits (1.85, 0) and (0, 0): log p = -0.145, -0.693
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    loss, metrics = linear_clha_loss(
        hidden.to(DEVICE),
        weight.to(DEVICE),
        torch.tensor([1, 0], device=DEVICE),
        torch.tensor([1, 1]),
        torch.tensor([2]),
        options=PAPER.replace(sft_weight=0.0),
        backend="workspace",
    )
    # Target 1 of the first token: -2.0; either word of the second: -log 2.
    assert metrics.scores.tolist() == pytest.approx([-2.0, -0.6931472], abs=1e-5)
    assert float(loss) == pytest.approx(3.0 + 2.0 - 0.6931472, abs=1e-5)


def test_one_chunk_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sizes on a GPU come to: the tail of the batch stays in the workspace, the rest is formed twice."""
    case = make_case(*RAGGED, rewards=True, dtype=torch.float32, rows=9)
    head = HeadOptions(workspace_bytes=6 * 64 * 4)
    loss, wanted = on_device(case).gradients("workspace", head=head)
    tokens = sum(RAGGED[0])
    everything = [Chunk(0, 4, 0, tokens - 6, tokens)]
    monkeypatch.setattr(workspace_backend, "_chunks", lambda *_: everything)
    other, found = on_device(case).gradients("workspace", head=head)
    close(other, loss, 1e-6)
    for value, expected in zip(found, wanted, strict=True):
        close(value, expected, 3e-6)


@pytest.mark.parametrize("needs", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_what_is_not_needed_costs_nothing(needs: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head has neither product nor buffer."""
    p = problem(10, 40, 20, bias=True)
    full = gradients(p, upstream(p), backend=workspace_backend)
    _, lse, route = forward(p, workspace_backend)
    products: list[Any] = []
    product = workspace_backend._product
    monkeypatch.setattr(
        workspace_backend, "_product", lambda *args, **kwargs: (products.append(args), product(*args, **kwargs))
    )
    result = workspace_backend.token_logps_backward(upstream(p), p.inputs, lse, route, p.head, Needs(*map(bool, needs)))
    assert len(products) == needs[0] + needs[1]
    for need, value, wanted in zip(needs, result, full, strict=True):
        assert (value is not None) == bool(need)
        assert value is None or torch.equal(value, wanted)  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned_memory")
@every_dtype
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    case = on_device(make_case(*RAGGED, rows=9, bias=True, rewards=True, dtype=dtype))
    head = HeadOptions(workspace_bytes=1500)
    first, second = (case.gradients("workspace", 0.7, head=head) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optional", [True, False], ids=["all inputs", "required inputs"])
def test_operators_keep_their_contract(optional: bool) -> None:
    case = (
        make_case(
            [3, 0, 2, 4], [3, 1], dtype=torch.float16, bias=optional, rewards=optional, rows=6 if optional else None
        )
        if optional
        else make_case([2, 3], [2], dtype=torch.float32)
    )
    case = on_device(case)
    case.leaves()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.clha_fast
    torch.library.opcheck(operators.token_logps, (*case.head, PLAIN.encoded, "workspace"), test_utils=tests)
    for needs in ((True, True, case.bias is not None), (False, True, False)):
        arguments = (*case.head, *case.ranking, PLAIN.encoded, PUBLISHED.encoded, "workspace", *needs)
        torch.library.opcheck(operators.linear_loss, arguments, test_utils=tests)
    for dtype, wide in ((torch.float16, False), (torch.float16, True)):
        left, right = (torch.randn(5, columns, device=DEVICE).to(dtype).requires_grad_() for columns in (64, 8))
        factors = (left, right, torch.tensor(0.5, device=DEVICE), torch.tensor(3.0, device=DEVICE), 50, wide)
        torch.library.opcheck(operators.weight_gradient, factors, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upstream_is_multiplied_in_with_one_rounding(dtype: torch.dtype) -> None:
    gradient, factor = torch.randn(40, 30), torch.tensor(0.3)
    assert torch.equal(_rounded_product(gradient, factor, dtype), (gradient * factor).to(dtype))


def test_what_it_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([2, 3], [2])
    with pytest.raises(BackendError, match="backend 'workspace' cannot run: its kernels take float32"):
        case.loss("workspace")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(BackendError, match="backend 'torch' is that path without kernels"):
            case.to(torch.float32).loss("workspace")


@every_dtype
def test_the_bias_takes_no_copy_of_the_workspace(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in float64 first copies what it adds up, inside the operator: a profiler alone sees that."""
    tokens, words = 64, 500
    monkeypatch.setattr(workspace_backend, "PART_BYTES", 2**14)
    head = PLAIN.replace(workspace_bytes=2**20)
    p = problem(tokens, words, 16, dtype=dtype, bias=True, head=head)
    _, lse, route = forward(p, workspace_backend)
    exact = eager_gradients(p, upstream(p), torch.float64)[2]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        dbias = workspace_backend.token_logps_backward(
            upstream(p), p.inputs, lse, route, head, Needs(False, False, True)
        ).bias
    assert dbias is not None
    close(dbias, exact, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    largest = max(max(event.cpu_memory_usage, event.device_memory_usage) for event in profile.events())
    # The workspace itself; the interpreter's products of 16 bits widen it to float32.
    assert tokens * words * dtype.itemsize <= largest < 8 * tokens * words
