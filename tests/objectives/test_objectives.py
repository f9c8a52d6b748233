"""What every row of the table of objectives is held to, on every backend; and objectives of somebody else's."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clha_fast import (
    CLHAOptions,
    CoHOptions,
    CPOOptions,
    DPOOptions,
    HeadOptions,
    HingeOptions,
    IPOOptions,
    Objective,
    ORPOOptions,
    PolicyOptions,
    PROOptions,
    RankingInputs,
    RRHFOptions,
    SFTOptions,
    SimPOOptions,
    linear_loss,
    ranking_loss,
    reference,
)
from clha_fast.layout import Layout
from clha_fast.objectives import OBJECTIVES, Group, decode, encode
from clha_fast.objectives.additive import compare
from clha_fast.objectives.metrics import metric_names
from clha_fast.objectives.ranked import RankedBatch, slopes
from clha_fast.types import COUNTS, SIGNALS
from tests.support.helpers import IGNORE, make_case, random_signals
from tests.support.parameters import firsts
from tests.support.value_gpu import OnGPU, ValueGPU

ROWS: list[Objective] = [
    CLHAOptions(),
    CLHAOptions.preset("paper"),
    CLHAOptions.preset("sft_only"),
    CLHAOptions(noise_rule="signed", reduction="pair_mean", margin=0.5, reward_margin=1.0, rank_weight=0.3),
    PROOptions(form="paper"),
    PROOptions(form="published", sft_weight=0.2),
    RRHFOptions(),
    RRHFOptions(weight=0.3, length_penalty=0.5, sft="sum"),
    DPOOptions(),
    DPOOptions(beta=0.7, form="pairs"),
    SimPOOptions(),
    IPOOptions(beta=0.5),
    HingeOptions(),
    HingeOptions(beta=0.4, reference_free=True),
    ORPOOptions(),
    ORPOOptions(beta=2.0, sft="token_mean"),
    CPOOptions(),
    CPOOptions(alpha=0.0),
    PolicyOptions(reduction="sequence_mean"),
    PolicyOptions(clip_high=0.28, kl_weight=0.1),
    PolicyOptions(advantages="given", reduction="sequence_mean", kl_weight=0.04),
    PolicyOptions(reduction="sequence_mean", entropy_weight=0.3),
    PolicyOptions(kl_weight=0.1, entropy_weight=0.02),
    SFTOptions(form="prompt_mean"),
    SFTOptions(form="token_mean"),
    CoHOptions(),
]
NAMES = [f"{row.name}-{number}" for number, row in enumerate(ROWS)]
every_row = pytest.mark.parametrize("objective", ROWS, ids=NAMES)


def signals(row: Objective) -> tuple[Any, ...]:
    """What it is given beside the log-probabilities."""
    return frozenset(row.reads), frozenset(row.needs), row.reads_entropy


# Ragged, a candidate without tokens, a prompt of one, a prompt of which nothing was run.
SHAPES = [([3, 5, 0, 4, 7, 2, 6, 1, 9, 3], [3, 1, 4, 2]), ([2, 3], [2]), ([4], [1]), ([0, 0, 5, 2], [2, 2])]


def batch(
    objective: Objective, shape: tuple[list[int], list[int]], seed: int = 0, **given: Any
) -> tuple[Tensor, Tensor, RankingInputs]:
    """(logps [N], targets [N], inputs) in float64, some tokens ignored, rewards in no order, all that it reads."""
    draw = torch.Generator().manual_seed(seed)
    lengths, sizes = shape
    logps = -3 * torch.rand(sum(lengths), generator=draw, dtype=torch.float64) - 0.01
    targets = torch.where(torch.rand(len(logps), generator=draw) < 0.2, IGNORE, 1)
    logps = torch.where(targets == IGNORE, 0.0, logps)
    fields = {
        "rewards": 4 * torch.randn(len(lengths), generator=draw),
        "sft_index": torch.tensor([int(torch.randint(size, (), generator=draw)) for size in sizes]),
        **random_signals(objective, len(logps), seed),
        **given,
    }
    return logps, targets, RankingInputs(torch.tensor(lengths), torch.tensor(sizes), **fields)


def of_tokens(given: RankingInputs, tokens: Any) -> dict[str, Tensor | None]:
    """The signals of some tokens."""
    values = ((name, getattr(given, name)) for name in SIGNALS)
    return {name: None if value is None else value[tokens] for name, value in values}


def seen(objective: Objective, logps: Tensor) -> dict[str, Tensor]:
    """Some number for each token and statistic that an objective names, 0 where the log-probability is."""
    return {name: torch.where(logps == 0, 0.0, 2 + torch.sin(9 * logps)).detach() for name in objective.wanted}


def exact(objective: Objective, logps: Tensor, targets: Tensor, given: RankingInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dL/dlogp, metrics) of the reference and autograd; dL/dentropy below it where the objective reads that."""
    leaves = [logps.clone().requires_grad_(), *(v.requires_grad_() for v in seen(objective, logps).values())]
    loss, metrics, _ = reference.loss(leaves[0], targets, given, HeadOptions(), objective, *leaves[1:])
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    slope = torch.stack(grads) if objective.reads_entropy else grads[0]
    return loss.detach(), torch.where(targets == IGNORE, 0.0, slope), metrics


class Work(RankedBatch):
    """With the statistics of `seen`."""

    def rank(self, first: int, last: int, logps: Tensor, statistics: Any = None) -> Tensor:
        return super().rank(first, last, logps, seen(self.objective, logps))

    def finish(self, logps: Tensor, statistics: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        return super().finish(logps, seen(self.objective, logps))


def ranked(objective: Objective, targets: Tensor, given: RankingInputs) -> RankedBatch:
    return Work(objective, given, targets != IGNORE, torch.float64)


def test_every_objective_of_the_table_is_tested_and_has_a_reference():
    assert {type(row) for row in ROWS} == set(OBJECTIVES.values())
    assert OBJECTIVES.keys() == reference.LOSSES.keys() == {cls.name for cls in OBJECTIVES.values()}


@every_row
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_slopes_and_metrics_are_the_references(objective, shape, seed):
    logps, targets, given = batch(objective, shape, seed)
    loss, slope, metrics = exact(objective, logps, targets, given)
    work = ranked(objective, targets, given)
    found = work.rank(0, len(shape[1]), logps)
    found_loss, found_metrics, _ = work.finish(logps)
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.where(targets == IGNORE, 0.0, found), slope, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found_metrics, metrics, rtol=1e-6, atol=1e-6)
    assert len(metrics) == len(metric_names(objective))


@every_row
def test_a_closed_form_is_autograds(objective):
    """Where an objective writes its slopes down, autograd on its own terms says the same."""
    logps, targets, given = batch(objective, SHAPES[0], 3)
    work = ranked(objective, targets, given)
    logps = logps[slice(*work.layout.span(1, 4))]
    group = Group(work.plan, 1, 4, logps, seen(objective, logps))
    by_autograd = dataclasses.make_dataclass(
        "Plain", [], bases=(type(objective),), frozen=True, namespace={"slopes": lambda self, group: None}
    )
    plain = by_autograd(**{f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.init})
    torch.testing.assert_close(slopes(objective, group), slopes(plain, group), rtol=1e-13, atol=1e-15)


@every_row
def test_it_adds_up(objective):
    compare(objective)


@every_row
def test_chunks_and_processes_make_no_difference(objective):
    """Two halves of a step with the step's counts, as two processes would compute them."""
    logps, targets, whole = batch(objective, SHAPES[0], 4)
    loss, slope, _ = exact(objective, logps, targets, whole)
    parts = [(slice(0, 4), slice(0, 2), slice(0, 12)), (slice(4, 10), slice(2, 4), slice(12, 40))]
    halves = [
        RankingInputs(
            whole.candidate_lengths[c], whole.candidates_per_prompt[p], whole.rewards[c], whole.sft_index[p]
        )._replace(**of_tokens(whole, t))
        for c, p, t in parts
    ]
    counts: dict[str, Tensor] = {}
    for half, (_, _, t) in zip(halves, parts, strict=True):
        layout = Layout.of(half.candidate_lengths, half.candidates_per_prompt, targets[t] != IGNORE)
        for name, value in objective.counts(layout, half, 3).items():
            counts[name] = counts.get(name, 0) + value
    total, found = torch.zeros((), dtype=torch.float64), []
    for half, (_, _, t) in zip(halves, parts, strict=True):
        work = ranked(objective, targets[t], half._replace(**counts))
        found.append(work.rank(0, 2, logps[t]))
        total += work.finish(logps[t])[0]
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.where(targets == IGNORE, 0.0, torch.cat(found, -1)), slope, rtol=1e-12, atol=1e-13)
    assert counts.keys() == set(COUNTS)


@every_row
@pytest.mark.parametrize("shape", SHAPES)
def test_inert_candidates_have_no_slope(objective, shape):
    """Whatever the log-probabilities; and dropped, they leave loss and slopes as they were."""
    logps, targets, given = batch(objective, shape, 5)
    whole = Layout.whole(given.candidates_per_prompt)
    inert = objective.inert(whole, given.rewards, given.sft_index)
    owner = torch.repeat_interleave(torch.arange(len(inert)), given.candidate_lengths)
    loss, slope, _ = exact(objective, logps, targets, given)
    assert (slope[..., inert[owner]] == 0).all()
    kept = ~inert[owner]
    less = given._replace(candidate_lengths=given.candidate_lengths.masked_fill(inert, 0), **of_tokens(given, kept))
    other, other_slope, _ = exact(objective, logps[kept], targets[kept], less)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other_slope, slope[..., kept], rtol=1e-12, atol=1e-13)


@every_row
def test_nothing_to_learn_from_is_zero_and_never_nan(objective):
    """Candidates without tokens, everything ignored: loss 0, slopes 0."""
    for lengths, sizes in (([0, 0], [2]), ([1, 2], [2]), ([0, 3, 0], [1, 2])):
        inputs = RankingInputs(
            torch.tensor(lengths), torch.tensor(sizes), torch.tensor([5.0, 1.0, 0.0])[: len(lengths)]
        )._replace(**random_signals(objective, sum(lengths)))
        logps = torch.zeros(sum(lengths), dtype=torch.float64, requires_grad=True)
        nothing = torch.zeros(len(logps), dtype=torch.bool)
        statistics = {name: value.requires_grad_() for name, value in seen(objective, logps).items()}
        loss, _ = ranking_loss(logps, inputs, objective, scored=nothing, statistics=statistics)
        assert float(loss.detach()) == 0
        (slope,) = torch.autograd.grad(loss, logps)
        assert (slope == 0).all()


# Chunks of a few tokens are the same for all settings of an objective that read the same, and what interprets kernels
# ranks as the torch backend does, all but CLHA's own.
def backend_rows() -> Iterator[Any]:
    for backend, budget in itertools.product(("torch", "workspace", "triton"), (None, 9 * 64 * 4)):
        whole = budget is None
        for row in firsts(ROWS, lambda row: (row.name, row.reads_entropy), NAMES):
            every = whole and (backend == "torch" or row.values[0].name == "clha")
            size = "whole" if whole else "chunks"
            yield pytest.param(
                backend, *row.values, budget, id=f"{backend}-{row.id}-{size}", marks=() if every else row.marks
            )


@pytest.mark.parametrize(("backend", "objective", "workspace_bytes"), backend_rows())
def test_every_backend_and_chunk_gives_the_eager_gradients(objective, backend, workspace_bytes):
    case = make_case(*SHAPES[0], rows=25, rewards=True, sft_index=True, ignored=0.1, dtype=torch.float32, bias=True)
    upstream = torch.tensor(0.37)
    given = case.ranking._replace(**random_signals(objective, len(case.targets)))
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        here = case.to(dtype)
        leaves = here.leaves()
        loss, metrics = linear_loss(
            *(here.hidden, here.weight, here.targets, given, objective),
            bias=here.bias,
            row_index=here.row_index,
            head=HeadOptions(workspace_bytes=workspace_bytes, softcap=8.0),
            backend=name,
        )
        grads = torch.autograd.grad(loss, leaves, upstream.to(dtype))
        results.append([loss.detach(), *grads, metrics.values])
    for got, want in zip(*results, strict=True):
        assert (got.double() - want.double()).norm() <= 3e-6 * want.double().norm() + 1e-7


@every_row
@pytest.mark.parametrize("sizes_there", [False, True])
def test_its_terms_stay_on_the_gpu(objective, sizes_there):
    """Tensors that only say they are on one: no two devices meet, and the numbers are the CPU's."""
    logps, targets, given = batch(objective, SHAPES[0], 1)
    scored = targets != IGNORE
    statistics = seen(objective, logps)
    wanted = RankedBatch(objective, given, scored, torch.float64).finish(logps, statistics)
    inert = objective.inert(Layout.whole(given.candidates_per_prompt), given.rewards, given.sft_index)
    with ValueGPU().here():
        if sizes_there:
            given = RankingInputs(*(None if value is None else OnGPU(value) for value in given))
        statistics = {name: OnGPU(value) for name, value in statistics.items()}
        found = RankedBatch(objective, given, OnGPU(scored), torch.float64).finish(OnGPU(logps), statistics)
        layout = Layout.whole(given.candidates_per_prompt, given.rewards.device)
        found_inert = objective.inert(layout, given.rewards, given.sft_index)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.value.to(want), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_inert.value if sizes_there else found_inert, inert)


# An operator's graph depends on what the objective is given; its settings are one string.
@pytest.mark.parametrize("objective", firsts(ROWS, signals, NAMES))
def test_it_compiles_without_a_graph_break(objective):
    torch._dynamo.reset()
    case = make_case([3, 2, 4], [2, 1], rewards=True, dtype=torch.float32)
    given = case.ranking._replace(**random_signals(objective, len(case.targets)))

    def twice(hidden: Tensor, weight: Tensor) -> Tensor:
        return 2 * linear_loss(hidden * 1.5, weight, case.targets, given, objective, backend="torch")[0]

    results = []
    for function in (twice, torch.compile(twice, fullgraph=True, backend="aot_eager")):
        leaves = case.to(torch.float32).leaves()
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


@every_row
def test_the_settings_travel_as_one_string(objective):
    assert decode(encode(objective)) == objective
    assert type(objective).decode(objective.encoded) == objective


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    row=st.sampled_from(range(len(ROWS))),
)
def test_any_batch_agrees_with_the_reference(sizes, seed, row):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (sum(sizes),), generator=draw).tolist()
    logps, targets, inputs = batch(ROWS[row], (lengths, sizes), seed)
    loss, slope, metrics = exact(ROWS[row], logps, targets, inputs)
    work = ranked(ROWS[row], targets, inputs)
    cuts = sorted({0, len(sizes) // 2, len(sizes)})
    found = [work.rank(a, b, logps[slice(*work.layout.span(a, b))]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(work.finish(logps)[0], loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.where(targets == IGNORE, 0.0, torch.cat(found, -1)), slope, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(work.finish(logps)[1], metrics, rtol=1e-5, atol=1e-5)


@every_row
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_inert_may_be_anything(objective, value):
    """Its NaN reaches neither loss nor slopes, in the reference neither."""
    logps, targets, given = batch(objective, ([2, 3, 1, 2, 4, 2], [1, 3, 2]), 6)
    inert = objective.inert(Layout.whole(given.candidates_per_prompt), given.rewards, given.sft_index)
    owner = torch.repeat_interleave(torch.arange(len(inert)), given.candidate_lengths)
    poisoned = torch.where(inert[owner] & (targets != IGNORE), value, logps)
    loss, slope, _ = exact(objective, logps, targets, given)
    for found_loss, found in (
        exact(objective, poisoned, targets, given)[:2],
        _evaluate(objective, poisoned, targets, given),
    ):
        torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.where(targets == IGNORE, 0.0, found), slope, rtol=1e-12, atol=1e-13)


def _evaluate(objective: Objective, logps: Tensor, targets: Tensor, given: RankingInputs) -> tuple[Tensor, Tensor]:
    work = ranked(objective, targets, given)
    return work.finish(logps)[0], work.rank(0, work.layout.num_prompts, logps)


@every_row
def test_a_checkpointed_region_runs_twice_and_no_more(objective):
    """The objective's own little graph is none of the checkpoint's business."""
    case = make_case([3, 2, 4], [2, 1], rewards=True, dtype=torch.float32)
    given = case.ranking._replace(**random_signals(objective, len(case.targets)))
    calls = []

    def region(hidden: Tensor) -> Tensor:
        calls.append(1)
        return linear_loss(hidden, case.weight, case.targets, given, objective, backend="torch")[0]

    hidden = case.hidden.requires_grad_()
    torch.utils.checkpoint.checkpoint(region, hidden, use_reentrant=False).backward()
    assert len(calls) == 2
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(1) or tensor, lambda tensor: tensor):
        linear_loss(case.hidden, case.weight, case.targets, given, objective, backend="torch")
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert region(hidden).isfinite()
    assert len(packed) <= 3


# Rewards, and thresholds that float32 and float64 judge otherwise: 0.1 - -2.9 is 3 in float32 and above it in float64.
CLOSE = [
    ([0.1, -2.9], CLHAOptions(reward_margin=3.0)),
    ([0.1, -2.9], CLHAOptions(reward_margin=3.0, reduction="pair_mean", noise_rule="signed")),
    ([0.7, 0.4], CLHAOptions(reward_margin=0.3, reduction="pair_mean")),
    ([0.1, -4.0], CLHAOptions(reward_floor=0.1)),
    ([1.0, 1.0 + 1e-9], RRHFOptions()),
    ([1.0, 1.0 - 1e-9], PolicyOptions()),
]


@pytest.mark.parametrize(("rewards", "objective"), CLOSE)
@pytest.mark.parametrize("given_in", [torch.float32, torch.float64])
def test_rewards_are_compared_in_float32_everywhere(
    rewards: list[float], objective: Objective, given_in: torch.dtype
) -> None:
    """In losses of either dtype, the reference, the kernels, a step's counts, and what is inert."""
    case = make_case([2, 3], [2], dtype=torch.float64)
    values = torch.tensor(rewards, dtype=given_in)
    inputs = RankingInputs(case.candidate_lengths, case.candidates_per_prompt, values)
    layout = Layout.of(inputs.candidate_lengths, inputs.candidates_per_prompt, torch.ones(5, dtype=torch.bool))
    counts = objective.counts(layout, inputs, 1)
    split = inputs._replace(**{name: counts[name] for name in objective.divides_by})
    kept = set()
    for dtype, backend in itertools.product((torch.float32, torch.float64), ("torch", "reference", "triton")):
        if (dtype, backend) == (torch.float64, "triton"):
            continue
        here = case.to(dtype)
        losses = []
        for ranking in (inputs, split):
            loss, metrics = linear_loss(here.hidden, here.weight, case.targets, ranking, objective, backend=backend)
            kept.add((float(metrics.sum_of("kept_pairs")), float(metrics.sum_of("open_gates"))))
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert math.isfinite(losses[0])
    assert len(kept) == 1
    (found,) = kept
    assert found[0] == float(counts["pair_counts"].sum())
