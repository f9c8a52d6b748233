"""What a model multiplies, and what is then rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from clha_fast.models.rounding import rounding_of
from clha_fast.rewards.rows import drift_of
from tests.support.reward_models import llama
from tests.support.tiny import make_model

# The eps of a model's products, and what its rewards may then move by.
DTYPES = {
    torch.float64: (2.0**-52, 1e-3),
    torch.float32: (2.0**-23, 1e-3),
    torch.float16: (2.0**-10, 0.00625),
    torch.bfloat16: (2.0**-7, 0.05),
}


@pytest.mark.parametrize("make", [lambda: make_model(40), llama])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_s_own_dtype_and_autocast(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    assert (rounding_of(model), drift_of(model)) == pytest.approx(DTYPES[dtype])
    for narrow in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", narrow):
            expected = DTYPES[dtype] if dtype == torch.float64 else max(DTYPES[dtype], DTYPES[narrow])
            assert (rounding_of(model), drift_of(model)) == pytest.approx(expected)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has one switch, of GPUs")
@pytest.mark.parametrize(("name", "dtype"), [("high", torch.float16), ("medium", torch.bfloat16)])
def test_float32_that_torch_narrows(name: str, dtype: torch.dtype) -> None:
    """TF32 has float16's digits."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(name)
        model = make_model(40)
        assert (rounding_of(model), drift_of(model)) == pytest.approx(DTYPES[dtype])
        assert rounding_of(model.double()) == DTYPES[torch.float64][0]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantised_weights_are_multiplied_in_another_dtype(bits: dict[str, bool], dtype: torch.dtype) -> None:
    model = make_model(40).to(dtype)
    model.config.quantization_config = BitsAndBytesConfig(**bits)  # as from_pretrained leaves it
    assert (rounding_of(model), drift_of(model)) == pytest.approx(DTYPES[torch.bfloat16])
