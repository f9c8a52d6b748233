"""Log-probabilities and gradients of the head by kernels, fused and over a workspace: the same cases for both."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clha_fast.backends.triton import backend as triton_backend
from clha_fast.backends.triton import workspace as workspace_backend
from clha_fast.options import HeadOptions
from clha_fast.types import Needs
from tests.support.parameters import covered
from tests.support.triton_harness import (
    DEVICE,
    NAMED_DTYPES,
    PLAIN,
    RICH,
    Problem,
    check,
    close,
    eager_gradients,
    forward,
    gradients,
    problem,
    upstream,
)

pytestmark = pytest.mark.parametrize("backend", [triton_backend, workspace_backend], ids=["triton", "workspace"])


def test_two_words_by_hand(backend: ModuleType) -> None:
    # z = (0, log 3), target 0: p = (1/4, 3/4), dlogp/dz = (3/4, -3/4). hidden (1, 0), weight rows (0, 2), (log 3, 1).
    weight = torch.tensor([[0.0, 2.0], [1.0986123, 1.0]], device=DEVICE)
    bias = torch.zeros(2, device=DEVICE)
    p = Problem(torch.tensor([[1.0, 0.0]], device=DEVICE), weight, bias, torch.tensor([0], device=DEVICE), None, PLAIN)
    torch.testing.assert_close(forward(p, backend).logps.cpu(), torch.tensor([-1.3862944]))
    dhidden, dweight, dbias = (
        g.cpu() for g in gradients(p, torch.tensor([2.0], device=DEVICE), backend=backend) if g is not None
    )
    torch.testing.assert_close(dhidden, torch.tensor([[-1.5 * 1.0986123, 3.0 - 1.5]]))
    torch.testing.assert_close(dweight, torch.tensor([[1.5, 0.0], [-1.5, 0.0]]))
    torch.testing.assert_close(dbias, torch.tensor([1.5, -1.5]))


@pytest.mark.parametrize(
    ("bias", "rows", "head"),
    covered({"plain": (False, None), "bias": (True, None), "shared rows": (False, 11)}, {"plain": PLAIN, "rich": RICH}),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_agrees_with_float64(backend: ModuleType, bias: bool, head: HeadOptions, rows: int | None) -> None:
    p = problem(bias=bias, head=head, rows=rows, ignored=0.2)
    check(p, upstream(p), backend=backend)


@settings(max_examples=6)
@given(
    tokens=st.integers(0, 40),
    vocabulary=st.integers(1, 150),
    width=st.integers(1, 36),
    bias=st.booleans(),
    rich=st.booleans(),
    rows=st.none() | st.integers(1, 9),
    skipped=st.sampled_from([0.0, 0.6, 1.1]),
    workspace_bytes=st.sampled_from([None, 800, 6000]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    backend: ModuleType,
    tokens: int,
    vocabulary: int,
    width: int,
    bias: bool,
    rich: bool,
    rows: int | None,
    skipped: float,
    workspace_bytes: int | None,
    seed: int,
) -> None:
    head = (RICH if rich else PLAIN).replace(workspace_bytes=workspace_bytes)
    p = problem(tokens, vocabulary, width, bias=bias, rows=rows, head=head, ignored=0.1, seed=seed)
    skip = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < skipped
    check(p, torch.where(skip.to(DEVICE), 0, upstream(p, seed)), backend=backend)


@pytest.mark.parametrize(
    ("skipped", "dtype"),
    covered(
        {"one": [3], "half": list(range(0, 37, 2)), "all": list(range(37))},
        NAMED_DTYPES,
    ),
)
@pytest.mark.usefixtures("bfloat16_kernels", "poisoned_memory")
def test_tokens_without_a_gradient_spoil_nothing(backend: ModuleType, dtype: torch.dtype, skipped: list[int]) -> None:
    """Not multiplied by 0: their hidden states are NaN, and nothing else becomes so."""
    p = problem(bias=True, dtype=dtype)
    grad = upstream(p)
    grad[skipped] = 0
    exact = eager_gradients(p, grad, torch.float64)
    eager = eager_gradients(p, grad, dtype)
    p.hidden[skipped] = float("nan")
    for value, plain, wanted in zip(gradients(p, grad, backend=backend), eager, exact, strict=True):
        assert value is not None
        close(value, wanted, 1e-6 + 1.05 * float((plain.double() - wanted).abs().max()))
    assert (gradients(p, grad, backend=backend)[0][skipped] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_gradients(backend: ModuleType, poison: float) -> None:
    p = problem(20, 70, 24, bias=True)
    p.hidden[5, 3] = poison
    exact = eager_gradients(p, upstream(p), torch.float64)
    assert forward(p, backend).logps.isnan().nonzero().flatten().tolist() == [5]
    for value, wanted in zip(gradients(p, upstream(p), backend=backend), exact, strict=True):
        assert value is not None
        assert torch.equal(value.isnan(), wanted.isnan())


def test_targets_and_rows_out_of_range_are_nan(backend: ModuleType) -> None:
    for wrong in ("target", "row"):
        p = problem(20, 70, 24, rows=30)
        assert p.row_index is not None
        _, lse, route = forward(p, backend)
        if wrong == "target":
            p.targets[4] = 70
        else:
            p.row_index[4] = 2**40
        assert forward(p, backend).logps.isnan().nonzero().flatten().tolist() == [4]
        needs = Needs(False, True, False)
        dweight = backend.token_logps_backward(upstream(p), p.inputs, lse, route, PLAIN, needs).weight
        assert dweight.isnan().all()


def test_extreme_logits(backend: ModuleType) -> None:
    for factor in (1e2, 1e4):
        p = problem(20, 70, 24)
        # Whole numbers: the logits are exact, so that only the softmax is tested.
        p.hidden, p.weight = (p.hidden * 4).round(), (p.weight * 4).round() * factor
        exact = eager_gradients(p, upstream(p), torch.float64)
        for value, wanted in zip(gradients(p, upstream(p), backend=backend)[:2], exact, strict=True):
            assert value is not None
            close(value, wanted, 3e-6)


def test_large_logits_close_together(backend: ModuleType) -> None:
    """Exact logits near 1e4 whose log-sum-exp no float32 holds: the probabilities still come out to 1e-6."""
    p = problem(20, 70, 24, bias=True)
    assert p.bias is not None
    p.hidden, p.weight = p.hidden.round(), (p.weight * 4).round() / 4
    p.bias[:] = 1e4
    check(p, upstream(p), backend=backend)


@pytest.mark.parametrize("allowed", [[3, 60], list(range(32, 64))], ids=str)
def test_minus_infinity_masks_words(backend: ModuleType, allowed: list[int]) -> None:
    p = problem(12, 70, 16, bias=True)
    assert p.bias is not None
    keep = p.bias[allowed].clone()
    p.bias.fill_(float("-inf"))
    p.bias[allowed] = keep
    p.targets[:] = torch.tensor(allowed * 6, device=DEVICE)[:12]
    check(p, upstream(p), backend=backend)


@pytest.mark.parametrize("power", [-16, 8, -120])
def test_small_and_large_coefficients_survive_float16(backend: ModuleType, power: int) -> None:
    """Coefficients of 2^-16 put every dlogit near or below float16's smallest number; the gradients come back whole."""
    p = problem(24, 70, 40, dtype=torch.float16, bias=True)
    unit, scaled = (gradients(p, upstream(p) * 2.0**n, backend=backend) for n in (0, power))
    for one, other in zip(unit, scaled, strict=True):
        assert one is not None
        assert other is not None
        # A power of two changes no rounding but those of subnormal results, half a unit on either side.
        torch.testing.assert_close(other.double(), one.double() * 2.0**power, rtol=0, atol=2.0 ** (max(power, 0) - 24))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset"])
def test_layouts(backend: ModuleType, layout: str) -> None:
    p = problem()
    if layout == "transposed":
        p.weight, p.hidden = p.weight.t().contiguous().t(), p.hidden.t().contiguous().t()
    elif layout == "expanded":
        p.hidden, p.weight = p.hidden[:1].expand(37, -1), p.weight[:, :1].expand(-1, 40)
    else:
        p.hidden = torch.cat([p.hidden, p.hidden], 1)[:, 3:43]
        p.weight = torch.cat([p.weight, p.weight])[::2]
    # Expanded, a logit is 40 times one product, near 80: float32 has it to 5e-6.
    expanded = layout == "expanded"
    check(p, upstream(p)[:1].expand(37) if expanded else upstream(p), 5e-6 if expanded else 1e-6, backend=backend)
