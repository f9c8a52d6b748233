"""The host never waits for a GPU: nothing is read back, by torch's dispatcher here and by its debug mode on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clha_fast import HeadOptions, backends
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.types import STATISTICS, EntropySlopes, Needs
from tests.support.helpers import make_case
from tests.support.triton_harness import DEVICE, every_dtype

RAGGED = ([5, 3, 0, 7, 2, 4, 6, 1, 3], [3, 1, 2, 3])
BACKENDS = ["workspace", "triton"]
HEAD = HeadOptions(workspace_bytes=6 * 64 * 4)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: values read back, and shapes that depend on values."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{name} reads a value back"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None
        return func(*args, **(kwargs or {}))


@every_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_reads_nothing_back(backend: str, dtype: torch.dtype) -> None:
    case = make_case(*RAGGED, rows=9, bias=True, rewards=True, sft_index=True, dtype=dtype)
    head = [None if t is None else t.to(DEVICE) for t in case.head]
    inputs, needs = case.head._replace(**dict(zip(case.head._fields, head, strict=True))), Needs(True, True, True)
    module = backends.load(backend)
    with NoWaiting():
        if backend in backends.SWEEPING:
            module.loss_sweep(inputs, case.ranking, HEAD, PUBLISHED, needs)
        else:
            module.loss_forward(inputs, case.ranking, HEAD, PUBLISHED)
        logps, lse, route = module.token_logps_forward(inputs, HEAD)
        module.token_logps_backward(torch.ones_like(logps), inputs, lse, route, HEAD, needs)
        logps, lse, values = module.statistics_forward(inputs, HEAD, STATISTICS)
        slopes = EntropySlopes(torch.ones_like(logps), values["entropy"])
        module.statistics_backward(torch.ones_like(logps), slopes, inputs, lse, HEAD, needs)
    with pytest.raises(AssertionError, match="reads a value back"), NoWaiting():
        logps.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_synchronisation(backend: str, sizes: str) -> None:
    """Forward and backward under torch's sync debug mode, with the sizes on either side."""
    case = make_case(*RAGGED, rows=30, bias=True, rewards=True, dtype=torch.bfloat16)
    moved = {name: t.cuda() for name, t in case.head._asdict().items() if t is not None}
    moved |= {name: t.to(sizes) for name, t in case.ranking._asdict().items() if t is not None}
    case = case.replace(**moved)
    leaves = case.leaves()
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = case.loss(backend, head=HEAD)
            torch.autograd.grad(loss, leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
