"""`torch.use_deterministic_algorithms(True)` on a GPU: nothing that torch refuses there, and the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from clha_fast.backends.torch.routing import kept_blocks
from tests.backends.test_value_gpu import QUICK, run
from tests.support.value_gpu import OnGPU, ValueGPU

pytestmark = pytest.mark.usefixtures("bfloat16_kernels", "deterministic")


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dropped", [0.0, 1e-6, 0.01, 0.3, 0.95])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 64, 1002])
def test_the_blocks_that_stay_are_those_of_a_cpu(blocks: int, dropped: float) -> None:
    """Peaked masses, with some of 0, a target's block (infinite) and a token of NaN."""
    draw = torch.Generator().manual_seed(blocks)
    masses = torch.softmax(3 * torch.randn(blocks, 40, generator=draw), 0)
    masses[torch.rand(masses.shape, generator=draw) < 0.1] = 0
    masses[torch.randint(blocks, (20,), generator=draw), torch.arange(20)] = torch.inf
    masses[:, 33] = torch.nan
    with ValueGPU().here():
        found = kept_blocks(OnGPU(masses), dropped).value
    assert torch.equal(found, kept_blocks(masses, dropped))
    left_out = torch.where(found, 0, masses).sum(0, dtype=torch.float64)
    assert bool((left_out <= dropped * (1 + 1e-12)).all())
    assert found[:, 33].all()


@pytest.mark.parametrize("entry", ["loss", "logps"])
@pytest.mark.parametrize(
    ("backend", "kind", "name", "capability", "sizes"),
    [row for row in QUICK if row[0] == "torch"]
    + [("torch", "fp32", "routed", 90, "cpu"), ("torch", "bf16", "routed", 90, "cpu")]
    + [("triton", "fp16", "routed", 90, "cpu"), ("workspace", "fp16", "chunks", 90, "cpu")],
)
def test_values_and_gradients(entry: str, backend: str, kind: str, name: str, capability: int, sizes: str) -> None:
    run(entry, backend, kind, name, capability, sizes)
