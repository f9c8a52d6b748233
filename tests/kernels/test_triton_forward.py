"""Token log-probabilities of the Triton backend: closed forms, float64, edges and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clha_fast.backends.triton.head import architecture
from clha_fast.errors import BackendError
from clha_fast.options import HeadOptions
from tests.support.triton_harness import (
    DEVICE,
    PLAIN,
    RICH,
    Problem,
    both_halves,
    eager_logps,
    error,
    every_dtype,
    exact_logps,
    forward,
    problem,
)


def closed_form(weight: Tensor, targets: list[int], bias: Tensor | None = None, head: HeadOptions = PLAIN) -> Problem:
    """Tokens whose hidden state is e_0: their logits are the weight's first column."""
    hidden = torch.zeros(len(targets), weight.shape[1], device=DEVICE)
    hidden[:, 0] = 1
    return Problem(hidden, weight.to(DEVICE), bias, torch.tensor(targets, device=DEVICE), None, head)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 100])
def test_equal_logits_give_minus_log_of_the_vocabulary(vocabulary: int) -> None:
    logps, lse, _ = forward(closed_form(torch.zeros(vocabulary, 5), [0, vocabulary - 1]))
    torch.testing.assert_close(logps.cpu(), torch.full((2,), -math.log(vocabulary)))
    torch.testing.assert_close(lse.cpu(), torch.full((2,), math.log(vocabulary), dtype=torch.float64))


def test_two_logits_by_hand() -> None:
    # z = (0, log 3): probabilities 1/4 and 3/4. Scale 2 makes them 1/10 and 9/10; temperature 2 undoes it.
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    by_hand = {
        HeadOptions(): (0.25, 0.75),
        HeadOptions(scale=2.0): (0.1, 0.9),
        HeadOptions(scale=2.0, temperature=2.0): (0.25, 0.75),
    }
    for head, probabilities in by_hand.items():
        logps, *_ = forward(closed_form(weight, [0, 1], head=head))
        torch.testing.assert_close(logps.exp().cpu(), torch.tensor(probabilities))
    # A softcap of 1 on huge logits of both signs: z = (-1, 1).
    logps, *_ = forward(closed_form(torch.tensor([[-1e6], [1e6]]), [0, 1], head=HeadOptions(softcap=1.0)))
    torch.testing.assert_close(logps.exp().cpu(), torch.tensor([1 / (1 + math.e**2), 1 / (1 + math.e**-2)]))


@every_dtype
@pytest.mark.parametrize("head", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize(("bias", "rows"), [(False, None), (True, None), (False, 11)])
@pytest.mark.usefixtures("poisoned_memory")
def test_agrees_with_float64(dtype: torch.dtype, bias: bool, head: HeadOptions, rows: int | None) -> None:
    p = problem(dtype=dtype, bias=bias, head=head, rows=rows, ignored=0.2)
    logps, lse, _ = forward(p)
    assert (logps.dtype, lse.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(logps.double(), exact_logps(p), rtol=2e-6, atol=2e-6)
    assert (logps[p.targets == head.ignore_index] == 0).all()


@every_dtype
@pytest.mark.parametrize("head", [PLAIN, RICH], ids=["plain", "rich"])
def test_no_worse_than_the_eager_path(dtype: torch.dtype, head: HeadOptions) -> None:
    p = problem(80, 230, 96, dtype=dtype, head=head, bias=True)
    exact = exact_logps(p)
    assert error(forward(p)[0], exact) <= 1.05 * error(eager_logps(p, p.leaves(dtype)), exact)


@settings(max_examples=8)
@given(
    tokens=st.integers(0, 40),
    vocabulary=st.integers(1, 70),
    width=st.integers(1, 36),
    bias=st.booleans(),
    rich=st.booleans(),
    rows=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(
    tokens: int, vocabulary: int, width: int, bias: bool, rich: bool, rows: int | None, seed: int
) -> None:
    head = RICH if rich else PLAIN
    p = problem(tokens, vocabulary, width, bias=bias, rows=rows, head=head, ignored=0.1, seed=seed)
    torch.testing.assert_close(forward(p)[0].double(), exact_logps(p), rtol=3e-6, atol=3e-6)


def test_extreme_logits() -> None:
    weight = torch.tensor([[1e4], [-1e4], [1e4], [0.0]])
    logps, *_ = forward(closed_form(weight, [0, 1, 2, 3]))
    expected = torch.tensor([0.0, -2e4, 0.0, -1e4]) - math.log(2.0)
    torch.testing.assert_close(logps.cpu(), expected)


@pytest.mark.parametrize("allowed", [[0], [40], [3, 60], list(range(32, 64)), []], ids=str)
def test_minus_infinity_masks_words(allowed: list[int]) -> None:
    """Also whole vocabulary blocks, and a row of -inf alone, which log_softmax makes NaN."""
    p = problem(9, 70, 16, bias=True)
    assert p.bias is not None
    keep = p.bias[allowed].clone()
    p.bias.fill_(float("-inf"))
    p.bias[allowed] = keep
    p.targets[: len(allowed)] = torch.tensor(allowed, device=DEVICE)[:9]
    logps, lse, _ = forward(p)
    torch.testing.assert_close(logps.double(), exact_logps(p), rtol=2e-6, atol=2e-6, equal_nan=True)
    assert allowed or (lse == float("-inf")).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_what_is_not_finite_is_not_hidden(poison: float, where: str) -> None:
    p = problem(20, 70, 24, bias=True)
    tensor = getattr(p, where)
    tensor[(5,) if where == "bias" else (5, 3)] = poison
    logps, exact = forward(p)[0], exact_logps(p)
    assert (logps.isnan() == exact.isnan()).all()
    torch.testing.assert_close(logps.double(), exact, rtol=2e-6, atol=2e-6, equal_nan=True)
    if where == "hidden":
        assert logps.isnan().nonzero().flatten().tolist() == [5]


def test_targets_and_rows_out_of_range_are_nan_and_touch_nothing_else() -> None:
    p = problem(20, 70, 24, rows=6)
    assert p.row_index is not None
    exact = exact_logps(p)
    wrong = {2: 70, 3: -1, 7: 2**40, 8: -(2**40)}
    for token, target in wrong.items():
        p.targets[token] = target
    p.row_index[11], p.row_index[12] = 6, -1
    logps = forward(p).logps
    assert logps.isnan().nonzero().flatten().tolist() == [2, 3, 7, 8, 11, 12]
    rest = ~logps.isnan()
    torch.testing.assert_close(logps[rest].double(), exact[rest], rtol=2e-6, atol=2e-6)


def test_nothing_scored() -> None:
    logps, lse, _ = forward(problem(0))
    assert logps.shape == lse.shape == (0,)
    logps, *_ = forward(problem(17, ignored=1.1))
    assert (logps == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset", "strided", "padded rows"])
@both_halves
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    p = problem(dtype=dtype)
    if layout == "transposed":
        p.weight, p.hidden = p.weight.t().contiguous().t(), p.hidden.t().contiguous().t()
    elif layout == "expanded":
        p.hidden = p.hidden[:1].expand(37, -1)
        p.weight = p.weight[:, :1].expand(-1, 40)
    elif layout == "offset":
        p.hidden = torch.cat([p.hidden, p.hidden])[5:42]
        p.weight = torch.cat([p.weight, p.weight], 1)[:, 3:43]
    elif layout == "strided":
        p.hidden = torch.cat([p.hidden, p.hidden], 1)[:, ::2]
        p.weight = torch.cat([p.weight, p.weight])[::2]
        p.targets = torch.stack([p.targets, p.targets], 1)[:, 0]
    else:
        p.hidden = torch.nn.functional.pad(p.hidden, (0, 8), value=float("nan"))[:, :40]
        p.weight = torch.nn.functional.pad(p.weight, (0, 8), value=float("nan"))[:, :40]
    torch.testing.assert_close(forward(p)[0].double(), exact_logps(p), rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("poisoned_memory")
def test_bitwise_repeatable() -> None:
    p = problem(bias=True, head=RICH, rows=13)
    for first, second in zip(forward(p), forward(p), strict=True):
        assert torch.equal(first, second)


def test_float64_is_left_to_the_torch_backend() -> None:
    with pytest.raises(ValueError, match=r"hidden: expected float32, float16 or bfloat16 for .*, got float64"):
        forward(problem(dtype=torch.float64))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="needs a CUDA or ROCm device or TRITON_INTERPRET=1, got cpu"):
        architecture(torch.device("cpu"))
