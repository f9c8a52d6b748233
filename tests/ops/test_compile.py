"""torch.compile without a graph break, and the operators' own contract (torch.library.opcheck)."""

from __future__ import annotations

import pytest
import torch

from clha_fast import CLHALoss, CLHAOptions, HeadOptions, linear_clha_loss, token_logps
from clha_fast.ops.head import score_dtype
from clha_fast.types import STATISTICS
from tests.support.helpers import make_case

HEAD = HeadOptions(scale=0.9, softcap=4.0)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def batches(dtype):
    """Two shapes, for the second call of a compiled function meets other sizes."""
    for seed, (lengths, sizes) in enumerate([([3, 0, 2, 4], [3, 1]), ([2, 2, 5, 1, 3], [2, 3])]):
        yield make_case(lengths, sizes, dtype=dtype, bias=True, rewards=True, rows=6, ignored=0.1, seed=seed)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same(compiled, eager, case):
    """Value and gradients under a non-unit upstream; the body around the call is compiled with it.

    Its factors are powers of two: a compiler that fuses them rounds where eager does.
    """
    results = []
    for function in (compiled, eager):
        leaves = case.to(case.hidden.dtype).leaves()
        value = function(*leaves, case)
        results.append((value.detach(), torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float16), ("auto", torch.float32)])
def test_compiled_loss(compiler, dtype, backend):
    def run(hidden, weight, bias, case):
        arguments = {**case.arguments(), "hidden": 2 * hidden, "weight": weight, "bias": bias}
        loss, metrics = linear_clha_loss(**arguments, head=HEAD, backend=backend)
        return 0.5 * loss + metrics.ranking_accuracy.detach()

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for case in batches(dtype):
        assert_same(compiled, run, case)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_module(compiler):
    module = CLHALoss(CLHAOptions.preset("paper"), HEAD, backend="torch")

    def run(hidden, weight, bias, case):
        return module(**{**case.arguments(), "hidden": hidden, "weight": weight, "bias": bias})[0]

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for case in batches(torch.float32):
        assert_same(compiled, run, case)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_token_logps(compiler):
    def run(hidden, weight, bias, case):
        logps = token_logps(
            hidden.tanh(), weight, case.targets, bias=bias, row_index=case.row_index, head=HEAD, backend="torch"
        )
        return (logps * torch.arange(logps.shape[0])).sum()

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for case in batches(torch.float32):
        assert_same(compiled, run, case)


def test_a_compiled_forward_without_gradients():
    case = next(batches(torch.float32))
    compiled = torch.compile(lambda: case.loss("torch")[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(), case.loss("torch")[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optional", [True, False], ids=["all inputs", "required inputs"])
def test_operators_keep_their_contract(dtype, optional):
    """Schema, no mutation, no aliasing, fake results of the right shapes and dtypes, autograd registration."""
    case = next(batches(dtype)) if optional else make_case([2, 3], [2], dtype=dtype)
    case.leaves()
    head = case.head
    if optional:
        head = head._replace(temperature=torch.linspace(0.5, 2, len(case.targets), dtype=score_dtype(case.hidden)))
    ranking = case.ranking._replace(pair_counts=None, prompt_count=None)
    encoded = CLHAOptions.preset("published").encoded
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.clha_fast
    torch.library.opcheck(operators.token_logps, (*head, HEAD.encoded, "torch"), test_utils=tests)
    for needs in ((True, True, case.bias is not None), (False, True, False), (False, False, False)):
        arguments = (*head, *ranking, HEAD.encoded, encoded, "torch", *needs)
        torch.library.opcheck(operators.linear_loss, arguments, test_utils=tests)
    plain = [None if t is None else t.detach() for t in head]
    logps, lse, route = operators.token_logps(*plain, HEAD.encoded, "torch")
    for needs in ((True, True, case.bias is not None), (True, False, False)):
        arguments = (torch.ones_like(logps), *plain, lse, route, HEAD.encoded, "torch", *needs)
        torch.library.opcheck(operators.token_logps_backward, arguments, test_utils=tests)
    for names in (",".join(STATISTICS), "entropy", "is_top1"):
        torch.library.opcheck(operators.token_statistics, (*head, HEAD.encoded, "torch", names), test_utils=tests)
    logps, lse, entropy, *_ = operators.token_statistics(*plain, HEAD.encoded, "torch", "entropy")
    arguments = (torch.ones_like(logps), torch.ones_like(logps), *plain, lse, entropy, HEAD.encoded, "torch")
    torch.library.opcheck(operators.token_statistics_backward, (*arguments, True, True, False), test_utils=tests)
