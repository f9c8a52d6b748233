"""Forward mode, second derivatives and torch.func: the eager answer or a sentence, never a silent zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from clha_fast import (
    CLHAOptions,
    HeadOptions,
    PROOptions,
    RankingInputs,
    SFTOptions,
    linear_clha_loss,
    linear_loss,
    ranking_loss,
    token_logps,
)
from clha_fast.objectives import Group
from tests.support.helpers import Case, make_case

Loss = Callable[..., Tensor]


def case(seed: int = 4, rows: int | None = None) -> Case:
    return make_case([2, 3, 4, 2, 1, 3], [4, 2], bias=True, rewards=True, rows=rows, ignored=0.1, seed=seed)


CASES = [case(), case(5, rows=9)]


def logps(of: Case, backend: str) -> Loss:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found = token_logps(hidden, weight, of.targets, bias=bias, row_index=of.row_index, backend=backend)
        return found.square().sum()

    return run


def clha(of: Case, backend: str) -> Loss:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = {**of.arguments(), "hidden": hidden, "weight": weight, "bias": bias}
        return linear_clha_loss(**changed, options=CLHAOptions(reward_margin=0.5), backend=backend)[0]

    return run


def any_objective(objective: object) -> Callable[[Case, str], Loss]:
    def make(of: Case, backend: str) -> Loss:
        def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            given = RankingInputs(of.candidate_lengths, of.candidates_per_prompt, of.rewards)
            head = {"bias": bias, "row_index": of.row_index, "backend": backend}
            return linear_loss(hidden, weight, of.targets, given, objective, **head)[0]

        return run

    return make


def ranked(of: Case, backend: str) -> Loss:
    """The backend matters to the log-probabilities alone: forward mode must get through those."""
    objective = any_objective(PROOptions(form="paper"))(of, "reference")
    if backend == "reference":
        return objective

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = {"bias": bias, "row_index": of.row_index, "backend": "reference"}
        found = token_logps(hidden, weight, of.targets, **head)
        given = RankingInputs(of.candidate_lengths, of.candidates_per_prompt)
        return ranking_loss(found, given, PROOptions(form="paper"), scored=of.targets != -100)[0]

    return run


LOSSES = {
    "token_logps": logps,
    "clha": clha,
    "pro": any_objective(PROOptions()),
    "sft": any_objective(SFTOptions(form="token_mean")),
    "ranking_loss": ranked,
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
every_case = pytest.mark.parametrize("of", CASES, ids=["rows in order", "row_index"])


def tensors(of: Case) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in (of.hidden, of.weight, of.bias))


def expected(make: Callable[[Case, str], Loss], of: Case, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [value.clone().requires_grad_() for value in values]
    return torch.autograd.grad(make(of, "reference")(*leaves), leaves)


def same(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@every_loss
@every_case
def test_forward_mode_is_refused_by_name(make: Callable[[Case, str], Loss], of: Case) -> None:
    run, at = make(of, "torch"), tensors(of)
    ones = tuple(torch.ones_like(value) for value in at)
    said = r"(token_logps|loss): expected reverse mode .* got forward mode .*backend='reference'"
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(run, at, ones)
    with pytest.raises(RuntimeError, match=said):
        torch.func.jacfwd(run, argnums=2)(*at)
    with pytest.raises(RuntimeError, match=said):
        torch.func.hessian(run, argnums=1)(*at)
    for place in range(3):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(v, o) if n == place else v for n, (v, o) in enumerate(zip(at, ones))]  # noqa: B905
            with pytest.raises(RuntimeError, match=said):
                run(*dual)


@every_case
def test_operators_called_by_name_drop_no_tangent(of: Case) -> None:
    """``torch.ops.clha_fast``: their tangents would be left out, a derivative of 0."""
    operators, at, head = torch.ops.clha_fast, tensors(of), HeadOptions().encoded
    scored, lse, route = operators.token_logps(*at, of.targets, of.row_index, None, head, "torch")

    def logps(*given: Tensor) -> Tensor:
        return operators.token_logps(*given, of.targets, of.row_index, None, head, "torch")[0]

    def loss(*given: Tensor) -> Tensor:
        settings = (head, CLHAOptions().encoded, "torch", False, False, False)
        return operators.linear_loss(*given, of.targets, of.row_index, None, *of.ranking, *settings)[0]

    def gradient(*given: Tensor) -> Tensor:
        more = (lse, route, head, "torch", True, True, True)
        return operators.token_logps_backward(scored, *given, of.targets, of.row_index, None, *more)[0]

    def entropy(*given: Tensor) -> Tensor:
        return operators.token_statistics(*given, of.targets, of.row_index, None, head, "torch", "entropy")[2]

    _, lse_of, nats, *_ = operators.token_statistics(*at, of.targets, of.row_index, None, head, "torch", "entropy")

    def entropy_gradient(*given: Tensor) -> Tensor:
        more = (lse_of, nats, head, "torch", True, True, True)
        return operators.token_statistics_backward(scored, nats, *given, of.targets, of.row_index, None, *more)[0]

    named = {"token_logps": logps, "linear_loss": loss, "token_logps_backward": gradient}
    named |= {"token_statistics": entropy, "token_statistics_backward": entropy_gradient}
    for name, run in named.items():
        plain, said = run(*at), rf"^{name}: expected reverse mode .* got forward mode"
        assert plain.isfinite().all()
        for place in range(3):
            with forward_ad.dual_level():
                dual = [forward_ad.make_dual(v, v) if n == place else v for n, v in enumerate(at)]
                with pytest.raises(RuntimeError, match=said):
                    run(*dual)
        for transform in (torch.func.jacfwd, lambda f: lambda *a: torch.func.jvp(f, a, a)):
            with pytest.raises(RuntimeError, match=said):
                transform(run)(*at)
        assert torch.equal(run(*at), plain)


@every_loss
def test_forward_mode_of_the_reference_is_the_reverse_one(make: Callable[[Case, str], Loss]) -> None:
    of, draw = CASES[1], torch.Generator().manual_seed(2)
    at = tensors(of)
    along = tuple(torch.randn(v.shape, dtype=v.dtype, generator=draw) for v in at)
    tangent = torch.func.jvp(make(of, "reference"), at, along)[1]
    same(tangent, sum((g * d).sum() for g, d in zip(expected(make, of, at), along, strict=True)))


@every_loss
@every_case
def test_reverse_mode_of_torch_func(make: Callable[[Case, str], Loss], of: Case) -> None:
    run, at = make(of, "torch"), tensors(of)
    wanted = expected(make, of, at)
    same(torch.func.grad(run, argnums=(0, 1, 2))(*at), wanted)
    same(torch.func.jacrev(run, argnums=(1, 2))(*at), wanted[1:])
    value, pull = torch.func.vjp(run, *at)
    same(value, make(of, "reference")(*at))
    same(pull(torch.tensor(-3.0, dtype=value.dtype)), tuple(-3 * g for g in wanted))


@every_loss
@every_case
def test_batches_of_calls_and_of_gradients(make: Callable[[Case, str], Loss], of: Case) -> None:
    run, (hidden, weight, bias) = make(of, "torch"), tensors(of)
    many = torch.stack([hidden, 0.5 * hidden, -hidden])
    each = [expected(make, of, (h, weight, bias)) for h in many]
    same(torch.func.vmap(lambda h: run(h, weight, bias))(many), torch.stack([run(h, weight, bias) for h in many]))
    got = torch.func.vmap(torch.func.grad(run, argnums=(0, 1)), in_dims=(0, None, None))(many, weight, bias)
    same(got, tuple(torch.stack([g[n] for g in each]) for n in range(2)))

    def total(w: Tensor) -> Tensor:
        return torch.func.vmap(lambda h: run(h, w, bias))(many).sum()

    same(torch.func.grad(total)(weight), torch.stack([g[1] for g in each]).sum(0))
    leaf = weight.clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.0], dtype=weight.dtype)
    (got,) = torch.autograd.grad(run(hidden, leaf, bias), leaf, upstream, is_grads_batched=True)
    same(got, upstream[:, None, None] * each[0][1])


@every_loss
@pytest.mark.parametrize(
    ("of", "backend"), [(CASES[0], "torch"), (CASES[1], "torch"), (CASES[1], "triton"), (CASES[1], "workspace")]
)
def test_second_derivatives_are_refused(make: Callable[[Case, str], Loss], of: Case, backend: str) -> None:
    if backend != "torch":
        if torch.cuda.is_available():
            pytest.skip("the kernels run in the interpreter here")
        pytest.importorskip("triton")
        of = of.to(torch.float32)
    run, at = make(of, backend), tensors(of)
    leaves = [value.clone().requires_grad_() for value in at]
    said = r"no second derivative .*backend='reference'"
    value = run(*leaves)
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(value, leaves, create_graph=True)[0].sum().backward()
    with pytest.raises(RuntimeError, match=said):
        torch.func.grad(lambda w: torch.func.grad(run, argnums=1)(at[0], w, at[2]).sum())(at[1])


def test_a_function_of_a_group_under_torch_func() -> None:
    def best(group: Group) -> Tensor:
        return -(group.of_targets(group.scores) ** 2).sum() / group.totals.prompts

    of = CASES[0]
    at = tensors(of)
    run = any_objective(best)(of, "torch")
    leaves = [value.clone().requires_grad_() for value in at]
    wanted = torch.autograd.grad(run(*leaves), leaves)
    same(torch.func.grad(run, argnums=(0, 1, 2))(*at), wanted)


@pytest.mark.parametrize("name", ["token_logps", "clha"])
def test_under_torch_compile_too(name: str) -> None:
    """Transforms break the graph, or are refused in it: what is traced must not lose the tangents."""
    of = CASES[0]
    run, at = LOSSES[name](of, "torch"), tensors(of)
    torch.compiler.reset()
    found = torch.compile(torch.func.grad(run, argnums=(0, 1, 2)), backend="aot_eager")(*at)
    same(found, expected(LOSSES[name], of, at))
    with pytest.raises(RuntimeError, match=r"got forward mode .*backend='reference'"):
        torch.compile(lambda *values: torch.func.jvp(run, values, values)[1], backend="aot_eager")(*at)
    torch.compiler.reset()
