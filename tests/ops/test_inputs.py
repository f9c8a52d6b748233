"""What comes in from odd places: other devices, meta and distributed tensors, default dtypes, NaN counts, exports."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import clha_fast
from clha_fast import (
    CLHALoss,
    CLHAOptions,
    CoHOptions,
    HeadOptions,
    LinearLoss,
    Objective,
    PolicyOptions,
    PROOptions,
    RankingInputs,
    SFTOptions,
    linear_clha_loss,
    linear_loss,
    ranking_loss,
    token_logps,
)
from clha_fast.models.heads import UnsupportedHeadError
from clha_fast.objectives import Group, Terms
from clha_fast.types import COUNTS
from tests.support.helpers import IGNORE, Case, make_case
from tests.support.parameters import covered
from tests.support.tiny import make_model

BACKENDS = ["torch", "reference", "triton", "workspace"]
OBJECTIVES = [CLHAOptions(), PROOptions(), SFTOptions(form="token_mean")]
by_name = {"ids": lambda o: o.name}


def small(**changes: Any) -> Case:
    return make_case([2, 3, 4, 2, 1], [4, 1], dtype=torch.float32, bias=True, rewards=True, seed=4, **changes)


def given(case: Case, **changes: Any) -> RankingInputs:
    return RankingInputs(case.candidate_lengths, case.candidates_per_prompt, case.rewards)._replace(**changes)


@pytest.fixture(params=["torch", "reference", "triton", "workspace"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in ("triton", "workspace"):
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels run in the interpreter here")
    return name


# ---- places ----

RANKING = {
    "candidate_lengths": lambda case: case.candidate_lengths,
    "candidates_per_prompt": lambda case: case.candidates_per_prompt,
    "rewards": lambda case: case.rewards,
    "sft_index": lambda case: torch.zeros(2, dtype=torch.long),
    "pair_counts": lambda case: torch.ones(3),
    **dict.fromkeys(COUNTS[1:], lambda case: torch.tensor(2.0)),
}


@pytest.mark.parametrize("name", RANKING)
def test_a_third_device_is_refused_by_name(name: str) -> None:
    case = small()
    elsewhere = {name: RANKING[name](case).to("meta")}
    said = f"{name}: expected a tensor on the CPU or on the device of the loss, cpu, got .* on meta"
    for backend in ("auto", "torch", "reference"):
        with pytest.raises(ValueError, match=said):
            linear_loss(case.hidden, case.weight, case.targets, given(case, **elsewhere), backend=backend)
    logps = token_logps(case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match=said):
        ranking_loss(logps, given(case, **elsewhere))


def test_scored_lies_with_the_log_probabilities() -> None:
    case = small()
    logps = token_logps(case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match=r"scored: expected booleans of shape \[N = 12\] on cpu, got .* on meta"):
        ranking_loss(logps, given(case), scored=torch.ones(12, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES, **by_name)
def test_meta_tensors_give_shapes(dtype: torch.dtype, objective: Objective) -> None:
    case = small().to(dtype)
    values = linear_loss(case.hidden, case.weight, case.targets, given(case), objective)
    hidden, weight, targets = (t.to("meta").detach() for t in (case.hidden, case.weight, case.targets))
    hidden.requires_grad_()
    for place in ("cpu", "meta"):
        there = RankingInputs(*(None if t is None else t.to(place) for t in given(case)))
        loss, metrics = linear_loss(hidden, weight, targets, there, objective)
        for got, wanted in ((loss, values[0]), (metrics.values, values[1].values), (metrics.scores, values[1].scores)):
            assert (got.device.type, got.shape, got.dtype) == ("meta", wanted.shape, wanted.dtype)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert (grad.shape, grad.dtype) == (hidden.shape, dtype)
    assert token_logps(hidden, weight, targets).shape == case.targets.shape
    with pytest.raises(ValueError, match="hidden: expected values for the loss of backend 'reference'"):
        linear_loss(hidden, weight, targets, given(case), objective, backend="reference")
    with pytest.raises(ValueError, match=r"logps: expected values .* on meta"):
        ranking_loss(torch.zeros(12, device="meta"), given(case), objective)


def test_a_model_on_meta_is_told_to_load() -> None:
    for tied in (True, False):
        with torch.device("meta"):
            model = make_model(50, tie_word_embeddings=tied)
        with pytest.raises(UnsupportedHeadError, match=r"got LlamaForCausalLM on the meta device; load it first"):
            clha_fast.attach(model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "targets", "rewards", "candidate_lengths"])
def test_distributed_tensors_are_refused_by_name(one_process: Any, name: str) -> None:
    case = small()
    for placement in (Replicate(), Shard(0)):
        spread = DTensor.from_local(getattr(case, name), one_process, [placement])
        changed = case.replace(**{name: spread})
        with pytest.raises(
            ValueError, match=rf"{name}: expected a plain tensor, got a DTensor; .*to_local\(\).*attach"
        ):
            linear_clha_loss(**changed.arguments())
        if name in ("hidden", "weight", "bias", "targets"):
            with pytest.raises(ValueError, match=f"{name}: expected a plain tensor, got a DTensor"):
                token_logps(changed.hidden, changed.weight, changed.targets, bias=changed.bias)


# ---- numbers ----


@dataclass(frozen=True)
class Reporting(Objective):
    """Its report is Python's numbers, too many for bfloat16's digits."""

    name: ClassVar[str] = "reporting"
    metric_names: ClassVar[tuple[str, ...]] = ("large", "odd")

    def terms(self, group: Group) -> Terms:
        loss = -group.sums.sum() / group.totals.prompts
        return Terms(loss, torch.zeros_like(loss))

    def report(self, group: Group) -> Mapping[str, Any]:
        return {"large": 2389.0, "odd": float(len(group.logps)) + 1025.0}


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("objective", [*OBJECTIVES, PROOptions(form="paper"), Reporting()], **by_name)
def test_the_default_dtype_changes_nothing(backend: str, objective: Objective, default_dtype: torch.dtype) -> None:
    sizes = [4] * 3
    case = make_case([1] * 12 if backend != "torch" else [300] * 12, sizes, dtype=torch.float32, rewards=True, seed=1)
    case = case.replace(rewards=case.rewards.view(-1, 4).sort(descending=True)[0].flatten())

    def everything() -> list[Tensor]:
        leaf = case.hidden.clone().requires_grad_()
        loss, metrics = linear_loss(leaf, case.weight, case.targets, given(case), objective, backend=backend)
        return [loss.detach(), metrics.values, metrics.scores, *torch.autograd.grad(loss, leaf)]

    wanted = everything()
    torch.set_default_dtype(default_dtype)
    for got, expected in zip(everything(), wanted, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, -0.25])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_finite_and_not_negative(backend: str, name: str, wrong: float) -> None:
    case = small()
    counts = torch.tensor([2.0, wrong, 1.0]) if name == "pair_counts" else torch.tensor(wrong)
    said = f"{name}: expected finite counts that are not negative, got {wrong}"
    with pytest.raises(ValueError, match=said):
        linear_loss(case.hidden, case.weight, case.targets, given(case, **{name: counts}), backend=backend)
    with pytest.raises(ValueError, match=said):
        ranking_loss(token_logps(case.hidden, case.weight, case.targets), given(case, **{name: counts}))
    none_at_a_distance = given(case, pair_counts=torch.tensor([3.0, 2.0, 0.0]))
    linear_loss(case.hidden, case.weight, case.targets, none_at_a_distance, CLHAOptions(reward_margin=1e9))


@pytest.mark.parametrize("wrong", [torch.tensor(True), torch.tensor(2 + 1j), torch.tensor(False)])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_numbers(backend: str, name: str, wrong: Tensor) -> None:
    case = small()
    counts = wrong.expand(3) if name == "pair_counts" else wrong
    said = f"{name}: expected integers or floating numbers, got"
    with pytest.raises(ValueError, match=said):
        linear_loss(case.hidden, case.weight, case.targets, given(case, **{name: counts}), backend=backend)
    with pytest.raises(ValueError, match=said):
        ranking_loss(token_logps(case.hidden, case.weight, case.targets), given(case, **{name: counts}))


@pytest.mark.parametrize("name", ["prompt_count", "candidate_count", "token_count"])
@pytest.mark.parametrize("zero", [torch.tensor(0), torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)])
def test_a_step_with_nothing_has_no_tokens(backend: str, name: str, zero: Tensor) -> None:
    case = small()
    said = f"^{name}: expected what the whole step has, got 0 for a batch with scored tokens$"
    with pytest.raises(ValueError, match=said):
        linear_loss(case.hidden, case.weight, case.targets, given(case, **{name: zero}), backend=backend)
    with pytest.raises(ValueError, match=said):
        ranking_loss(token_logps(case.hidden, case.weight, case.targets), given(case, **{name: zero}))


NORMALISED = [
    (CoHOptions(), "token_count"),
    (PolicyOptions(), "token_count"),
    (PolicyOptions(reduction="sequence_mean"), "candidate_count"),
    (SFTOptions(form="token_mean"), "target_token_count"),
    (SFTOptions(), "prompt_count"),
]


@pytest.mark.parametrize(("objective", "name"), NORMALISED)
def test_counts_below_one_divide_and_nothing_over_nothing_is_nothing(
    backend: str, objective: Objective, name: str
) -> None:
    case = small()
    rewarded = given(case)._replace(rewards=torch.arange(float(len(case.candidate_lengths))))

    def loss(targets: Tensor, count: float) -> float:
        inputs = rewarded._replace(**{name: torch.tensor(count)})
        return float(linear_loss(case.hidden, case.weight, targets, inputs, objective, backend=backend)[0])

    one = loss(case.targets, 1.0)
    # On policy of rewards, a loss is a sum of advantages, which may be 0 but for rounding.
    assert loss(case.targets, 0.5) == pytest.approx(2 * one, rel=1e-5, abs=1e-6)
    assert loss(case.targets, 0.25) == pytest.approx(4 * one, rel=1e-5, abs=1e-6)
    if name != "prompt_count":  # of which there is always one
        assert loss(torch.full_like(case.targets, -100), 0.0) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("head", [HeadOptions(), HeadOptions(softcap=3.0, scale=0.5)], ids=["plain", "softcap"])
@pytest.mark.parametrize("rows", [None, 20], ids=["rows in order", "row_index"])
def test_what_comes_upstream_of_ignored_tokens_is_nothing(
    backend: str, head: HeadOptions, rows: int | None, bad: float
) -> None:
    case = small(ignored=0.4, rows=rows)
    ignored = case.targets == IGNORE
    assert ignored.any()
    found = []
    for upstream in (bad, 0.0):
        leaves = case.to(torch.float32).leaves()
        logps = token_logps(
            leaves[0], leaves[1], case.targets, bias=leaves[2], row_index=case.row_index, head=head, backend=backend
        )
        found.append(torch.autograd.grad(logps, leaves, torch.where(ignored, upstream, 1.5)))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


# ---- exports ----


class Model(nn.Module):
    """Returns the metrics with the loss."""

    def __init__(self, case: Case, loss: nn.Module) -> None:
        super().__init__()
        self.weight, self.loss = nn.Parameter(case.weight.clone()), loss

    def forward(self, hidden: Tensor, targets: Tensor, lengths: Tensor, sizes: Tensor, rewards: Tensor) -> Any:
        if isinstance(self.loss, CLHALoss):
            return self.loss(hidden, self.weight, targets, lengths, sizes, rewards=rewards)
        loss, metrics = self.loss(hidden, self.weight, targets, RankingInputs(lengths, sizes, rewards))
        return {"loss": loss, "more": [metrics]}


@pytest.mark.parametrize(
    ("strict", "loss"),
    covered(
        {"traced": False, "strict": True},
        {"clha": CLHALoss(backend="torch"), "linear": LinearLoss(PROOptions(), backend="torch")},
    ),
)
def test_a_module_that_returns_metrics_is_exported(loss: nn.Module, strict: bool) -> None:
    case = small()
    model = Model(case, loss)
    inputs = (case.hidden, case.targets, case.candidate_lengths, case.candidates_per_prompt, case.rewards)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, inputs, strict=strict), file)
    file.seek(0)
    for exported in (torch.export.export(model, inputs, strict=strict), torch.export.load(file)):
        got, wanted = exported.module()(*inputs), model(*inputs)
        if isinstance(wanted, dict):
            got, wanted = (got["loss"], *got["more"]), (wanted["loss"], *wanted["more"])
        assert torch.equal(got[0], wanted[0])
        assert str(got[1]) == str(wanted[1])
        assert got[1].names == wanted[1].names
