"""Statistics of tokens' distributions from the pass that makes log-probabilities, and the gradient of the entropy."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clha_fast import HeadOptions, token_logps
from clha_fast.types import STATISTICS
from tests.support.triton_harness import DEVICE, RICH, Problem, problem

BACKENDS = ["reference", "torch"]
KERNELS = ["triton", "workspace"]
HEADS = [HeadOptions(), HeadOptions(temperature=2.0), RICH, HeadOptions(scale=-1.5)]


def statistics(
    p: Problem, backend: str, leaves: list[Tensor] | None = None, temperature: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, weight, bias = [*(leaves or p.leaves(p.hidden.dtype)), None][:3]
    return token_logps(
        hidden,
        weight,
        p.targets,
        bias=bias,
        row_index=p.row_index,
        temperature=temperature,
        head=p.head,
        backend=backend,
        statistics=STATISTICS,
    )


def upstream(count: int) -> tuple[Tensor, Tensor]:
    """Arbitrary gradients, some of them 0: of log-probabilities and of entropies."""
    draw = torch.Generator().manual_seed(7)
    g, e = torch.randn(2, count, generator=draw, dtype=torch.float64)
    g[::5], e[::3] = 0.0, 0.0
    return g.to(DEVICE), e.to(DEVICE)


def everything(p: Problem, backend: str, dtype: torch.dtype, temperature: Tensor | None = None) -> dict[str, Tensor]:
    """Log-probabilities, statistics, and the gradients of a sum of the first and the entropies."""
    leaves = p.leaves(dtype)
    logps, values = statistics(p, backend, leaves, temperature)
    g, e = (grad.to(logps.dtype) for grad in upstream(len(logps)))
    found = torch.autograd.grad((logps * g).sum() + (values["entropy"] * e).sum(), leaves)
    names = ("dhidden", "dweight", "dbias")[: len(found)]
    return {
        "logps": logps.detach(),
        **{k: v.detach() for k, v in values.items()},
        **dict(zip(names, found, strict=True)),
    }


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
def test_closed_form(backend: str) -> None:
    """z = (0, ln 3) / T with T = 1: p = (1/4, 3/4); dH/dz_v = -p_v (log p_v + H)."""
    dtype = torch.float32 if backend in KERNELS else torch.float64
    hidden = torch.ones(2, 1, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=dtype, device=DEVICE, requires_grad=True)
    logps, values = token_logps(
        hidden, weight, torch.tensor([1, 0], device=DEVICE), backend=backend, statistics=STATISTICS
    )
    entropy = math.log(4) - 0.75 * math.log(3)
    assert logps.exp().tolist() == pytest.approx([0.75, 0.25])
    assert values["entropy"].tolist() == pytest.approx([entropy] * 2)
    assert values["sum_sq_probs"].tolist() == pytest.approx([10 / 16] * 2)
    assert values["mean_logit"].tolist() == pytest.approx([math.log(3) / 2] * 2)
    assert values["is_top1"].tolist() == [1.0, 0.0]
    assert [v.requires_grad for v in values.values()] == [True, False, False, False]
    (dweight,) = torch.autograd.grad(2 * values["entropy"][0], weight)
    slopes = [-0.25 * (math.log(0.25) + entropy), -0.75 * (math.log(0.75) + entropy)]
    assert dweight.flatten().tolist() == pytest.approx([2 * s for s in slopes], rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("own_temperature", [False, True])
def test_float64(head: HeadOptions, rows: int | None, own_temperature: bool) -> None:
    """Also autograd's own gradient of the reference, and over several blocks of words."""
    if own_temperature:
        head = head.replace(temperature=1.0)
    p = problem(vocabulary=301, dtype=torch.float64, head=head, bias=True, rows=rows, ignored=0.2)
    temperature = torch.linspace(0.3, 3, len(p.targets), dtype=torch.float64) if own_temperature else None
    exact = everything(p, "reference", torch.float64, temperature)
    found = everything(p, "torch", torch.float64, temperature)
    for name, want in exact.items():
        torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert (found["entropy"][p.targets == head.ignore_index] == 0).all()


def test_gradient_of_the_reference() -> None:
    p = problem(tokens=5, vocabulary=7, width=3, dtype=torch.float64, head=RICH, bias=True)

    def entropy(*leaves: Tensor) -> Tensor:
        return statistics(p, "reference", list(leaves))[1]["entropy"]

    assert torch.autograd.gradcheck(entropy, p.leaves(torch.float64))


EVERY = [
    ("torch", dtype, head, own)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for head in (HeadOptions(), RICH)
    for own in (False, True)
]
# Each dtype and each feature once with each: the interpreter is slow.
EVERY += [
    (backend, *case)
    for backend in KERNELS
    for case in (
        (torch.float32, RICH, True),
        (torch.float16, RICH, False),
        (torch.bfloat16, HeadOptions(), True),
    )
]


@pytest.mark.usefixtures("poisoned_memory", "bfloat16_kernels")
@pytest.mark.parametrize(("backend", "dtype", "head", "own_temperature"), EVERY)
def test_error_is_within_the_eager_one(
    backend: str, dtype: torch.dtype, head: HeadOptions, own_temperature: bool
) -> None:
    if own_temperature:
        head = head.replace(temperature=1.0)
    p = problem(50, 130, 64, dtype=dtype, head=head, bias=True, rows=30, ignored=0.1, seed=4)
    temperature = torch.linspace(0.5, 2, 50, device=DEVICE) if own_temperature else None
    exact = everything(p, "reference", torch.float64, temperature)
    rough, found = (everything(p, name, dtype, temperature) for name in ("reference", backend))
    assert torch.equal(found["is_top1"], exact["is_top1"].to(found["is_top1"].dtype))
    for name, want in exact.items():
        # A few float32 roundings on top where the eager error happens to vanish.
        allowed = 1.05 * (rough[name].double() - want).norm() + 4e-7 * want.norm()
        assert (found[name].double() - want).norm() <= allowed, name


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
def test_words_that_cannot_come_and_large_logits(backend: str) -> None:
    """-inf logits have no share, their entropy no slope; beside logits of 1e4 small probabilities keep their digits."""
    bias = torch.tensor([1e4, 1e4 - 2, -math.inf] + [-math.inf] * 300, device=DEVICE, requires_grad=True)
    hidden = torch.ones(1, 16, device=DEVICE, requires_grad=True)
    weight = torch.zeros(303, 16, device=DEVICE, requires_grad=True)
    logps, values = token_logps(
        hidden, weight, torch.tensor([0], device=DEVICE), bias=bias, backend=backend, statistics=STATISTICS
    )
    p = 1 / (1 + math.exp(-2))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert logps.item() == pytest.approx(math.log(p), rel=1e-5)
    assert values["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert values["sum_sq_probs"].item() == pytest.approx(p**2 + (1 - p) ** 2)
    assert values["mean_logit"].item() == -math.inf
    assert values["is_top1"].item() == 1
    (dbias,) = torch.autograd.grad(values["entropy"].sum(), bias)
    slope = -p * (math.log(p) + entropy)
    assert dbias[:2].tolist() == pytest.approx([slope, -slope], rel=1e-4)
    assert not dbias[2:].any()


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
def test_ties_not_a_number_and_nothing(backend: str) -> None:
    """Of equal logits each is a top one; NaN stays NaN; no tokens are no numbers."""
    hidden = torch.zeros(3, 16, device=DEVICE)
    hidden[2] = math.nan
    weight = torch.ones(5, 16, device=DEVICE)
    targets = torch.tensor([4, -100, 1], device=DEVICE)
    _, values = token_logps(hidden, weight, targets, backend=backend, statistics=STATISTICS)
    assert values["is_top1"][:2].tolist() == [1.0, 0.0]
    assert values["entropy"][:2].tolist() == pytest.approx([math.log(5), 0.0])
    assert all(value[2].isnan() for value in values.values())
    logps, values = token_logps(
        hidden[:0], weight.requires_grad_(), targets[:0], backend=backend, statistics=("entropy",)
    )
    assert list(values) == ["entropy"]
    (dweight,) = torch.autograd.grad(logps.sum() + values["entropy"].sum(), weight)
    assert not dweight.any()


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_one_gradient_at_a_time(backend: str) -> None:
    """Entropies alone, log-probabilities alone, and what was not asked for."""
    p = problem(tokens=15, vocabulary=70, width=16, bias=True, seed=3)
    exact = p.leaves(torch.float64)
    for name in ("logps", "entropy"):
        leaves = p.leaves(torch.float32)
        logps, values = statistics(p, backend, leaves)
        found = torch.autograd.grad((logps if name == "logps" else values["entropy"]).sum(), leaves)
        logps, values = statistics(p, "reference", exact)
        wanted = torch.autograd.grad((logps if name == "logps" else values["entropy"]).sum(), exact)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    logps, values = token_logps(p.hidden, p.weight, p.targets, backend=backend, statistics=())
    assert torch.equal(logps, token_logps(p.hidden, p.weight, p.targets, backend=backend))
    assert values == {}


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_two_calls_give_the_same_bits(backend: str) -> None:
    p = problem(tokens=15, vocabulary=70, width=16, rows=9, bias=True)
    first, second = (everything(p, backend, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiled_and_under_func() -> None:
    p = problem(dtype=torch.float64, bias=True)
    leaves = p.leaves(torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logps, values = statistics(p, "torch", [hidden, weight, bias])
        return logps.sum() - 0.3 * values["entropy"].square().sum()

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    under_func = torch.func.grad(loss, (0, 1, 2))(*(leaf.detach() for leaf in leaves))
    for a, b, c in zip(plain, compiled, under_func, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(loss, tuple(leaf.detach() for leaf in leaves), tuple(leaf.detach() for leaf in leaves))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)[0].sum().backward()


def test_what_is_refused() -> None:
    p = problem()
    hidden, weight, targets = p.hidden, p.weight, p.targets
    routed = HeadOptions(max_dropped_mass=0.01)
    with pytest.raises(ValueError, match=r"statistics: expected a sequence of entropy, .*, got \('variance',\)"):
        token_logps(hidden, weight, targets, statistics=("variance",))
    with pytest.raises(ValueError, match=r"statistics: expected a sequence .*, got 'entropy'"):
        token_logps(hidden, weight, targets, statistics="entropy")
    with pytest.raises(ValueError, match=r"max_dropped_mass: expected None beside statistics, got 0\.01"):
        token_logps(hidden, weight, targets, statistics=("entropy",), head=routed)
    ones = torch.ones(len(targets), device=DEVICE)
    with pytest.raises(ValueError, match="max_dropped_mass: expected None beside a temperature for each token"):
        token_logps(hidden, weight, targets, temperature=ones, head=routed)
    with pytest.raises(ValueError, match=r"temperature: expected None beside HeadOptions\(temperature=0\.7\)"):
        token_logps(hidden, weight, targets, temperature=ones, head=HeadOptions(temperature=0.7))
    with pytest.raises(ValueError, match=r"temperature: expected floating \[N = 37\]"):
        token_logps(hidden, weight, targets, temperature=ones[:3])
    with pytest.raises(ValueError, match="temperature: expected values without a gradient"):
        token_logps(hidden, weight, targets, temperature=ones.clone().requires_grad_())
    if DEVICE == "cpu":
        for value, said in ((0.0, "0.0"), (-2, "-2.0"), (math.nan, "nan"), (1e-60, "0.0"), (1e60, "inf")):
            temperature = ones.double().index_fill(0, torch.tensor([3]), value)
            message = f"temperature: expected positive finite numbers in float32, got {said} at position 3"
            for backend, names in (("auto", None), ("auto", ("entropy",)), ("reference", None)):
                with pytest.raises(ValueError, match=re.escape(message)):
                    token_logps(hidden, weight, targets, temperature=temperature, backend=backend, statistics=names)
        # What float64 can hold is taken for hidden states of float64.
        wide = torch.full((len(targets),), 1e-60, dtype=torch.float64)
        token_logps(hidden.double(), weight.double(), targets, temperature=wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [None, ("entropy", "is_top1")])
def test_temperatures_where_there_are_no_values_yet(dtype: torch.dtype, names: tuple[str, ...] | None) -> None:
    """Compiled in one graph, batched by vmap, and as shapes alone."""
    p = problem(dtype=dtype)

    def logps(hidden: Tensor, temperature: Tensor) -> Tensor:
        found = token_logps(hidden, p.weight, p.targets, temperature=temperature, backend="torch", statistics=names)
        return found if isinstance(found, Tensor) else found[0] + found[1]["entropy"]

    count = len(p.targets)
    several = torch.stack([torch.linspace(0.3, 2, count, dtype=dtype), torch.ones(count, dtype=dtype)])
    compiled = torch.compile(logps, fullgraph=True, backend="aot_eager")
    batched = torch.func.vmap(logps, (None, 0))(p.hidden, several)
    for one, from_batch in zip(several, batched, strict=True):
        wanted = logps(p.hidden, one)
        torch.testing.assert_close(compiled(p.hidden, one), wanted)
        torch.testing.assert_close(from_batch, wanted)
    with pytest.raises(ValueError, match="temperature: expected positive finite numbers"):
        compiled(p.hidden, -several[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert logps(p.hidden, torch.ones(len(p.targets), dtype=dtype)).shape == p.targets.shape
