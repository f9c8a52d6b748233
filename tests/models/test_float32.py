"""16 bits computed in float32: what is widened, and that the weights stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clha_fast.models.float32 import in_float32

IDS = torch.tensor([[1, 3]])


class Made(TorchDispatchMode):
    """The most numbers of a float32 tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves(found) if isinstance(part, Tensor)]
        self.most = max([self.most, *(part.numel() for part in tensors if part.dtype == torch.float32)])
        return found


READ: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "an expert": (lambda weight: weight[2] * 3, 8),
    "experts": (lambda weight: weight[IDS[0]] * 3, 16),
    "words": (lambda weight: functional.embedding(IDS, weight) * 3, 16),
    "all": (lambda weight: weight * 3, 800),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_widened_and_no_more(name: str, dtype: torch.dtype) -> None:
    read, most = READ[name]
    weight = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with in_float32(nn.Module(), torch.device("cpu")), Made() as made:
        found = read(weight)
        assert weight.dtype == torch.float32
    assert found.dtype == torch.float32
    assert torch.equal(found, read(weight.float()))
    assert made.most == most
    assert weight.dtype == dtype


class Keeps(nn.Module):
    """Keeps what it has computed, as models keep tables and masks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=dtype))
        self.register_buffer("grown", torch.randn(3, dtype=dtype))
        self.table, self.mask = torch.randn(3, dtype=dtype), None

    def forward(self, inputs: Tensor, fails: bool) -> Tensor:
        self.weight = nn.Parameter(self.weight.to(inputs.device))
        self.grown = torch.cat([self.grown, self.grown])
        self.table, self.mask, self.new = self.table.to(inputs.device), torch.ones_like(self.table), self.table + 1
        if fails:
            raise RuntimeError
        return self.weight + self.table


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_keeps_of_it_is_gone(dtype: torch.dtype, fails: bool) -> None:
    model = nn.Sequential(Keeps(dtype))
    held = dict(vars(model[0])), *model[0].parameters(), *model[0].buffers()
    with contextlib.suppress(RuntimeError), in_float32(model, torch.device("cpu")):
        assert model[0](torch.ones(3), fails).dtype == torch.float32
    found = dict(vars(model[0])), *model[0].parameters(), *model[0].buffers()
    assert held[0].keys() == found[0].keys()
    assert all(held[0][name] is found[0][name] for name in held[0])
    assert all(before is after for before, after in zip(held[1:], found[1:], strict=True))
