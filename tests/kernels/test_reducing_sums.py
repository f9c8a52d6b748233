"""dhidden's sums, and dweight's of several chunks of tokens, are added to by reducing stores: who adds to what, in
which launch, and behind which barrier.

Between two launches of a stream the order is the device's; within one nothing orders two programs, and nothing but a
barrier orders two threads of one. So a launch may add to an address twice in one program alone, with a barrier between.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from clha_fast.backends.triton.backward import Active, Backward
from clha_fast.backends.triton.head import Head
from clha_fast.backends.triton.persistent import PersistentBackward
from clha_fast.options import ROUTE_WORDS
from clha_fast.types import Needs
from tests.support.triton_harness import (
    DEVICE,
    PLAIN,
    close,
    eager_gradients,
    forward,
    gradients,
    problem,
    set_routed_dhidden,
    upstream,
)

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="recorded in the interpreter")


class Add(NamedTuple):
    """One reducing store of a program: the addresses that it adds to."""

    launch: int
    program: tuple[int, int, int]
    barriers: int
    addresses: np.ndarray


class Recorder:
    """What the interpreter's programs add, from `patch` on; outside all of `bounds`, if there are any, nothing is."""

    def __init__(self) -> None:
        self.adds: list[Add] = []
        self.launches = self.barriers = 0
        self.bounds: list[tuple[int, int]] = []

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        old = {name: getattr(InterpreterBuilder, name) for name in ("create_atomic_rmw", "set_grid_dim")}

        def add(builder: Any, operator: Any, pointer: Any, value: Any, mask: Any, *order: Any) -> Any:
            addresses = pointer.data[mask.data]
            if self.bounds:
                inside = [(addresses >= first) & (addresses < end) for first, end in self.bounds]
                assert np.logical_or.reduce(inside).all(), "beside the sums"
            self.adds.append(Add(self.launches, builder.grid_idx, self.barriers, addresses))
            return old["create_atomic_rmw"](builder, operator, pointer, value, mask, *order)

        def launch(builder: Any, *grid: int) -> None:
            self.launches += 1
            old["set_grid_dim"](builder, *grid)

        def barrier(builder: Any) -> None:
            self.barriers += 1

        monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", add)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", launch)
        monkeypatch.setattr(InterpreterBuilder, "create_barrier", barrier)

    def check(self) -> None:
        """One order for every sum: of a launch's additions to an address one program's, a barrier between any two."""
        seen: dict[tuple[int, int], tuple[tuple[int, int, int], int]] = {}
        for one in self.adds:
            assert len(np.unique(one.addresses)) == one.addresses.size, "twice in one store"
            for address in one.addresses.ravel().tolist():
                program, barriers = seen.get((one.launch, address), (one.program, -1))
                assert program == one.program, "two programs of a launch"
                assert barriers < one.barriers, "no barrier between two stores"
                seen[one.launch, address] = one.program, one.barriers


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    found.patch(monkeypatch)
    return found


def test_the_check_can_fail() -> None:
    here = np.array([[8, 12]])
    for adds in (
        [Add(1, (0, 0, 0), 0, np.array([8, 8]))],
        [Add(1, (0, 0, 0), 0, here), Add(1, (1, 0, 0), 1, here)],
        [Add(1, (0, 0, 0), 3, here), Add(1, (0, 0, 0), 3, here)],
    ):
        recorder = Recorder()
        recorder.adds = adds
        with pytest.raises(AssertionError):
            recorder.check()
    recorder.adds = [Add(1, (0, 0, 0), 3, here), Add(1, (0, 0, 0), 4, here), Add(2, (1, 0, 0), 4, here)]
    recorder.check()


# Tokens, words, H and workspace: 32 x 32 x 32 tiles, three programs. In the last token chunk of the fourth fewer tiles
# stand than in the first, and two parts would end sooner: they have no rows.
SHAPES = [
    pytest.param(20, 190, 48, None, id="three parts"),
    pytest.param(20, 400, 48, 12288, id="three parts, three chunks of words"),
    pytest.param(70, 70, 80, None, id="more tiles than programs"),
    pytest.param(148, 150, 32, 16384, id="two chunks of tokens, the second short"),
    pytest.param(1, 1, 16, None, id="one token and word"),
]


@pytest.mark.parametrize(("tokens", "vocabulary", "width", "workspace_bytes"), SHAPES)
def test_dense(recorder: Recorder, tokens: int, vocabulary: int, width: int, workspace_bytes: int | None) -> None:
    p = problem(tokens, vocabulary, width, dtype=torch.float16)
    ready, lse, grad = Head.of(p.inputs, p.head), forward(p).lse, upstream(p)
    assert ready.is_persistent_backward
    sweeps = []
    for kind in (PersistentBackward, Backward):
        sweep = kind(p.hidden, ready, Active.of(grad, ready, tokens), lse, workspace_bytes, Needs(True, True, False))
        rows = sweep.drows
        assert rows is not None
        sums = [rows] if sweep.partial is None else [rows, sweep.partial]
        recorder.bounds = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in sums]
        sweep.run()
        sweeps.append(sweep)
        if kind is PersistentBackward:
            assert recorder.adds
            recorder.check()
            recorder.adds.clear()
    assert not recorder.adds
    for name in ("dhidden", "dweight"):
        torch.testing.assert_close(getattr(sweeps[0], name), getattr(sweeps[1], name), rtol=2e-3, atol=1e-3)


def test_no_chunk_has_more_parts_than_rows_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched: the parts of every chunk, on devices of several sizes."""
    for tokens, width, processors in itertools.product((1, 33, 148, 330), (32, 80), (1, 3, 20, 132)):
        monkeypatch.setattr("clha_fast.backends.triton.persistent.programs", lambda device, count=processors: count)
        for vocabulary, workspace_bytes in itertools.product((20, 150, 700), (1, 4096, 16384, 65536, None)):
            p = problem(tokens, vocabulary, width, dtype=torch.float16)
            ready = Head.of(p.inputs, p.head)
            active, needs = Active.of(torch.ones(tokens), ready, tokens), Needs(True, False, False)
            sweep = PersistentBackward(p.hidden, ready, active, torch.zeros(tokens), workspace_bytes, needs)
            assert sweep.drows is not None
            assert sweep.drows.shape[0] == sweep.parts * sweep.rows.shape[0]
            for first_word in range(0, vocabulary, sweep.chunks.words):
                for first_token in range(0, tokens, sweep.chunks.tokens):
                    chunk = sweep._chunk(first_token, first_word)
                    assert 1 <= sweep._parts(chunk) <= sweep.parts
                    assert chunk.dlogits.shape[1] % (32 * sweep._parts(chunk)) == 0


@pytest.mark.parametrize(
    ("resident", "workspace_bytes", "dtype"),
    [(1, None, torch.float32), (1, 1, torch.float16), (99, None, torch.float16)],
    ids=["several segments a program", "a block a launch", "a segment a program"],
)
def test_routed(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    resident: int,
    workspace_bytes: int | None,
    dtype: torch.dtype,
) -> None:
    set_routed_dhidden(monkeypatch, RESIDENT=resident)
    head = PLAIN.replace(max_dropped_mass=0.0, workspace_bytes=workspace_bytes)
    p = problem(70, 2 * ROUTE_WORDS + 9, 40, dtype=dtype, head=head, rows=60)
    value = gradients(p, upstream(p), (True, False, False))[0]
    assert value is not None
    close(value, eager_gradients(p, upstream(p), torch.float64)[0], 1e-6 if dtype == torch.float32 else 2e-3)
    assert recorder.adds
    recorder.check()
