"""The epilogues as NVIDIA's GPUs run them: one fused product and sum and one power of two a logit, in float32."""

from __future__ import annotations

import pytest
import torch

from clha_fast.options import HeadOptions
from tests.support.powers import as_on_nvidia
from tests.support.triton_harness import (
    DEVICE,
    PLAIN,
    RICH,
    Problem,
    check,
    close,
    eager_gradients,
    exact_logps,
    forward,
    gradients,
    problem,
    upstream,
)

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs them in every test")


@pytest.fixture(autouse=True)
def ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_nvidia(monkeypatch)


def test_two_words_by_hand() -> None:
    # z = (0, log 3), target 0: p = (1/4, 3/4), dlogp/dz = (3/4, -3/4).
    weight = torch.tensor([[0.0, 2.0], [1.0986123, 1.0]])
    p = Problem(torch.tensor([[1.0, 0.0]]), weight, torch.zeros(2), torch.tensor([0]), None, PLAIN)
    torch.testing.assert_close(forward(p).logps, torch.tensor([-1.3862944]))
    dhidden, dweight, dbias = (g for g in gradients(p, torch.tensor([2.0])) if g is not None)
    torch.testing.assert_close(dhidden, torch.tensor([[-1.5 * 1.0986123, 3.0 - 1.5]]))
    torch.testing.assert_close(dweight, torch.tensor([[1.5, 0.0], [-1.5, 0.0]]))
    torch.testing.assert_close(dbias, torch.tensor([1.5, -1.5]))


@pytest.mark.parametrize(
    "head",
    [PLAIN, RICH, HeadOptions(scale=-1.3, temperature=0.8), HeadOptions(scale=0.0), HeadOptions(max_dropped_mass=0.0)],
    ids=["plain", "rich", "negative", "zero", "routed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["pointers", "persistent"])
@pytest.mark.usefixtures("poisoned_memory")
def test_agrees_with_float64(head: HeadOptions, dtype: torch.dtype) -> None:
    """Words, tokens and hidden units that end within a tile, ignored targets, a bias."""
    p = problem(37, 101, 48, dtype=dtype, bias=True, head=head, rows=11, ignored=0.2)
    if dtype == torch.float32:
        return check(p, upstream(p))
    torch.testing.assert_close(forward(p).logps.double(), exact_logps(p), rtol=2e-6, atol=2e-6)
    for value, wanted in zip(gradients(p, upstream(p)), eager_gradients(p, upstream(p), torch.float64), strict=True):
        assert value is not None
        close(value, wanted, 2e-3)
    return None


def test_large_logits_close_together() -> None:
    """Near 1e4, where neither the log-sum-exp nor a product with log2(e) has digits left for the probabilities."""
    p = problem(20, 70, 24, bias=True)
    assert p.bias is not None
    p.hidden, p.weight = p.hidden.round(), (p.weight * 4).round() / 4
    p.bias[:] = 1e4
    check(p, upstream(p))


def test_extreme_logits() -> None:
    for factor in (1e2, 1e4):
        p = problem(20, 70, 24)
        p.hidden, p.weight = (p.hidden * 4).round(), (p.weight * 4).round() * factor
        exact = eager_gradients(p, upstream(p), torch.float64)
        for value, wanted in zip(gradients(p, upstream(p))[:2], exact, strict=True):
            assert value is not None
            close(value, wanted, 3e-6)


@pytest.mark.parametrize("allowed", [[3, 60], list(range(32, 64))], ids=str)
def test_minus_infinity_masks_words(allowed: list[int]) -> None:
    p = problem(12, 70, 16, bias=True)
    assert p.bias is not None
    keep = p.bias[allowed].clone()
    p.bias.fill_(float("-inf"))
    p.bias[allowed] = keep
    p.targets[:] = torch.tensor(allowed * 6)[:12]
    check(p, upstream(p))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_gradients(poison: float) -> None:
    p = problem(20, 70, 24, bias=True)
    p.hidden[5, 3] = poison
    exact = eager_gradients(p, upstream(p), torch.float64)
    assert forward(p).logps.isnan().nonzero().flatten().tolist() == [5]
    for value, wanted in zip(gradients(p, upstream(p)), exact, strict=True):
        assert value is not None
        assert torch.equal(value.isnan(), wanted.isnan())
