"""Where 16 bits can be multiplied into float32, and which backends go by it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from clha_fast.backends import products
from clha_fast.backends.triton.workspace import _product
from clha_fast.errors import BackendError
from clha_fast.ops.dispatch import ANY_NUMBER, resolve, token_limit
from tests.support.no_gpu import told
from tests.support.value_gpu import OnGPU, ValueGPU

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
GPU = torch.device("cuda", 0)
SWITCH = r"no product of float16 with .* torch\.backends\.cuda\.matmul\.allow_fp16_accumulation is set"


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    """Torch's own switch is afterwards as it was."""
    was = torch.backends.cuda.matmul.allow_fp16_accumulation
    products._tried.cache_clear()
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = was
    products._tried.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "allowed", "reason"),
    [
        (70, BFLOAT, False, r"no product of bfloat16 .* below compute capability 8\.0, and the device's is 7\.0"),
        (75, BFLOAT, True, r"no product of bfloat16 .* and the device's is 7\.5"),
        (75, HALF, False, None),
        (75, HALF, True, SWITCH),
        (80, BFLOAT, True, None),
        (90, HALF, True, SWITCH),
        (90, HALF, False, None),
        (100, BFLOAT, False, None),
    ],
)
def test_the_rules_of_cuda(capability: int, dtype: torch.dtype, allowed: bool, reason: str | None) -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = allowed
    with told(capability, 3):
        found = products.why_not_wide(GPU, dtype)
    assert (found is None) if reason is None else (found is not None and re.search(reason, found))


def test_workspace_is_not_chosen_without_them_and_says_why_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    head = (32000, 2048)
    with told(90, 3):
        for allowed, limit, name in (
            (False, ANY_NUMBER, "workspace"),
            (True, 0, "triton"),
            (False, ANY_NUMBER, "workspace"),
        ):
            torch.backends.cuda.matmul.allow_fp16_accumulation = allowed
            assert token_limit("cuda", HALF, *head) == limit
            assert resolve("auto", "cuda", HALF, gradients=True, limit=limit, fits=limit > 0) == name
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
        with pytest.raises(BackendError, match=f"^backend 'workspace' cannot run: torch has {SWITCH}"):
            resolve("workspace", "cuda", HALF, gradients=True)
        # Other dtypes and backends are not concerned.
        assert token_limit("cuda", BFLOAT, *head) == token_limit("cuda", FLOAT, 16000, 2048) == ANY_NUMBER
        for name in ("triton", "torch", "reference"):
            assert resolve(name, "cuda", HALF) == name
        assert resolve("workspace", "cuda", FLOAT) == resolve("workspace", "cuda", BFLOAT) == "workspace"


@pytest.mark.parametrize("backend", ["triton", "workspace"])
def test_the_interpreter_is_refused_bfloat16_on_a_gpu_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with told(90, 3):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(BackendError, match=r"cannot run: .*TRITON_INTERPRET=1 asks for, computes bfloat16 wrongly"):
            resolve(backend, "cuda", BFLOAT)
        assert resolve("auto", "cuda", BFLOAT) == "torch"
        assert resolve(backend, "cuda", HALF) == backend
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert resolve(backend, "cuda", BFLOAT) == backend


def test_on_rocm_one_product_is_tried() -> None:
    class Refuses(ValueGPU):
        tried = 0

        def _compute(self, func, args, kwargs):
            if func.overloadpacket.__name__ == "mm":
                self.tried += 1
                raise RuntimeError("gemm input type at::Half and output type float is not supported for ROCm\nat gemm")
            return super()._compute(func, args, kwargs)

    with Refuses().here(942) as gpu:
        for _ in range(2):
            with pytest.raises(BackendError, match=r"cannot run: gemm input type .* not supported for ROCm; backend"):
                resolve("workspace", "cuda:0", HALF)
        assert token_limit("cuda:0", HALF, 32000, 2048) == 0
        assert gpu.tried == 1
    products._tried.cache_clear()
    with ValueGPU().here(942):
        assert resolve("workspace", "cuda:0", HALF) == "workspace"


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [3, 70])
def test_workspaces_products_widen_where_the_switch_is_set_between_them(rows: int, add: bool) -> None:
    """Forward and backward are two calls: what a forward has left is multiplied, whatever was set since."""
    a, b = torch.randn(rows, 8).to(HALF), torch.randn(8, 5).to(HALF)
    before = torch.randn(rows, 5)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    with ValueGPU().here(90):
        out = OnGPU(before.clone())
        _product(OnGPU(a), OnGPU(b), out, add)
    torch.testing.assert_close(out.value, a.float() @ b.float() + (before if add else 0))
