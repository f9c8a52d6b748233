"""Gradients of the Triton backend: float64, any upstream gradient, chunks, skipped tokens, and what is not launched."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import functional
from clha_fast.backends.triton import backend as triton_backend
from clha_fast.backends.triton import backward as triton_backward
from clha_fast.backends.triton.backward import Active, Backward, Chunks
from clha_fast.backends.triton.head import Head, tiles
from clha_fast.backends.triton.persistent import PersistentBackward, even_words
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.options import HeadOptions
from clha_fast.types import Needs
from csrc_triton import backward, configs
from tests.support.parameters import covered
from tests.support.triton_harness import (
    DEVICE,
    NAMED_DTYPES,
    PLAIN,
    RICH,
    both_halves,
    check,
    eager_gradients,
    error,
    every_dtype,
    forward,
    gradients,
    problem,
    upstream,
)


@pytest.mark.parametrize(
    ("spread", "head", "workspace_bytes", "dtype"),
    covered({"flat": 0.1, "plain": 1.0, "peaked": 3.0}, {"chunks": (PLAIN, 1), "rich": (RICH, None)}, NAMED_DTYPES),
)
@pytest.mark.usefixtures("bfloat16_kernels")
def test_no_worse_than_the_eager_path(
    dtype: torch.dtype, head: HeadOptions, workspace_bytes: int | None, spread: float
) -> None:
    """Root mean square over batches: the error of 130 numbers of a bias can be small or large by luck."""
    squares = torch.zeros(2, 3)
    for seed in range(4):
        options = head.replace(workspace_bytes=workspace_bytes)
        p = problem(50, 130, 64, dtype=dtype, head=options, bias=True, seed=seed)
        p.weight *= spread
        grad = upstream(p)
        exact = eager_gradients(p, grad, torch.float64)
        for total, found in zip(squares, (gradients(p, grad), eager_gradients(p, grad, dtype)), strict=True):
            for index, (value, wanted) in enumerate(zip(found, exact, strict=True)):
                assert value is not None
                total[index] += error(value, wanted) ** 2
    ours, eager = squares.sqrt()
    assert (ours <= 1.05 * eager).all(), ours / eager


@pytest.mark.parametrize("workspace_bytes", [1, 16_000])
@pytest.mark.usefixtures("poisoned_memory")
def test_chunks_change_nothing_but_rounding(workspace_bytes: int) -> None:
    p = problem(70, 150, 40, bias=True, rows=50, head=PLAIN.replace(workspace_bytes=workspace_bytes))
    grad = upstream(p)
    grad[10:40] = 0
    check(p, grad)


def test_the_workspace_keeps_to_its_budget() -> None:
    sizes = [(1, 32), (100, 1000), (8192, 128256), (100_000, 151_936)]
    for (tokens, words), budget in itertools.product(sizes, [1, 10**6, 64 * 2**20, 10**10]):
        chunks = Chunks.of(tokens, words, 2, budget, 128, 256)
        assert chunks.tokens % 128 == chunks.words % 256 == 0
        assert 128 <= chunks.tokens < tokens + 128
        assert 256 <= chunks.words < words + 256
        assert chunks.tokens * chunks.words <= max(budget // 2, 128 * 256)


@pytest.mark.parametrize(
    ("width", "most", "words"),
    [
        (2304, 4096, 3584),  # dweight: 288 tiles are three turns of 132 programs, 252 are two
        (3584, 4096, 3584),  # 448 are four, 392 three
        (4096, 4096, 4096),  # 512 of 528
        (5120, 8192, 8192),  # 1,280 of 1,320: 7,424 words would save 1.2% of the time, and add twice more
        (2304, 3072, 3072),  # 216 of 264: the fewest that are three quarters leave more places empty
        (2304, 512, 512),  # two tiles of words: fewer would be half
        (2304, 256, 256),
    ],
)
def test_a_chunk_has_words_that_keep_the_device_busy(width: int, most: int, words: int) -> None:
    table = configs.PERSISTENT["persistent_logit_grad"]["sm_90"], configs.PERSISTENT["persistent_weight_grad"]["sm_90"]
    assert even_words(8192, most, width, 132, *table) == words


@pytest.mark.parametrize(("tokens", "width", "most"), [(8192, 2304, 4096), (8192, 3584, 4096), (2048, 2304, 4096)])
def test_a_frozen_head_has_no_turns_of_dweight(tokens: int, width: int, most: int) -> None:
    """Words that suit dweight alone make chunks, each of which adds to dhidden, for nothing."""
    logits, weight = (configs.PERSISTENT[f"persistent_{name}_grad"]["sm_90"] for name in ("logit", "weight"))
    assert even_words(tokens, most, width, 132, logits, weight) < most
    assert even_words(tokens, most, width, 132, logits, None) == most


def test_chunks_of_words_keep_to_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched: on devices of several sizes a chunk is no longer than its budget, and not much shorter."""
    for count, width, tokens in itertools.product((1, 3, 20, 132), (16, 80), (1, 70, 330)):
        monkeypatch.setattr("clha_fast.backends.triton.persistent.programs", lambda device, count=count: count)
        for budget in (1, 16384, 65536, None):
            p = problem(tokens, 700, width, dtype=torch.float16)
            ready = Head.of(p.inputs, p.head)
            active = Active.of(torch.ones(tokens), ready, tokens)
            for needs in (Needs(True, True, False), Needs(True, False, False), Needs(False, True, True)):
                own, plain = (
                    kind(p.hidden, ready, active, torch.zeros(tokens), budget, needs).chunks
                    for kind in (PersistentBackward, Backward)
                )
                assert own.tokens == plain.tokens
                assert own.words % 32 == 0
                assert plain.words * 3 // 4 <= own.words <= plain.words
                if plain.words < 700 and not needs.weight:
                    logits, rows = (ready.config(f"persistent_{name}_grad") for name in ("logit", "hidden"))
                    few = tiles(own.tokens, rows["BLOCK_N"]) * tiles(width, rows["BLOCK_H"]) <= count
                    expected = even_words(own.tokens, plain.words, width, count, logits, None)
                    assert own.words == (plain.words if few else expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_upstream_gradient_that_is_not_finite_stays_with_its_token(poison: float) -> None:
    p = problem(20, 70, 24)
    grad = upstream(p)
    grad[7] = poison
    dhidden, dweight, _ = gradients(p, grad)
    assert dhidden is not None
    assert dweight is not None
    broken = (~dhidden.isfinite()).any(1).nonzero().flatten().tolist()
    assert broken == [7]
    assert not dweight.isfinite().any()
    exact = eager_gradients(p, torch.where(grad.isfinite(), grad, 0), torch.float64)[0]
    others = torch.arange(20, device=DEVICE) != 7
    torch.testing.assert_close(dhidden[others].double(), exact[others], rtol=1e-5, atol=1e-5)


def test_padding_does_not_overflow() -> None:
    """The zero rows behind the last token have the bias for logits, and exp(200) is infinite."""
    p = problem(5, 70, 24, bias=True)
    assert p.bias is not None
    p.bias += 200
    check(p, upstream(p), 3e-5)  # float32 logits near 200 are whole multiples of 1.5e-5


@pytest.mark.parametrize(
    ("which", "shape", "stride"),
    [
        ("hidden", (3, 4), (3 * 2**29, 1)),
        ("weight", (5, 4), (3 * 2**29, 1)),
        ("weight", (5, 4), (1, 3 * 2**29)),
        ("weight", (5, 4), (2**32, 1)),
        ("weight", (600, 4), (2**22 - 1, 1)),
    ],
    ids=["hidden rows", "weight rows", "weight columns", "64-bit stride", "many rows"],
)
def test_offsets_beyond_int32(which: str, shape: tuple[int, int], stride: tuple[int, int], tmp_path: Path) -> None:
    """Strides that fit int32 while the offsets do not, in memory that is nearly all hole; forward and backward."""
    p = problem(3, shape[0] if which == "weight" else 5, 4, dtype=torch.float16)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    assert size > 2**31
    if DEVICE == "cuda":
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=torch.float16)
    far = memory.as_strided(shape, stride)
    near = getattr(p, which)
    far.copy_(near)
    expected = [forward(p)[0], *gradients(p, upstream(p))[:2]]
    setattr(p, which, far)
    for value, wanted in zip([forward(p)[0], *gradients(p, upstream(p))[:2]], expected, strict=True):
        assert value is not None
        assert wanted is not None
        torch.testing.assert_close(value, wanted, rtol=1e-3 if wanted.dtype == torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("needs", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_what_is_not_needed_costs_nothing(needs: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(10, 40, 20, bias=True)
    full = gradients(p, upstream(p))
    _, lse, route = forward(p)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("launched for a gradient that nobody asked for")

    for need, name in zip(needs, ("hidden_grad_kernel", "weight_grad_kernel", "bias_grad_kernel"), strict=True):
        if not need:
            monkeypatch.setattr(backward, name, {(n,): refuse for n in range(200)})
    shapes: list[tuple[int, ...]] = []
    empty = torch.empty

    def recorded(*size: Any, **kwargs: Any) -> Tensor:
        made = empty(*size, **kwargs)
        shapes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(triton_backward.torch, "empty", recorded)
    result = triton_backend.token_logps_backward(upstream(p), p.inputs, lse, route, p.head, Needs(*map(bool, needs)))
    for need, value, wanted in zip(needs, result, full, strict=True):
        assert (value is not None) == bool(need)
        assert value is None or torch.equal(value, wanted)  # type: ignore[arg-type]
    assert len(shapes) == int(needs[0])  # only the float32 rows of dhidden are made by torch.empty here


@both_halves
@pytest.mark.usefixtures("poisoned_memory")
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    p = problem(70, 90, 24, bias=True, rows=9, dtype=dtype, head=RICH.replace(workspace_bytes=4000))
    for first, second in zip(gradients(p, upstream(p)), gradients(p, upstream(p)), strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


@every_dtype
def test_the_loss_end_to_end_is_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Through autograd and the public function, a factor on the loss included."""
    p = problem(66, 170, 64, dtype=dtype, rows=60, ignored=0.1)
    lengths = torch.tensor([12, 9, 0, 20, 15, 10], device=DEVICE)
    sizes = torch.tensor([4, 2], device=DEVICE)
    rewards = torch.tensor([9.0, 1.0, 0.0, -4.0, 5.0, 0.0], device=DEVICE)

    def run(backend: str, cast: torch.dtype) -> list[Tensor]:
        leaves = p.leaves(cast)
        total, _ = functional.linear_clha_loss(
            leaves[0],
            leaves[1],
            p.targets,
            lengths,
            sizes,
            rewards=rewards,
            row_index=p.row_index,
            options=PUBLISHED,
            backend=backend,  # type: ignore[arg-type]
        )
        return list(torch.autograd.grad(total * 0.5, leaves))

    exact = run("reference", torch.float64)
    for value, eager, wanted in zip(run("triton", dtype), run("reference", dtype), exact, strict=True):
        assert error(value, wanted) <= 1.05 * error(eager, wanted)
