"""The persistent kernels by tensor descriptors: when they run, and that they say what the pointer kernels say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clha_fast.backends.triton import forward as triton_forward
from clha_fast.backends.triton.backward import Active, Backward
from clha_fast.backends.triton.head import Head, programs, tiles
from clha_fast.backends.triton.persistent import PersistentBackward, even_parts
from clha_fast.options import HeadOptions
from clha_fast.types import Needs
from csrc_triton import configs
from tests.support.parameters import covered
from tests.support.triton_harness import (
    DEVICE,
    NAMED_HALVES,
    PLAIN,
    RICH,
    Problem,
    both_halves,
    eager_gradients,
    error,
    exact_logps,
    forward,
    gradients,
    problem,
)

HALF = torch.float16


def statistics(
    p: Problem, by_pointers: bool = False, copy: int | None = None, routed: bool = False
) -> list[torch.Tensor]:
    head = Head.of(p.inputs, p.head)
    assert head.is_persistent
    if by_pointers:
        head = dataclasses.replace(head, weight_descriptor=False)
    return list(triton_forward.launch_head(p.hidden, head, copy, routed)[:3])


HEADS = {"plain": PLAIN, "rich": RICH}


@pytest.mark.parametrize(
    ("bias", "rows", "head", "dtype"),
    covered({"plain": (False, None), "bias": (True, None), "shared rows": (False, 11)}, HEADS, NAMED_HALVES),
)
@pytest.mark.usefixtures("bfloat16_kernels", "poisoned_memory")
def test_same_bits_as_the_pointer_kernel(bias: bool, rows: int | None, head: HeadOptions, dtype: torch.dtype) -> None:
    p = problem(100, 170, 72, dtype=dtype, head=head, bias=bias, rows=rows, ignored=0.2)
    config = configs.select("persistent_forward", "interpreter", "16-bit")
    if DEVICE == "cpu":
        assert tiles(100, config["BLOCK_N"]) * tiles(170, config["BLOCK_V"]) > programs(p.hidden.device)
    for value, wanted in zip(statistics(p), statistics(p, by_pointers=True), strict=True):
        if DEVICE == "cpu":
            assert torch.equal(value, wanted)
        else:
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@both_halves
@pytest.mark.usefixtures("poisoned_memory")
def test_the_copy_in_chunks_changes_nothing(dtype: torch.dtype) -> None:
    p = problem(100, 70, 44, dtype=dtype, rows=30)  # 44 columns: the copy's rows are padded to 48
    p.weight = torch.nn.functional.pad(p.weight, (0, 4), value=float("nan"))[:, :44]
    for value, wanted in zip(statistics(p, copy=1), statistics(p), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("by_pointers", [False, True], ids=["persistent", "pointers"])
@both_halves
@pytest.mark.usefixtures("poisoned_memory")
def test_statistics_narrower_than_a_tile(
    by_pointers: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(40, 106, 40, dtype=dtype, bias=True)
    plain = statistics(p, by_pointers)
    monkeypatch.setattr(triton_forward, "ROUTE_WORDS", 16)
    narrow = statistics(p, by_pointers, routed=True)
    assert narrow[0].shape == narrow[1].shape == (7, 40)
    assert torch.equal(narrow[2], plain[2])
    raw = (p.hidden.float() @ p.weight.float().T + p.bias.float()).double()  # type: ignore[union-attr]
    blocks = torch.nn.functional.pad(raw, (0, 6), value=float("-inf")).unflatten(1, (7, 16))
    torch.testing.assert_close(narrow[0].T.double(), blocks.amax(2), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close((narrow[0] + narrow[1].log()).T.double(), blocks.logsumexp(2), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("bias", "rows", "workspace_bytes", "skipped", "head", "dtype"),
    covered(
        {
            "one chunk": (True, None, None, 0.0),
            "shared rows, half skipped": (False, 11, 1, 0.5),
            "chunks": (True, None, 5000, 0.2),
            "all skipped": (True, None, 1, 1.1),
        },
        HEADS,
        NAMED_HALVES,
    ),
)
@pytest.mark.usefixtures("bfloat16_kernels", "poisoned_memory")
def test_gradients_have_the_same_bits(
    bias: bool, rows: int | None, workspace_bytes: int | None, skipped: float, head: HeadOptions, dtype: torch.dtype
) -> None:
    # 44 columns: the sorted rows are padded to 48.
    p = problem(70, 150, 44, dtype=dtype, head=head, bias=bias, rows=rows, ignored=0.1)
    p.weight = torch.nn.functional.pad(p.weight, (0, 4), value=float("nan"))[:, :44]
    draw = torch.Generator().manual_seed(0)
    grad = torch.where(torch.rand(70, generator=draw) < skipped, 0.0, torch.randn(70, generator=draw)).to(DEVICE)
    ready, lse = Head.of(p.inputs, p.head), forward(p).lse
    assert ready.is_persistent or DEVICE == "cuda"
    active = Active.of(grad, ready, p.hidden.shape[0])
    results = []
    for kind in (PersistentBackward, Backward):
        sweep = kind(p.hidden, ready, active, lse, workspace_bytes, Needs(True, True, bias))
        sweep.run()
        results.append([sweep.dhidden, sweep.dweight, sweep.dbias])
    for value, wanted in zip(*results, strict=True):
        if DEVICE == "cpu":
            assert value is wanted is None or torch.equal(value, wanted)
        elif value is not None:
            torch.testing.assert_close(value, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "tiles_of_rows", "programs", "parts"),
    [
        # 16 tiles on 132 multiprocessors: 6 parts end after a turn of a sixth, 12 after two of a twelfth.
        (2004, 16, 132, 6),
        (2004, 64, 132, 2),
        # More than a tile a multiprocessor: two parts would hold twice the sums.
        (2004, 153, 132, 1),
        (2004, 264, 132, 1),
        (1, 1, 132, 1),
        # Seven blocks have no other divisor: two turns of a seventh.
        (7, 1, 4, 7),
    ],
)
def test_few_tiles_are_cut_into_parts_that_end_soonest(
    blocks: int, tiles_of_rows: int, programs: int, parts: int
) -> None:
    assert even_parts(blocks, tiles_of_rows, programs, 2 * programs // tiles_of_rows) == parts


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's three programs decide how many parts there are")
@pytest.mark.parametrize(("vocabulary", "workspace_bytes"), [(190, None), (400, 12288)], ids=["one chunk", "three"])
@both_halves
@pytest.mark.usefixtures("poisoned_memory")
def test_dhidden_of_few_tokens_in_parts(vocabulary: int, workspace_bytes: int | None, dtype: torch.dtype) -> None:
    """20 tokens are 2 tiles for 3 programs: three parts of 64 words, added in order; the last chunk has one block."""
    p = problem(20, vocabulary, 48, dtype=dtype)
    grad = torch.randn(20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ready, lse = Head.of(p.inputs, p.head), forward(p).lse
    found = []
    for kind in (PersistentBackward, PersistentBackward, Backward):
        sweep = kind(p.hidden, ready, Active.of(grad, ready, 20), lse, workspace_bytes, Needs(True, True, False))
        assert getattr(sweep, "parts", 3) == 3
        sweep.run()
        assert sweep.dhidden is not None
        found.append(sweep.dhidden)
    assert torch.equal(found[0], found[1])
    exact, eager = (eager_gradients(p, grad, of)[0] for of in (torch.float64, dtype))
    assert error(found[0], exact) <= 1.05 * max(error(eager, exact), error(found[2], exact))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shift", "scale"), [(-20.0, 1.0), (-200.0, 1.0), (200.0, -1.0), (200.0, 0.0)])
@both_halves
def test_words_behind_the_last_are_nothing(shift: float, scale: float, bias: bool, dtype: torch.dtype) -> None:
    """A tile's padding words have logit 0, whose exponential is infinite beside a log-sum-exp far below: no NaN."""
    p = problem(20, 50, 48, dtype=dtype, bias=bias, head=PLAIN.replace(scale=scale))
    assert Head.of(p.inputs, p.head).is_persistent_backward or DEVICE == "cuda"
    p.hidden[:, 0], p.weight[:, 0] = 1.0, shift
    grad = torch.randn(20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = eager_gradients(p, grad, torch.float64)
    found, eagers = gradients(p, grad), eager_gradients(p, grad, dtype)
    # The exact sums of dhidden's column of shifts are 0: how a token's roundings cancel in them is chance.
    for gradient in (found, eagers, exact):
        gradient[0] = gradient[0][:, 1:]  # type: ignore[index]
    for value, eager, wanted in zip(found, eagers, exact, strict=False):
        assert value is not None
        assert float((value.double() - wanted).norm()) <= 1.05 * float((eager.double() - wanted).norm())


@pytest.mark.parametrize(
    ("case", "persistent", "copied"),
    [
        ("plain", True, False),
        ("row_index", True, True),
        ("hidden transposed", True, True),
        ("hidden off by one element", True, True),
        ("hidden's stride no multiple of 16 bytes", True, True),
        ("weight transposed", False, False),
        ("weight off by one element", False, False),
        ("weight's stride no multiple of 16 bytes", False, False),
        ("weight expanded", False, False),
        ("float32", False, False),
    ],
)
def test_when_it_runs(case: str, persistent: bool, copied: bool) -> None:
    p = problem(
        37, 101, 40, dtype=torch.float32 if case == "float32" else HALF, rows=9 if case == "row_index" else None
    )
    name = case.split()[0].removesuffix("'s")
    if name in ("hidden", "weight"):
        matrix = getattr(p, name)
        if "transposed" in case:
            matrix = matrix.t().contiguous().t()
        elif "off by one" in case:
            matrix = torch.cat([matrix, matrix], 1)[:, 1:41]
        elif "stride" in case:
            matrix = torch.nn.functional.pad(matrix, (0, 3), value=float("nan"))[:, :40]
        else:
            matrix = matrix[:1].expand(101, -1)
        setattr(p, name, matrix)
    head = Head.of(p.inputs, p.head)
    if DEVICE == "cpu":  # A GPU may have no TMA.
        assert head.is_persistent == persistent
    assert not persistent or head.hidden_descriptor != copied
    torch.testing.assert_close(forward(p).logps.double(), exact_logps(p), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("width", "persistent"), [(48, True), (40, False)])
@both_halves
def test_the_backward_runs_where_rows_of_gradients_start_on_16_elements(
    width: int, persistent: bool, dtype: torch.dtype
) -> None:
    p = problem(37, 101, width, dtype=dtype)
    head = Head.of(p.inputs, p.head)
    if DEVICE == "cpu":  # A GPU may have no TMA.
        assert head.is_persistent
        assert head.is_persistent_backward == persistent
    grad = torch.linspace(-1, 1, 37, device=DEVICE)
    for value, wanted in zip(gradients(p, grad)[:2], eager_gradients(p, grad, torch.float64), strict=True):
        assert value is not None
        assert error(value, wanted) < torch.finfo(dtype).eps


@both_halves
def test_one_token_one_word_one_unit(dtype: torch.dtype) -> None:
    for tokens, vocabulary, width in [(1, 1, 8), (1, 50, 8), (3, 1, 16), (1, 1, 1), (5, 40, 1)]:
        p = problem(tokens, vocabulary, width, dtype=dtype)
        if width == 1:  # rows that start on 16 bytes all the same
            p.weight = torch.nn.functional.pad(p.weight, (0, 7), value=float("nan"))[:, :1]
        assert Head.of(p.inputs, p.head).is_persistent or DEVICE == "cuda"
        torch.testing.assert_close(forward(p).logps.double(), exact_logps(p), rtol=2e-6, atol=2e-6)
        grad = torch.ones(tokens, device=DEVICE)
        for value, wanted in zip(gradients(p, grad), eager_gradients(p, grad, torch.float64), strict=False):
            tolerance = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=2e-4)  # type: ignore[union-attr]
