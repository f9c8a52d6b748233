"""bfloat16 in the interpreter as `tests.support.bfloat16` mends it: by hand, against torch's, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from clha_fast.errors import BackendError
from tests.support.bfloat16 import narrow, widen
from tests.support.triton_harness import DEVICE, forward, problem

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 is tested as itself there")


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, wide_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at, mask=i[None, :] > 0, other=3.0)
    b = tl.where(i[:, None] == 1, 0.5, b)
    z = tl.dot(a, tl.trans(b), tl.zeros((N, N), tl.float32))
    tl.store(wide_ptr + at, z)
    tl.store(out_ptr + at, z.to(tl.bfloat16))


@triton.jit
def sum_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(x_ptr))


def test_nearest_even_by_hand() -> None:
    """Eight bits: between 1 and 1 + 2^-7 half goes to 1, between 1 + 2^-7 and 1 + 2^-6 half goes up."""
    numbers = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -3.4e38, 1e-40, -0.0]
    rounded = widen(narrow(np.array(numbers, np.float32)))
    assert rounded[:3].tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]
    wanted = torch.tensor(numbers).bfloat16().float()
    assert torch.equal(torch.from_numpy(rounded).view(torch.int32), wanted.view(torch.int32))


def test_every_float32_pattern_of_a_stride_is_rounded_as_torch_rounds_it() -> None:
    bits = torch.arange(-(2**31), 2**31 - 1, 4001, dtype=torch.int64).to(torch.int32)
    numbers = bits.view(torch.float32)
    found = torch.from_numpy(narrow(numbers.numpy()).view(np.int16)).view(torch.bfloat16)
    wanted = numbers.bfloat16()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])
    assert narrow(np.array([np.inf, -np.inf, 3.4028235e38], np.float32)).tolist() == [0x7F80, 0xFF80, 0x7F80]


@pytest.mark.usefixtures("bfloat16_kernels")
def test_loads_constants_selections_dots_and_stores() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=draw).bfloat16() for _ in range(2))
    out, wide = torch.empty_like(a), torch.empty(16, 16)
    product_kernel[(1,)](a, b, out, wide, N=16)
    b[:, 0], b[1] = 3.0, 0.5
    exact = a.double() @ b.double().T
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-5)
    assert torch.equal(out, wide.bfloat16())


@pytest.mark.usefixtures("bfloat16_kernels")
def test_arithmetic_in_bfloat16_is_refused() -> None:
    x = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic in bfloat16"):
        sum_kernel[(1,)](x, x.clone())


def test_outside_of_the_fixture_the_library_refuses_it(request: pytest.FixtureRequest) -> None:
    from clha_fast import functional

    p = problem(4, 9, 8, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="interpreter computes bfloat16 wrongly"):
        functional.token_logps(p.hidden, p.weight, p.targets, backend="triton")
    request.getfixturevalue("bfloat16_kernels")
    logps = functional.token_logps(p.hidden, p.weight, p.targets, backend="triton")
    assert torch.equal(logps, forward(p).logps)
