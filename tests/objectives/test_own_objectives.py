"""Objectives of somebody else's: what runs, and what is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from clha_fast import (
    CLHALoss,
    CLHAOptions,
    DPOOptions,
    IPOOptions,
    LinearLoss,
    Objective,
    PolicyOptions,
    PROOptions,
    RankingInputs,
    SFTOptions,
    attach,
    linear_loss,
    ranking_loss,
    reference,
)
from clha_fast.batching.collator import RankedCollator
from clha_fast.objectives import Group, Terms
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.types import VocabShard
from tests.support.helpers import make_case
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
INPUTS = RankingInputs(torch.tensor([2, 3]), torch.tensor([2]), torch.tensor([3.0, -1.0]))


def test_an_objective_that_does_not_add_up_is_refused_by_name():
    def mean_of_scores(group: Group) -> Tensor:
        return -group.scores.mean()

    @dataclasses.dataclass(frozen=True)
    class BatchMean(Objective):
        name = "batch-mean"

        def terms(self, group: Group) -> Terms:
            centred = group.scores - group.scores.mean()
            return Terms((centred**2).sum() / group.totals.prompts, group.scores.new_zeros(()))

    for objective, name in ((mean_of_scores, "mean_of_scores"), (BatchMean(), "batch-mean")):
        with pytest.raises(ValueError, match=f"objective '{name}': expected a loss that adds up over prompts"):
            ranking_loss(-torch.ones(5), INPUTS, objective)
        with pytest.raises(ValueError, match="adds up"):
            LinearLoss(objective)


@pytest.mark.parametrize("backend", ["torch", "workspace", "triton", "reference"])
def test_an_objective_of_your_own_runs_on_every_backend(backend):
    """A squared error of the targets' scores, whose gradient is 2 (s + 1) / |y| / P a token."""

    def towards_one(group: Group) -> Tensor:
        return ((group.of_targets(group.scores) + 1) ** 2).sum() / group.totals.prompts

    case = make_case([2, 3, 1], [2, 1], dtype=torch.float32)
    leaves = case.leaves()
    loss, metrics = linear_loss(*leaves, case.targets, case.ranking, towards_one, backend=backend)
    logps = reference.token_logps(*leaves, None, case.targets)
    wanted = ((logps[:2].mean() + 1) ** 2 + (logps[5] + 1) ** 2) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    found, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert metrics.values.shape == (len(METRIC_NAMES),)


def test_signals_reach_the_objective_that_reads_them_and_no_other():
    @dataclasses.dataclass(frozen=True)
    class Weighted(Objective):
        name = "weighted"
        reads = ("token_weights", "advantages")
        divides_by = ("token_count",)

        def terms(self, group: Group) -> Terms:
            each = group.logps * group.per_token("token_weights") * group.per_token("advantages")
            return Terms(-each.sum() / group.totals.tokens, each.new_zeros(()))

    inputs = RankingInputs(torch.tensor([2, 1]), torch.tensor([2]))
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    weights, advantages = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([3.0, -1.0])
    loss, _ = ranking_loss(logps, inputs._replace(token_weights=weights, advantages=advantages), Weighted())
    assert float(loss) == pytest.approx((0.5 * 3 + 2 * 3 - 6) / 3)
    with pytest.raises(ValueError, match="token_weights: expected None, for the objective 'clha' does not read it"):
        ranking_loss(logps, inputs._replace(token_weights=weights))
    with pytest.raises(ValueError, match=r"old_logps: expected floating \[N = 3\], got \[2\]"):
        ranking_loss(logps, inputs._replace(old_logps=torch.zeros(2)))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            "pro",
            "objective: expected one of CLHAOptions, .*an Objective of your own or a function of a Group, got 'pro'; "
            r"give PROOptions\(\)$",
        ),
        ("dpo", r"got 'dpo'; give DPOOptions\(\)$"),
        (PROOptions, r"objective: expected one of CLHAOptions.* got <class .*PROOptions'>; give PROOptions\(\)$"),
        ("grpo", "got 'grpo'$"),
        (dict, "got <class 'dict'>$"),
        (None, "objective: expected one of CLHAOptions.* got None$"),
    ],
)
def test_what_is_no_objective(objective, message):
    with pytest.raises(ValueError, match=message):
        ranking_loss(-torch.ones(2), RankingInputs(torch.tensor([1, 1]), torch.tensor([2])), objective)


def test_settings_out_of_range_and_missing_rewards():
    with pytest.raises(ValueError, match="form: expected one of paper, published, got 'eq2'"):
        PROOptions(form="eq2")
    with pytest.raises(ValueError, match="sft_weight: expected a finite number that is not negative, got -1"):
        PROOptions(sft_weight=-1)
    with pytest.raises(ValueError, match="form: expected one of prompt_mean, token_mean, got 'mean'"):
        SFTOptions(form="mean")
    with pytest.raises(ValueError, match="rewards: expected values, which the objective 'pro' needs, got None"):
        ranking_loss(-torch.ones(2), RankingInputs(torch.tensor([1, 1]), torch.tensor([2])), PROOptions())


def test_log_probabilities_of_another_kind():
    inputs = RankingInputs(torch.tensor([1, 1]), torch.tensor([2]))
    for logps in (torch.ones(2, 1), torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"logps: expected float32 or float64 of shape \[N\]"):
            ranking_loss(logps, inputs)
    with pytest.raises(ValueError, match=r"scored: expected booleans of shape \[N = 2\]"):
        ranking_loss(torch.ones(2), inputs, scored=torch.ones(2))
    with pytest.raises(ValueError, match="candidate_lengths: expected a sum of N = 3 tokens, got 2"):
        ranking_loss(torch.ones(3), inputs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda group: group.scores, r"expected a scalar tensor in nats, got \[10\] torch.float64"),
        (lambda group: group.scores.sum().reshape(1), r"expected a scalar tensor in nats, got \[1\] torch.float64"),
        (lambda group: 1.0, "expected a scalar tensor in nats, got a float"),
        (lambda group: None, "expected a scalar tensor in nats, got a NoneType"),
        (lambda group: group.sizes.sum().long(), r"expected a scalar tensor in nats, got \[\] torch.int64"),
        (lambda group: group.scores.sum().detach(), "expected a loss with a graph to group.logps, got one without"),
        (lambda group: group.scores.reshape(-1, 3)[0].sum(), r"failed on a trial of prompts of 3, 1, 2, 4 candidates"),
        (lambda group: group.nothing, "failed on a trial .*AttributeError.*nothing"),
        (lambda group: group.per_token("advantages").sum(), "advantages: expected values, which the objective reads"),
    ],
)
def test_what_a_function_must_not_return(function: Callable[[Group], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_loss(-torch.ones(5), INPUTS, function)


@dataclasses.dataclass(frozen=True)
class Own(Objective):
    """Takes whatever its fields say; subclasses of it are what is tried."""

    name: ClassVar[str] = "own"

    def terms(self, group: Group) -> Any:
        return Terms(-group.sums.sum() / group.totals.prompts, group.logps.new_zeros(()))


def own(**members: Any) -> Objective:
    kind = dataclasses.make_dataclass("Kind", [], bases=(Own,), frozen=True, namespace=members)
    made: Objective = kind()
    return made


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"terms": lambda self, group: group.sums.sum()},
            r"'own': expected Terms\(rank, sft\), got a Tensor",
        ),
        ({"needs": ("reward",)}, "objective 'own': needs: expected fields of RankingInputs, got 'reward'"),
        ({"divides_by": ("tokens",)}, "objective 'own': divides_by: expected some of pair_counts, .*, got 'tokens'"),
        ({"divides_by": "token_count"}, "objective 'own': divides_by: expected some of pair_counts, .*, got 't'"),
        ({"metric_names": ("foo", "bar")}, "objective 'own': report: expected the sums bar, foo, got none"),
        (
            {"inert": lambda self, layout, rewards, target: layout.rank > 1},
            "expected no slope for candidates that",
        ),
    ],
)
def test_what_an_objective_must_not_be(members: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_loss(-torch.ones(5), INPUTS, own(**members))
    with pytest.raises(ValueError, match="name: expected a class attribute that names the objective, got ''"):
        own(name="")


def divided(total: str) -> Callable[[Group], Tensor]:
    return lambda group: -group.sums.sum() / getattr(group.totals, total)


TOTALS = {
    "prompts": "prompt_count",
    "candidates": "candidate_count",
    "tokens": "token_count",
    "target_tokens": "target_token_count",
}


@pytest.mark.parametrize("total", TOTALS)
def test_each_total_is_declared(total: str) -> None:
    def terms(self: Any, group: Group) -> Terms:
        loss = divided(total)(group)
        return Terms(loss, torch.zeros_like(loss))

    for name in TOTALS.values():
        objective = own(terms=terms, divides_by=(name,))
        if name == TOTALS[total]:
            ranking_loss(-torch.ones(5), INPUTS, objective)
        else:
            with pytest.raises(ValueError, match=f"`divides_by` names each of the totals, here {name};"):
                ranking_loss(-torch.ones(5), INPUTS, objective)


def test_kept_pairs_are_declared_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Silent(CLHAOptions):
        divides_by = ("prompt_count",)

    with pytest.raises(ValueError, match="names each of the totals, here prompt_count;"):
        ranking_loss(-torch.ones(5), INPUTS, Silent(reduction="pair_mean"))
    loss, _ = ranking_loss(-torch.ones(5), INPUTS, Silent(reduction="sum"))  # divides by prompts alone
    assert loss.isfinite()


@pytest.mark.parametrize("total", TOTALS)
def test_a_function_may_divide_by_any_total_of_a_split_step(total: str) -> None:
    model, rows = make_model(len(TOKENIZER)).train(), make_rows(6, seed=7)
    collate = RankedCollator(TOKENIZER, divided(total))
    attached = attach(model, divided(total))
    parts = [collate(rows[:1]), collate(rows[1:3]), collate(rows[3:])]
    counts = attached.counts(parts)
    with torch.no_grad():
        split = torch.stack([model(**part, **counts).loss for part in parts]).mean()
        whole = model(**collate(rows)).loss
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=0)


def test_a_signal_that_is_needed_is_read() -> None:
    objective = own(
        needs=("token_weights",),
        terms=lambda self, group: Terms(
            -(group.logps * group.per_token("token_weights")).sum() / group.totals.prompts, group.logps.new_zeros(())
        ),
    )
    with pytest.raises(ValueError, match="token_weights: expected values, which the objective 'own' needs, got None"):
        ranking_loss(-torch.ones(5), INPUTS, objective)
    loss, _ = ranking_loss(-torch.ones(5), INPUTS._replace(token_weights=torch.arange(5.0)), objective)
    assert float(loss) == 10


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_subclass_is_itself_on_every_backend(backend: str) -> None:
    """Not the built-in objective whose name it has inherited."""

    @dataclasses.dataclass(frozen=True)
    class Worse(SFTOptions):
        def terms(self, group: Group) -> Terms:
            sft = -2 * group.of_targets(group.sums).sum() / group.totals.prompts
            return Terms(torch.zeros_like(sft), sft)

    case = make_case([2, 3, 1], [2, 1], dtype=torch.float64)
    loss, _ = linear_loss(case.hidden, case.weight, case.targets, case.ranking, Worse(), backend=backend)
    logps = reference.token_logps(case.hidden, case.weight, None, case.targets)
    assert float(loss) == pytest.approx(-float(logps[:2].sum() + logps[5]), rel=1e-12)


def test_modules_take_no_settings_at_a_call() -> None:
    case = make_case([2, 3], [2], dtype=torch.float32)
    loss, _ = LinearLoss(SFTOptions())(case.hidden, case.weight, case.targets, case.ranking)
    assert loss.isfinite()
    with pytest.raises(TypeError, match="backend"):
        LinearLoss(SFTOptions())(case.hidden, case.weight, case.targets, case.ranking, backend="torch")
    for kind in (lambda **given: LinearLoss(SFTOptions(), **given), lambda **given: CLHALoss(**given)):
        with pytest.raises(ValueError, match=r"backend: expected one of auto, .*, got 'cudaa'"):
            kind(backend="cudaa")


def test_inputs_of_another_kind() -> None:
    case = make_case([2, 3], [2], dtype=torch.float32)
    for given in ((torch.tensor([2, 3]), torch.tensor([2])), {"candidate_lengths": torch.tensor([2, 3])}, None):
        with pytest.raises(ValueError, match=r"given: expected RankingInputs\(candidate_lengths, ...\), got a"):
            linear_loss(case.hidden, case.weight, case.targets, given)
    with pytest.raises(ValueError, match=r"shard: expected VocabShard\(start, size\), got 3"):
        linear_loss(case.hidden, case.weight, case.targets, case.ranking, shard=3)
    with pytest.raises(ValueError, match="backend: expected auto or torch for a head sharded"):
        linear_loss(case.hidden, case.weight, case.targets, case.ranking, shard=VocabShard(0, 19), backend="triton")


def test_the_reference_has_second_derivatives_of_anything() -> None:
    """f = mean over prompts of (s + 1)^2: the penalty |grad f|^2 has a gradient too, and it is finite differences'."""

    def squared(group: Group) -> Tensor:
        return ((group.of_targets(group.scores) + 1) ** 2).sum() / group.totals.prompts

    case = make_case([2, 3, 1], [2, 1], dtype=torch.float64)

    def penalty(hidden: Tensor) -> Tensor:
        loss, _ = linear_loss(hidden, case.weight, case.targets, case.ranking, squared, backend="reference")
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return (grad**2).sum()

    assert torch.autograd.gradcheck(penalty, case.hidden.requires_grad_())


def test_what_is_not_scored_is_not_looked_at() -> None:
    logps = torch.tensor([-1.0, -5.0, -2.0, -3.0], requires_grad=True)
    given, scored = RankingInputs(torch.tensor([2, 2]), torch.tensor([2])), torch.tensor([True, False, True, True])
    loss, _ = ranking_loss(logps, given, SFTOptions(), scored=scored)
    assert float(loss.detach()) == 1
    assert torch.autograd.grad(loss, logps)[0].tolist() == [-1, 0, 0, 0]
    poisoned = torch.where(scored, logps.detach(), torch.nan)
    assert float(ranking_loss(poisoned, given, SFTOptions(), scored=scored)[0]) == 1


@pytest.mark.parametrize("name", ["kendall_tau", "rank_loss", "margin_sum"])
def test_names_of_the_common_metrics_are_taken(name: str) -> None:
    objective = own(metric_names=(name,), report=lambda self, group: {name: group.sums.sum()})
    with pytest.raises(ValueError, match=f"metric_names: expected names of its own, got {name}"):
        ranking_loss(-torch.ones(5), INPUTS, objective)


def test_a_captured_tensor_that_would_get_no_gradient_is_refused() -> None:
    factor = torch.nn.Parameter(torch.tensor(1.0))
    layer = torch.nn.Linear(1, 1, dtype=torch.float64)

    def scaled(group: Group) -> Tensor:
        return -factor * group.sums.sum() / group.totals.prompts

    def shifted(group: Group) -> Tensor:
        return -group.sums.sum() / group.totals.prompts + 0 * factor

    def through_a_layer(group: Group) -> Tensor:
        return (layer(group.scores.unsqueeze(1)).squeeze(1) * group.present).sum() / group.totals.prompts

    subclass = own(terms=lambda self, group: Terms(scaled(group), torch.zeros_like(group.sums.sum())))
    for objective in (scaled, shifted, through_a_layer, subclass):
        with pytest.raises(ValueError, match=r"expected a loss whose graph leads to group\.logps alone"):
            ranking_loss(-torch.ones(5), INPUTS, objective)
        with pytest.raises(ValueError, match=r"detach\(\) that"):
            LinearLoss(objective)

    def constant(group: Group) -> Tensor:
        return -factor.detach() * group.sums.sum() / group.totals.prompts

    logps = torch.full((5,), -1.0, requires_grad=True)
    assert torch.autograd.grad(ranking_loss(logps, INPUTS, constant)[0], logps)[0].tolist() == [-1] * 5


def test_an_entropy_that_is_read_is_declared() -> None:
    def terms(self: Any, group: Group) -> Terms:
        loss = -(group.logps + group.statistic("entropy") ** 2).sum() / group.totals.prompts
        return Terms(loss, torch.zeros_like(loss))

    seen = {"entropy": torch.ones(5)}
    with pytest.raises(ValueError, match="'own': reads_entropy: expected True, for its loss depends on the entropy"):
        ranking_loss(-torch.ones(5), INPUTS, own(terms=terms, statistics=("entropy",)), statistics=seen)
    declared = own(terms=terms, statistics=("entropy",), reads_entropy=True)
    entropy = torch.full((5,), 3.0, requires_grad=True)
    loss, _ = ranking_loss(-torch.ones(5), INPUTS, declared, statistics={"entropy": entropy})
    assert torch.autograd.grad(loss, entropy)[0].tolist() == [-6] * 5


SIGNALLED = [
    (DPOOptions(), "reference_logps", 5),
    (IPOOptions(), "reference_logps", 2),
    (PROOptions(), "rewards", 2),
    (PolicyOptions(), "rewards", 2),
    (PolicyOptions(), "old_logps", 5),
    (PolicyOptions(advantages="given"), "advantages", 2),
    (PolicyOptions(kl_weight=0.1), "reference_logps", 5),
    (lambda group: -(group.scores * group.rewards).sum() / group.totals.prompts, "rewards", 2),
]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", None])
@pytest.mark.parametrize(("objective", "name", "count"), SIGNALLED)
def test_no_gradient_flows_into_what_is_known(
    objective: Any, name: str, count: int, backend: Literal["reference", "torch", "triton"] | None
) -> None:
    """On any backend; None is `ranking_loss`."""
    case = make_case([2, 3], [2], dtype=torch.float32)
    value = torch.linspace(-2.0, -1.0, count).requires_grad_()
    inputs = INPUTS._replace(**{name: value})
    (hidden, weight), logps = case.leaves(), torch.full((5,), -1.0, requires_grad=True)
    if backend is None:
        loss, _ = ranking_loss(logps, inputs, objective)
    else:
        loss, _ = linear_loss(hidden, weight, case.targets, inputs, objective, backend=backend)
    loss.backward()
    assert value.grad is None
    assert (hidden if backend else logps).grad is not None


def test_slopes_that_are_not_the_terms_are_refused() -> None:
    with pytest.raises(ValueError, match="slopes: expected the gradient of its own terms"):
        ranking_loss(-torch.ones(5), INPUTS, own(slopes=lambda self, group: torch.ones_like(group.logps)))


def likelihood(group: Group) -> Tensor:
    return -group.scores.sum() / group.totals.prompts


@dataclasses.dataclass(frozen=True)
class Likelihood(Objective):
    name = "likelihood"

    def terms(self, group: Group) -> Terms:
        return Terms(group.scores.new_zeros(()), likelihood(group))


def _compiled_and_not(objective, **settings):
    torch._dynamo.reset()
    case = make_case([3, 2, 4], [2, 1], rewards=True, dtype=torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_loss(hidden, weight, case.targets, case.ranking, objective, backend="torch")[0]

    leaves = case.to(torch.float32).leaves()
    return torch.compile(loss, backend="aot_eager", **settings)(*leaves), loss(*leaves)


@pytest.mark.parametrize("objective", [likelihood, Likelihood()])
def test_a_compiler_gives_the_reason_why_an_objective_of_your_own_is_not_compiled(objective):
    with pytest.raises(RuntimeError, match="objective 'likelihood' is none of the library's own and runs eagerly only"):
        _compiled_and_not(objective, fullgraph=True)


@pytest.mark.slow  # what stands around it is compiled in many parts
@pytest.mark.parametrize("objective", [likelihood, Likelihood()])
def test_an_objective_of_your_own_runs_between_what_is_compiled(objective):
    compiled, eager = _compiled_and_not(objective)
    assert torch.equal(compiled, eager)
