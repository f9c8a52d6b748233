"""verl's function for log-probabilities and entropies against ours with its signature.

verl itself is not imported (it starts Ray): the file with the function is loaded by its path.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import HeadOptions
from clha_fast.integrations.verl import FusedLinearForPPO

T, H, V = 23, 16, 301


def theirs(**settings: Any) -> Any:
    found = importlib.util.find_spec("verl")
    if found is None or found.origin is None:
        pytest.skip("verl is not installed")
    path = Path(found.origin).parent / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FusedLinearForPPO(**settings)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, T, H, generator=draw).to(dtype)
    weight = torch.randn(V, H, generator=draw).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (2, T), generator=draw)


def outcome(module: Any, given: tuple[Tensor, Tensor, Tensor], **call: Any) -> list[Tensor]:
    hidden, weight, ids = given
    logps, entropy = module(hidden, weight, ids, **call)
    upstream = torch.linspace(-1, 1, 2 * T).reshape(2, T)
    grads = torch.autograd.grad((logps * upstream).sum() + (entropy * upstream.flip(0)).sum(), (hidden, weight))
    return [logps.detach(), entropy.detach(), *grads]


def plain(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logs.gather(2, ids[..., None])[..., 0], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_verls(temperature: float, dtype: torch.dtype) -> None:
    """Both against float64, for how much verl's own error is depends on the CPU."""
    hidden, weight, ids = inputs(dtype)
    doubles = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), ids)
    exact = outcome(plain, doubles, temperature=temperature)
    expected = outcome(theirs(chunk_size=8), (hidden, weight, ids), temperature=temperature)
    got = outcome(FusedLinearForPPO(), (hidden, weight, ids), temperature=temperature)
    # verl rounds its bfloat16 logits, and the entropy with them. In float32 its entropy is a difference of numbers as
    # large as the largest logit, and is off by their rounding.
    largest = float((doubles[0] @ doubles[1].T / temperature).detach().abs().max())
    bound, other_bound = (2e-6, largest * torch.finfo(dtype).eps) if dtype == torch.float32 else (4e-3, 2e-2)
    for mine, other, truth in zip(got, expected, exact, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        error, other_error = ((values.double() - truth).norm() for values in (mine, other))
        assert error <= bound * truth.norm()
        assert error <= 1.05 * other_error
        assert other_error <= other_bound * truth.norm()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_against_float64_with_a_temperature_for_each_token(backend: Any) -> None:
    each = torch.linspace(0.5, 2, 2 * T).reshape(2, T, 1)
    hidden, weight, ids = inputs(torch.float64)
    z = 5 * torch.tanh(0.5 * (hidden @ weight.T) / 5) / each
    logs = z.log_softmax(-1)
    wanted = (logs.gather(2, ids[..., None])[..., 0], -(logs.exp() * logs).sum(-1))
    module = FusedLinearForPPO(impl_backend=backend, head=HeadOptions(scale=0.5, softcap=5.0))
    for temperature in (each, each[..., 0]):
        got = module(hidden, weight, ids, temperature)
        for mine, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_flat_tokens_are_the_same() -> None:
    hidden, weight, ids = inputs()
    rows = FusedLinearForPPO()(hidden, weight, ids, 0.9)
    flat = FusedLinearForPPO(chunk_size=3)(hidden.flatten(0, 1), weight, ids.flatten().int(), torch.tensor(0.9))
    for mine, other in zip(rows, flat, strict=True):
        torch.testing.assert_close(mine.flatten(), other)


def test_refused() -> None:
    hidden, weight, ids = inputs()
    with pytest.raises(ValueError, match=r"input_ids: expected \[2, 23\]"):
        FusedLinearForPPO()(hidden, weight, ids[0])
    with pytest.raises(ValueError, match="backend"):
        FusedLinearForPPO(impl_backend="liger")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head: expected a temperature of 1"):
        FusedLinearForPPO(head=HeadOptions(temperature=0.5))
