"""Gradients of 16 bits on a GPU are no worse than the eager loss's, where every softmax is flat: nothing rounds twice.

With tensors that only say they are on a GPU: the torch backend's products, and the kernel that forms the workspace
backend's gradient of the weight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import HeadOptions, backends, reference
from clha_fast.backends.triton import persistent
from clha_fast.backends.triton.head import scaled
from clha_fast.backends.triton.workspace import weight_gradient
from clha_fast.types import Factors, HeadInputs, Needs
from tests.support.triton_harness import error
from tests.support.value_gpu import OnGPU, ValueGPU

pytestmark = pytest.mark.usefixtures("bfloat16_kernels")

KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}
WIDTH, VOCABULARY = 32, 500


def drawn(tokens: int, seed: int, dtype: torch.dtype, size: float, hidden: float) -> tuple[dict[str, Tensor], Tensor]:
    """A nearly flat softmax, and upstream gradients of so many sizes that most are no power of two."""
    draw = torch.Generator().manual_seed(seed)
    given = {
        "hidden": (hidden * torch.randn(tokens, WIDTH, generator=draw)).to(dtype),
        "weight": (0.02 * torch.randn(VOCABULARY, WIDTH, generator=draw)).to(dtype),
        "bias": (torch.arange(VOCABULARY) % 7 / 10).to(dtype),
    }
    upstream = size * torch.randn(tokens, generator=draw)
    upstream[::7] = 0
    return given | {"targets": torch.randint(VOCABULARY, (tokens,), generator=draw)}, upstream


def eager(given: dict[str, Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [given[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    value = reference.token_logps(*leaves, given["targets"], None, HeadOptions())
    return list(torch.autograd.grad(value, leaves, upstream.to(value.dtype)))


# bfloat16 has float32's exponents, and as many digits at any size.
SIZES = [("fp16", *sizes) for sizes in ((1.0, 1.0), (3e-5, 1.0), (2000.0, 1.0), (1.0, 1e-3), (3.0, 1e-4))]


@pytest.mark.parametrize(("kind", "size", "hidden"), [*SIZES, ("bf16", 1.0, 1.0), ("bf16", 3.0, 1e-4)])
@pytest.mark.parametrize("name", ["torch", "workspace"])
def test_no_gradient_is_rounded_twice(name: str, kind: str, size: float, hidden: float) -> None:
    """Of hidden states of any size: float16 has few digits below 6e-5."""
    dtype, off = KINDS[kind], [[0.0, 0.0] for _ in range(3)]
    # The workspace's kernels are interpreted, a program a token; 130 are more than a tile of its product has.
    tokens, seeds = (300, 3) if name == "torch" else (130, 1)
    for seed in range(seeds):
        given, upstream = drawn(tokens, seed, dtype, size, hidden)
        exact = eager(given, upstream, torch.float64)
        with ValueGPU().here(90):
            inputs = HeadInputs(*(OnGPU(given[n]) for n in ("hidden", "weight", "bias", "targets")), None)
            backend: Any = backends.load(name)
            found = backend.token_logps_forward(inputs, HeadOptions())
            gradients = backend.token_logps_backward(
                OnGPU(upstream), inputs, found.lse, found.route, HeadOptions(), Needs(True, True, True)
            )
        for pair, got, rounded, want in zip(off, gradients, eager(given, upstream, dtype), exact, strict=True):
            pair[0] += error(got.value.to(dtype), want) ** 2
            pair[1] += error(rounded, want) ** 2
    for own, others in off:
        assert own**0.5 <= 1.05 * others**0.5


@pytest.mark.parametrize("count", [1, 40, 129])
@pytest.mark.parametrize(("vocabulary", "width"), [(150, 32), (300, 64), (64, 16)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_kernel_rounds_the_weight_s_gradient_once(kind: str, vocabulary: int, width: int, count: int) -> None:
    """Half a unit in the last place from the exact product, what pads the words being anything; in float32 as well."""
    dtype, draw = KINDS[kind], torch.Generator().manual_seed(count)
    padded = -(-vocabulary // 64) * 64
    left, right = (torch.randn(count, columns, generator=draw).to(dtype) for columns in (padded, width))
    left[:, vocabulary:] = float("nan")
    scale, unit = torch.tensor(0.3), torch.tensor(0.5)
    wanted = 0.5 * float(scale) * (left[:, :vocabulary].double().t() @ right.double())
    with ValueGPU().here(90):
        factors = Factors(OnGPU(left), OnGPU(right), OnGPU(unit))
        assert persistent.multiplies(factors)
        for kept in (dtype, torch.float32):
            found = weight_gradient(factors, OnGPU(scale), vocabulary, kept).value
            assert found.dtype == kept
            assert found.shape == (vocabulary, width)
            assert ((found.double() - wanted).abs() <= torch.finfo(kept).eps / 2 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize(("capability", "width", "count"), [(80, 64, 8), (100, 64, 8), (90, 40, 8), (90, 64, 0)])
def test_other_products_are_the_library_s(capability: int, width: int, count: int) -> None:
    left, right, unit = torch.zeros(count, 128), torch.zeros(count, width), torch.ones(())
    with ValueGPU().here(capability):
        factors = Factors(*(OnGPU(t.bfloat16()) for t in (left, right)), OnGPU(unit))
        assert not persistent.multiplies(factors)


@pytest.mark.parametrize("strides", [(1, 1), (1, 40)])
def test_a_single_token_of_any_strides(strides: tuple[int, int]) -> None:
    """Torch calls [1, H] contiguous whatever its first stride is; TMA does not."""
    right = torch.arange(64.0).bfloat16().as_strided((1, 32), (strides[0], 1))
    left, unit = torch.ones(1, 192).bfloat16(), torch.ones(())
    with ValueGPU().here(90):
        found = weight_gradient(Factors(OnGPU(left), OnGPU(right), OnGPU(unit)), None, 150, torch.float32).value
    assert torch.equal(found, right.float().expand(150, 32))


@pytest.mark.parametrize("shape", [(1,), (5, 3), (300, 16), (4097,), (0, 4)])
@pytest.mark.parametrize("kind", [*KINDS, "fp32"])
def test_what_is_scaled_is_rounded_once(kind: str, shape: tuple[int, ...]) -> None:
    """As torch multiplies and rounds, bit for bit, infinities and NaN as well; nothing beside it is written."""
    dtype = (KINDS | {"fp32": torch.float32})[kind]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values.view(-1)[3:5] = torch.tensor([float("inf"), float("nan")])[: max(0, values.numel() - 3)]
    factor, room = torch.tensor(0.3), torch.full((values.numel() + 8,), 7.0).to(dtype)
    with ValueGPU().here(90):
        scaled(OnGPU(values), OnGPU(factor), OnGPU(room[: values.numel()].view(shape)))
    torch.testing.assert_close(
        room[: values.numel()].view(shape), (values * 0.3).to(dtype), rtol=0, atol=0, equal_nan=True
    )
    assert (room[values.numel() :] == 7).all()
