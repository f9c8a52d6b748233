"""One graph for all sizes: a compiled loss that was traced again for each of them would take seconds a step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import clha_fast
from clha_fast import CLHAOptions, HeadOptions, PROOptions, functional, linear_clha_loss, linear_loss, token_logps
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.ops import dispatch
from clha_fast.types import HeadInputs
from tests.support.helpers import Case, make_case
from tests.support.tiny import make_model, make_rows, make_tokenizer

SHAPES = 10
PRO = PROOptions()  # not in a compiled function: settings are encoded where they are made


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches(rows: bool, everything: bool = False) -> Iterator[Case]:
    """Other numbers of prompts, candidates, tokens and rows in each."""
    for seed in range(SHAPES):
        draw = random.Random(seed)
        sizes = [draw.randint(2, 4) for _ in range(2 + seed)]
        lengths = [draw.randint(1, 6) for _ in range(sum(sizes))]
        options = {"bias": True, "sft_index": True, "ignored": 0.1} if everything else {}
        made = make_case(
            lengths, sizes, dtype=torch.float32, rewards=True, rows=7 + seed if rows else None, seed=seed, **options
        )
        yield made.replace(prompt_count=torch.tensor(4.0), pair_counts=torch.ones(9 + seed)) if everything else made


def logps(case: Case) -> Tensor:
    found = token_logps(
        case.hidden, case.weight, case.targets, bias=case.bias, row_index=case.row_index, backend="torch"
    )
    return found.square().sum()


def clha(case: Case) -> Tensor:
    return linear_clha_loss(**case.arguments(), backend="torch")[0]


def pro(case: Case) -> Tensor:
    head = {"bias": case.bias, "row_index": case.row_index, "backend": "torch"}
    return linear_loss(case.hidden, case.weight, case.targets, case.ranking, PRO, **head)[0]


# Each function with all inputs and with none, both under either setting: compiling a case takes a second.
@pytest.mark.parametrize(
    ("run", "everything", "dynamic"),
    [
        (logps, True, None),
        (logps, False, True),
        (clha, True, True),
        (clha, False, None),
        (pro, True, None),
        (pro, False, True),
    ],
)
def test_ten_shapes_take_three_graphs_at_most(run, everything, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    for case in batches(everything, everything):
        leaves = case.leaves()
        value, wanted = compiled(case), run(case)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
        found, expected = torch.autograd.grad(value, leaves), torch.autograd.grad(wanted, leaves)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 3


# Operators and their backward are traced in the tests above; what the model and the attachment ask of sizes, here.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_an_attached_model_is_compiled_once_for_all_batches(backend: str) -> None:
    tokenizer, options = make_tokenizer(), CLHAOptions(margin=0.5, sft_weight=0.1)
    plain, model = (make_model(len(tokenizer), num_hidden_layers=1).train() for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    attached = clha_fast.attach(compiled, options)
    clha_fast.attach(plain, options)
    for seed in range(SHAPES):
        rows = make_rows(random.Random(seed).randint(2, 6), seed=seed)
        batch = CandidateBatch.from_dict(RankedCollator(tokenizer, options)(rows))
        counts = attached.counts([batch])
        loss, wanted = compiled(**batch.as_dict(), **counts).loss, plain(**batch.as_dict(), **counts).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        loss.backward()
    assert counter.frame_count <= 3
    own = {name: batch.as_dict()[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(compiled(**own).logits, plain(**own).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_workspace_s_product_in_the_backward(dynamic: bool | None) -> None:
    """The weight's gradient is formed behind the graph's edge, of as many tokens as there are: eager's bits."""
    pytest.importorskip("triton")
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        arguments = {**case.arguments(), "hidden": hidden, "weight": weight}
        return 0.3 * linear_clha_loss(**arguments, backend="workspace")[0]

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for case in itertools.islice(batches(rows=True), 4):
        half = case.to(torch.float16)
        leaves = half.leaves()
        both = [torch.autograd.grad(function(*leaves[:2], half), leaves[:2]) for function in (compiled, loss)]
        for one, other in zip(*both, strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count <= (2 if dynamic is None else 1)


def test_the_limit_of_auto_is_one_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of tokens on either side of it take a graph each, however many there are, and each its own backend.

    V 11 and H 5 on a GPU that has 16 times 40 tokens' memory: 128 bytes of logits, 10 of rows, 30 of their copies.
    """
    memory, limit = 16 * 40 * 168, 40
    monkeypatch.setattr(dispatch, "_why_not_kernels", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weight = torch.zeros(11, 5, requires_grad=True)
    head = HeadOptions()
    there: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, requires_grad=True)

    def chosen(targets: Tensor) -> Tensor:
        name = functional._resolve("auto", HeadInputs(there, weight, None, targets, None), head, True)
        return targets + (1 if name == "workspace" else 2)

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(chosen, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (7, 90, 40, 41, 13, 300, 39, 55):
        assert torch.equal(compiled(torch.zeros(tokens)), torch.full((tokens,), 1.0 if tokens <= limit else 2.0))
    assert counter.frame_count == 2
