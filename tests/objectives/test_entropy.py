"""Objectives that read the entropy of tokens' distributions: the bonus of PolicyOptions, and one of somebody's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from clha_fast import HeadOptions, PolicyOptions, RankingInputs, linear_loss, ranking_loss, token_logps
from clha_fast.objectives import Group, Objective, Terms
from tests.support.helpers import Case, make_case

GRPO = PolicyOptions(reduction="sequence_mean", entropy_weight=0.2)
OBJECTIVES = [
    PolicyOptions(entropy_weight=0.1),
    GRPO,
    PolicyOptions(advantages="given", kl_weight=0.1, entropy_weight=0.3),
]
HEADS = [HeadOptions(), HeadOptions(scale=2.0, softcap=5.0, temperature=0.7)]


def test_by_hand() -> None:
    """On policy, A = (2, -1), tokens (2, 1): less 0.1 times the mean entropy, of tokens or of candidates' means."""
    given = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]), advantages=torch.tensor([2.0, -1.0]))
    logps = torch.tensor([-1.0, -7.0, -0.1], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    objective = PolicyOptions(advantages="given", entropy_weight=0.1)
    loss, metrics = ranking_loss(logps, given, objective, statistics={"entropy": entropy})
    assert loss.item() == pytest.approx(-1 - 0.1 * 3)
    assert metrics.as_dict()["entropy"] == pytest.approx(3)
    slopes = torch.autograd.grad(loss, (logps, entropy))
    assert slopes[0].tolist() == pytest.approx([-2 / 3, -2 / 3, 1 / 3])
    assert slopes[1].tolist() == pytest.approx([-0.1 / 3] * 3)
    loss, _ = ranking_loss(logps, given, objective.replace(reduction="sequence_mean"), statistics={"entropy": entropy})
    assert loss.item() == pytest.approx(-0.5 - 0.1 * (1.5 + 6) / 2)
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.1 / 4, -0.1 / 4, -0.1 / 2])


def case(dtype: torch.dtype, seed: int = 2) -> tuple[Case, RankingInputs]:
    """Two prompts, one candidate absent, tokens ignored, rows read twice."""
    of = make_case([3, 0, 4, 2, 5], [3, 2], dtype=dtype, bias=True, rewards=True, rows=9, ignored=0.15, seed=seed)
    return of, RankingInputs(of.candidate_lengths, of.candidates_per_prompt, of.rewards)


def signals(objective: Objective, given: RankingInputs, tokens: int) -> RankingInputs:
    draw = torch.Generator().manual_seed(1)
    more = {name: -torch.rand(tokens, generator=draw) for name in objective.needs if name != "rewards"}
    return given._replace(**more)


def values(objective: Objective, head: HeadOptions, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss, metrics, scores and gradients under an upstream gradient of 1.7."""
    of, given = case(torch.float32)
    of = of.to(dtype)
    given = signals(objective, given, len(of.targets))
    leaves = of.leaves()
    loss, metrics = linear_loss(
        *leaves[:2], of.targets, given, objective, bias=leaves[2], row_index=of.row_index, head=head, backend=backend
    )
    return [loss.detach(), metrics.values, metrics.scores, *torch.autograd.grad(1.7 * loss, leaves)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("workspace_bytes", [None, 200])
def test_one_sweep_is_the_reference(objective: Objective, head: HeadOptions, workspace_bytes: int | None) -> None:
    """Also where a prompt exceeds the store, and is formed twice."""
    head = head.replace(workspace_bytes=workspace_bytes)
    wanted = values(objective, head, "reference", torch.float64)
    found = values(objective, head, "torch", torch.float64)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("backend", ["triton", "workspace"])
def test_kernels(backend: str) -> None:
    for objective, head in ((GRPO, HEADS[0]), (OBJECTIVES[2], HEADS[1].replace(workspace_bytes=2000))):
        wanted = values(objective, head, "reference", torch.float64)
        for got, want in zip(values(objective, head, backend, torch.float32), wanted, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize(("softcap", "temperature"), [(3.0, 1.0), (30.0, 1.0), (30.0, 0.7)])
@pytest.mark.parametrize("workspace_bytes", [None, 20000])
def test_logits_at_a_softcap(size: float, softcap: float, temperature: float, workspace_bytes: int | None) -> None:
    """A softcap's slope is what is left of 1: out of exponentials it would be up to 13 times as far off as eager's."""
    sizes = {"vocab_size": 300, "hidden_size": 32}
    of = make_case([5, 7, 4, 6], [4], **sizes, weight_scale=0.3, dtype=torch.float32, bias=True, rewards=True)
    of = dataclasses.replace(of, hidden=of.hidden * size)
    given = RankingInputs(of.candidate_lengths, of.candidates_per_prompt, of.rewards)
    head = HeadOptions(softcap=softcap, temperature=temperature, workspace_bytes=workspace_bytes)

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        case = of.to(dtype)
        leaves = case.leaves()
        loss, _ = linear_loss(*leaves[:2], of.targets, given, GRPO, bias=leaves[2], head=head, backend=backend)
        return list(torch.autograd.grad(1.7 * loss, leaves))

    exact = gradients("reference", torch.float64)
    for got, eager, want in zip(
        gradients("torch", torch.float32), gradients("reference", torch.float32), exact, strict=True
    ):
        assert (got - want).norm() <= 3 * (eager - want).norm() + 1e-7 * want.norm()


@dataclasses.dataclass(frozen=True)
class TopOnly(Objective):
    """Likelihood of each token, and the entropy of those whose target is the top one."""

    name: ClassVar[str] = "top_only"
    statistics: ClassVar[tuple[str, ...]] = ("entropy", "is_top1")
    reads_entropy: ClassVar[bool] = True
    divides_by: ClassVar[tuple[str, ...]] = ("token_count",)
    metric_names: ClassVar[Mapping[str, str]] = {"accuracy": "scored_tokens"}

    def terms(self, group: Group) -> Terms:
        bonus = group.statistic("entropy") * (0.5 + group.statistic("is_top1"))
        rank = -(group.logps + bonus).sum() / group.totals.tokens
        return Terms(rank, torch.zeros_like(rank))

    def report(self, group: Group) -> dict[str, Tensor]:
        return {"accuracy": group.statistic("is_top1").sum()}


def test_an_objective_of_ones_own() -> None:
    wanted = values(TopOnly(), HEADS[1], "reference", torch.float64)
    found = values(TopOnly(), HEADS[1], "torch", torch.float64)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, check_dtype=False)


def test_under_func_and_without_gradients() -> None:
    of, given = case(torch.float64)
    leaves = of.leaves()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_loss(hidden, weight, of.targets, given, GRPO, bias=bias, row_index=of.row_index, backend="torch")[
            0
        ]

    plain = torch.autograd.grad(loss(*leaves), leaves)
    under_func = torch.func.grad(loss, (0, 1, 2))(*(leaf.detach() for leaf in leaves))
    torch.testing.assert_close(under_func, plain)
    with torch.no_grad():
        torch.testing.assert_close(loss(*leaves), loss(*leaves).detach())


def test_compiled() -> None:
    of, given = case(torch.float64)
    leaves = of.leaves()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_loss(hidden, weight, of.targets, given, GRPO, bias=bias, row_index=of.row_index, backend="torch")[
            0
        ]

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(compiled, plain)


def test_what_is_refused() -> None:
    of, given = case(torch.float64)
    logps, values = token_logps(of.hidden, of.weight, of.targets, row_index=of.row_index, statistics=("entropy",))
    with pytest.raises(
        ValueError, match=r"statistics: expected 'entropy', which the objective 'policy' reads, got \[\]"
    ):
        ranking_loss(logps, given, GRPO)
    with pytest.raises(ValueError, match="statistics: expected no 'entropy', for the objective 'policy' does not read"):
        ranking_loss(logps, given, PolicyOptions(), statistics=values)
    with pytest.raises(ValueError, match=r"statistics\['entropy'\]: expected the shape and dtype of logps"):
        ranking_loss(logps, given, GRPO, statistics={"entropy": values["entropy"][:3]})
    with pytest.raises(ValueError, match=r"max_dropped_mass: expected None beside statistics, got 0\.1"):
        linear_loss(
            of.hidden,
            of.weight,
            of.targets,
            given,
            GRPO,
            row_index=of.row_index,
            head=HeadOptions(max_dropped_mass=0.1),
            backend="torch",
        )
    with pytest.raises(ValueError, match="entropy_weight: expected a finite number that is not negative, got -1"):
        PolicyOptions(entropy_weight=-1)


@pytest.mark.parametrize("objective", [*OBJECTIVES, TopOnly()])
def test_an_entropy_without_a_graph(objective: Objective) -> None:
    """Its gradient would be missing from the loss's; where nobody records there is none to miss."""
    of, given = case(torch.float64)
    given = signals(objective, given, len(of.targets))
    hidden = of.hidden.requires_grad_()
    logps, values = token_logps(hidden, of.weight, of.targets, row_index=of.row_index, statistics=objective.statistics)
    wanted = ranking_loss(logps, given, objective, statistics=values)[0].detach()
    detached = {name: value.detach() for name, value in values.items()}
    with pytest.raises(ValueError, match=r"statistics\['entropy'\]: expected values with a graph, as logps have"):
        ranking_loss(logps, given, objective, statistics=detached)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(ranking_loss(logps, given, objective, statistics=detached)[0], wanted)
    assert torch.equal(ranking_loss(logps.detach(), given, objective, statistics=detached)[0], wanted)
    (slope,) = torch.autograd.grad(ranking_loss(logps.detach(), given, objective, statistics=values)[0], hidden)
    assert slope.any()
