"""The host side of the Triton backend asks nothing of the device: same operators and grids whatever the data are.

That is what "no synchronisation" and "capturable in a CUDA graph" rest on; `test_gpu_triton` sees both on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clha_fast.backends.triton import backend as triton_backend
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.options import HeadOptions
from clha_fast.types import Needs, RankingInputs
from csrc_triton import backward, forward, persistent_backward, routed, routing
from csrc_triton import clha as ranking
from tests.support.triton_harness import DEVICE, PLAIN, RICH, Problem, every_dtype, problem

# What brings values of a tensor to the host, or makes a shape of them.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount", "item")


class Recorder(TorchDispatchMode):
    """Every operator with the shapes of what it returns."""

    def __init__(self, steps: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.steps.append((str(func), tuple(tuple(t.shape) for t in made if isinstance(t, Tensor))))
        return result


class Launches:
    """A kernel that notes its grid and launches nothing: operators of the interpreter itself would be recorded too."""

    def __init__(self, name: str, steps: list[tuple[str, Any]]) -> None:
        self.name, self.steps = name, steps

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.steps.append((self.name, grid))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    taken: list[tuple[str, Any]] = []
    for module in (backward, forward, persistent_backward, ranking, routed, routing):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches(name, taken))
    return taken


def run(p: Problem, grad: Tensor, sizes: list[int], steps: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    lengths = torch.tensor(sizes, device=DEVICE)
    r = RankingInputs(lengths, torch.tensor([2, 2], device=DEVICE), rewards=lengths.float())
    steps.clear()
    with Recorder(steps):
        result = triton_backend.loss_forward(p.inputs, r, p.head, PUBLISHED)
        triton_backend.token_logps_backward(
            grad, p.inputs, result.lse, result.route, p.head, Needs(True, True, p.bias is not None)
        )
    return list(steps)


@every_dtype
@pytest.mark.parametrize("head", [PLAIN, RICH, PLAIN.replace(max_dropped_mass=0.1)], ids=["plain", "rich", "routed"])
def test_nothing_depends_on_the_data(head: HeadOptions, dtype: torch.dtype, steps: list[tuple[str, Any]]) -> None:
    head = head.replace(workspace_bytes=20_000)
    taken = []
    for seed, ignored, sizes in [(0, 0.0, [10, 10, 10, 40]), (1, 0.5, [0, 70, 0, 0]), (2, 1.1, [20, 20, 20, 10])]:
        p = problem(70, 300, 48, dtype=dtype, head=head, bias=True, rows=30, ignored=ignored, seed=seed)
        grad = torch.full((70,), float(seed), device=DEVICE)
        taken.append(run(p, grad, sizes, steps))
    assert taken[0] == taken[1] == taken[2]
    names = {name for name, _ in taken[0]}
    assert any("kernel" in name for name in names)
    assert not [name for name in names if any(word in name.split(".") for word in WAITING)]
    expected = "routed_logit_grad" if head.max_dropped_mass is not None else "logit_grad"
    if dtype.itemsize == 2 and head.max_dropped_mass is None and DEVICE == "cpu":
        expected = "persistent_logit_grad"
    assert f"{expected}_kernel" in names


def test_the_recorder_sees_what_it_is_meant_to_see() -> None:
    taken: list[tuple[str, Any]] = []
    with Recorder(taken):
        values = torch.ones(3)
        values.sum().item()
        values.nonzero()
    names = {name for name, _ in taken}
    assert len([name for name in names if any(word in name.split(".") for word in WAITING)]) == 2
