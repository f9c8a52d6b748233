"""Builders and comparisons for the tests of what runs Triton kernels: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import reference
from clha_fast.backends.triton import backend as triton_backend
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.options import HeadOptions
from clha_fast.types import HeadInputs, HeadResult, LossResult, Needs, RankingInputs
from csrc_triton import configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}  # for `parameters.covered`
NAMED_HALVES = {name: dtype for name, dtype in NAMED_DTYPES.items() if dtype != torch.float32}
PLAIN = HeadOptions()
RICH = HeadOptions(scale=2.0, softcap=5.0, temperature=0.7)


def over_dtypes(*dtypes: torch.dtype) -> Callable[[Any], Any]:
    """Parametrizes `dtype`; the interpreter's bfloat16 is mended meanwhile."""

    def decorate(test: Any) -> Any:
        return pytest.mark.usefixtures("bfloat16_kernels")(pytest.mark.parametrize("dtype", dtypes)(test))

    return decorate


every_dtype = over_dtypes(*DTYPES)
both_halves = over_dtypes(torch.float16, torch.bfloat16)


@dataclass
class Problem:
    """Inputs of the head, already rounded to the dtype under test."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    row_index: Tensor | None
    head: HeadOptions

    @property
    def inputs(self) -> HeadInputs:
        return HeadInputs(self.hidden, self.weight, self.bias, self.targets, self.row_index)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """hidden, weight and bias (where there is one) in another dtype, ready for autograd."""
        return [t.detach().to(dtype).requires_grad_() for t in self.inputs[:3] if t is not None]


def problem(
    tokens: int = 37,
    vocabulary: int = 101,
    width: int = 40,
    *,
    dtype: torch.dtype = torch.float32,
    head: HeadOptions = PLAIN,
    bias: bool = False,
    rows: int | None = None,
    ignored: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Random inputs; with `rows` a row_index with repeats into that many hidden states."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocabulary, (tokens,), generator=draw)
    targets[torch.rand(tokens, generator=draw) < ignored] = head.ignore_index
    return Problem(
        hidden=torch.randn(rows if rows is not None else tokens, width, generator=draw).to(DEVICE, dtype),
        weight=(torch.randn(vocabulary, width, generator=draw) * 0.3).to(DEVICE, dtype),
        bias=torch.randn(vocabulary, generator=draw).to(DEVICE, dtype) if bias else None,
        targets=targets.to(DEVICE),
        row_index=None if rows is None else torch.randint(0, rows, (tokens,), generator=draw).to(DEVICE),
        head=head,
    )


def set_routed_dhidden(monkeypatch: pytest.MonkeyPatch, **tile: int) -> None:
    """What all entries of the routed dhidden say instead."""
    entries = configs.GEMMS["routed_hidden_grad"]
    for key, own in dict(entries).items():
        monkeypatch.setitem(entries, key, own | tile)


def forward(p: Problem, backend: ModuleType = triton_backend) -> HeadResult:
    result: HeadResult = backend.token_logps_forward(p.inputs, p.head)
    return result


def exact_logps(p: Problem) -> Tensor:
    """Float64 log-probabilities of the same, rounded, inputs."""
    return eager_logps(p, p.leaves(torch.float64))


def eager_logps(p: Problem, leaves: list[Tensor]) -> Tensor:
    bias = leaves[2] if len(leaves) == 3 else None
    return reference.token_logps(leaves[0], leaves[1], bias, p.targets, p.row_index, p.head)


def gradients(
    p: Problem, grad: Tensor, needs: tuple[bool, bool, bool] | None = None, backend: ModuleType = triton_backend
) -> list[Tensor | None]:
    needs = needs or (True, True, p.bias is not None)
    _, lse, route = forward(p, backend)
    return list(backend.token_logps_backward(grad, p.inputs, lse, route, p.head, Needs(*needs)))


def upstream(p: Problem, seed: int = 1) -> Tensor:
    return torch.randn(p.targets.shape[0], generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def eager_gradients(p: Problem, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = p.leaves(dtype)
    logps = eager_logps(p, leaves)
    return list(torch.autograd.grad(logps, leaves, grad.to(logps.dtype)))


def error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm of the exact value."""
    exact = exact.detach().double()
    return float((value.detach().double() - exact).norm() / exact.norm())


def close(value: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within tolerance of the largest element: sums of terms of both signs are no nearer to their own size."""
    size = 1 + float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(value.double(), wanted.double(), rtol=0, atol=tolerance * size)


def check(p: Problem, grad: Tensor, tolerance: float = 1e-6, backend: ModuleType = triton_backend) -> None:
    """Log-probabilities and gradients against float64."""
    exact = eager_gradients(p, grad, torch.float64)
    # A logit's rounding error is multiplied by the head's slope, and what it does to the gradient once more.
    tolerance *= max(1.0, p.head.scale / p.head.temperature) ** 2
    close(forward(p, backend).logps, exact_logps(p), tolerance)
    for value, wanted in zip([g for g in gradients(p, grad, backend=backend) if g is not None], exact, strict=True):
        assert value.shape == wanted.shape
        assert value.dtype == p.hidden.dtype
        close(value, wanted, tolerance)


def loss(p: Problem, r: RankingInputs, options: CLHAOptions) -> LossResult:
    return triton_backend.loss_forward(p.inputs, r, p.head, options)


def exact_loss(p: Problem, r: RankingInputs, options: CLHAOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, scores, dL/dlogp) of the reference in float64."""
    logps = exact_logps(p).detach().requires_grad_()
    total, metrics, scores = reference.clha_loss(logps, p.targets, *r[:6], p.head, options)
    (slope,) = torch.autograd.grad(total, logps)
    return total.detach(), metrics, scores.detach(), torch.where(p.targets == p.head.ignore_index, 0.0, slope)
