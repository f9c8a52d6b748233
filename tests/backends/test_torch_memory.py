"""The torch backend's memory and products: what is allocated, when, and how often logits are formed."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clha_fast import CLHAOptions, HeadOptions
from clha_fast.backends.torch import backend as torch_backend
from clha_fast.types import Needs
from tests.support.helpers import make_case

PUBLISHED = CLHAOptions.preset("published")


class Allocations(TorchDispatchMode):
    """Shapes of every tensor that an operator returns in memory of its own."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                memory = t.untyped_storage()
                # A part of another tensor's memory is a view.
                if memory.nbytes() == t.numel() * t.itemsize and memory.data_ptr() not in self.known:
                    self.shapes.append(tuple(t.shape))
        return result


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("needs", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_is_asked_for(needs, dtype):
    """The store bounds everything but the gradients, and a gradient that nobody wants has no buffer."""
    tokens, width, words, capacity = 60, 24, 1280, 8
    case = make_case([10] * 6, [2, 2, 2], hidden_size=width, vocab_size=words, dtype=dtype, bias=True)
    head = HeadOptions(workspace_bytes=capacity * words * 4)
    tensors = [t for t in case.arguments().values() if t is not None]
    with Allocations(*tensors) as allocations:
        torch_backend.loss_sweep(case.head, case.ranking, head, PUBLISHED, Needs(*map(bool, needs)))
    shapes = set(allocations.shapes)
    assert ((capacity * words,) in shapes) == any(needs)
    assert ((tokens, width) in shapes) >= needs[0]
    # Not even a 16-bit weight is widened as a whole.
    large = {shape for shape in shapes if math.prod(shape) > capacity * words}
    assert large == ({(words, width)} if needs[1] else set())


@pytest.mark.usefixtures("small_blocks")
def test_rows_that_no_token_reads_take_memory_last():
    """The gradient of prompts and padding is zeros, which nobody needs before the logits are gone."""
    rows, width, words, capacity = 500, 24, 1280, 20
    case = make_case([10] * 6, [2, 2, 2], hidden_size=width, vocab_size=words, dtype=torch.float32, rows=rows)
    head = HeadOptions(workspace_bytes=capacity * words * 4)
    with Allocations(*(t for t in case.arguments().values() if t is not None)) as allocations:
        torch_backend.loss_sweep(case.head, case.ranking, head, PUBLISHED, Needs(True, True, False))
    after = allocations.shapes[allocations.shapes.index((rows, width)) :]
    assert set(after) <= {(rows, width), (60, width)}
    assert (capacity * words,) in allocations.shapes


class Live(TorchDispatchMode):
    """Bytes of the operators' results that are alive, at the moment when one of some shape comes."""

    def __init__(self, shape: tuple[int, ...], *given: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.then = shape, []
        self.alive = {t.untyped_storage()._cdata: 0 for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                memory = t.untyped_storage()
                key = memory._cdata
                if key not in self.alive:
                    self.alive[key] = memory.nbytes()
                    weakref.finalize(memory, self.alive.pop, key)
                    if tuple(t.shape) == self.shape:
                        self.then.append(sum(self.alive.values()) - memory.nbytes())
        return result


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("entry", ["loss", "logps"])
def test_logits_are_gone_when_rows_that_no_token_reads_come(entry):
    """Only the weight's gradient and numbers a token stand beside the zeros of prompts and padding."""
    rows, width, words, capacity, tokens = 500, 24, 1280, 20, 60
    case = make_case([10] * 6, [2, 2, 2], hidden_size=width, vocab_size=words, dtype=torch.float32, rows=rows)
    head = HeadOptions(workspace_bytes=capacity * words * 4)
    _, lse, route = torch_backend.token_logps_forward(case.head, head)
    needs = Needs(True, True, False)
    with Live((rows, width), *(t for t in case.arguments().values() if t is not None)) as live:
        if entry == "loss":
            torch_backend.loss_sweep(case.head, case.ranking, head, PUBLISHED, needs)
        else:
            torch_backend.token_logps_backward(torch.ones(tokens), case.head, lse, route, head, needs)
    (beside,) = live.then
    assert 0 < beside - 4 * words * width < 4 * capacity * words // 2


@pytest.mark.parametrize(("words", "by_token"), [(240, True), (239, False)])
def test_rows_exist_twice_only_in_the_place_of_the_store(words, by_token):
    """Of many tokens the rows would take more than the logits' store leaves behind."""
    rows, width = 70, 24
    case = make_case([10] * 6, [2, 2, 2], hidden_size=width, vocab_size=words, dtype=torch.float32, rows=rows)
    with Allocations(*(t for t in case.arguments().values() if t is not None)) as allocations:
        torch_backend.loss_sweep(case.head, case.ranking, HeadOptions(), PUBLISHED, Needs(True, False, False))
    large = [shape for shape in allocations.shapes if shape == (rows, width)]
    assert large
    store = max(allocations.shapes, key=math.prod)
    assert (allocations.shapes.index((rows, width)) > allocations.shapes.index(store)) == by_token


class Products(TorchDispatchMode):
    """Operations of every matrix product, in-place sums included (torch's own counter does not know addmm_)."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            self.shapes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def every_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of as many tokens as there are, none of zeros: to be counted."""
    monkeypatch.setattr("clha_fast.backends.torch.head.ALIGNED", 1)


@pytest.mark.usefixtures("small_blocks", "every_count")
@pytest.mark.parametrize(
    ("needs", "capacity", "token_products"),
    [
        ((0, 0), 1, 60),  # scoring stores nothing
        ((1, 0), 20, 2 * 60),
        ((0, 1), 20, 2 * 60),
        ((1, 1), 20, 3 * 60),
        ((1, 1), 60, 3 * 60),
        ((1, 1), 44, 3 * 60),  # and 16 in the weight's gradient
        # The weight's gradient stores 16 tokens of the first prompt, the workspace 5 of each: 15 of the others' 20.
        ((1, 1), 5, 3 * 60 + 2 * 15),
        ((1, 0), 5, 2 * 60 + 3 * 15),
    ],
    ids=str,
)
def test_logits_are_formed_once(needs, capacity, token_products):
    """One product of [tokens, H] and [V, H] for the logits and one a gradient, where prompts fit the workspace."""
    width, words = 16, 320
    case = make_case([10] * 6, [2, 2, 2], hidden_size=width, vocab_size=words, dtype=torch.float32)
    head = HeadOptions(workspace_bytes=capacity * words * 4)
    wants = Needs(*map(bool, needs), bias=False)
    with Products() as products:
        torch_backend.loss_sweep(case.head, case.ranking, head, PUBLISHED.replace(margin=20.0), wants)
    assert products.count == token_products * 2 * width * words


@pytest.mark.usefixtures("small_blocks", "every_count")
def test_one_pass_over_the_weights_gradient_a_group():
    """What is stored, in either store, and what is not are multiplied into the weight's gradient together."""
    width, words, capacity = 16, 3000, 5
    case = make_case([10] * 6, [2, 2, 2], hidden_size=width, vocab_size=words, dtype=torch.float32)
    head = HeadOptions(workspace_bytes=capacity * words * 4)
    with Products() as products:
        torch_backend.loss_sweep(
            case.head, case.ranking, head, PUBLISHED.replace(margin=20.0), Needs(False, True, False)
        )
    # Three groups, one prompt of 20 tokens each: 16 of the first are kept in the gradient's memory, 5 of each other.
    assert sum(rows for rows, tokens, columns in products.shapes if (tokens, columns) == (20, width)) == 3 * words
    assert all(columns != width or tokens in (20, width) for _, tokens, columns in products.shapes)
