"""What has no gradient is skipped on a GPU as on a CPU: NaN in its hidden states, its logits and its entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import HeadOptions, backends
from clha_fast.backends.torch.backend import _Store, _Sweep
from clha_fast.backends.torch.vocab_parallel import _ShardedHead
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.types import EntropySlopes, Gradients, HeadInputs, Needs, RankingInputs, VocabShard
from tests.support.value_gpu import OnGPU, ValueGPU

TOKENS, WIDTH, VOCABULARY = 23, 32, 300
# Two prompts of two candidates. The second has no rewards apart and none above the SFT gate: nothing depends on it.
LENGTHS, REWARDS = (6, 5, 8, 4), (9.0, 0.0, -5.0, -5.5)
INERT = slice(11, None)
NEEDS = Needs(True, True, True)
HEADS = {
    "": HeadOptions(),
    "chunks": HeadOptions(workspace_bytes=2**13),
    "rich": HeadOptions(scale=0.9, softcap=8.0, temperature=0.7),
}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES = [("fp32", ""), ("fp32", "rich"), ("fp16", "chunks"), ("fp16", "rich"), ("bf16", "")]
WAYS = ("logps", "statistics", "sharded", "loss", "entropy")


def numbers() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.rand(TOKENS, generator=draw) - 0.5 for name in ("grad", "grad_entropy")}
    for name in ("grad", "grad_entropy"):
        made[name][INERT] = 0
    return made | {
        "hidden": torch.randn(TOKENS, WIDTH, generator=draw),
        "weight": 0.3 * torch.randn(VOCABULARY, WIDTH, generator=draw),
        "bias": torch.randn(VOCABULARY, generator=draw),
        "targets": torch.randint(VOCABULARY, (TOKENS,), generator=draw),
    }


def gradients(way: str, given: dict[str, Any], head: HeadOptions) -> Gradients:
    """Of hidden, weight and bias, by one way through the torch backend."""
    backend: Any = backends.load("torch")
    inputs = HeadInputs(given["hidden"], given["weight"], given["bias"], given["targets"], None)
    sizes = (torch.tensor(LENGTHS), torch.tensor([2, 2]))
    if way == "logps":
        found = backend.token_logps_forward(inputs, head)
        return backend.token_logps_backward(given["grad"], inputs, found.lse, found.route, head, NEEDS)
    if way == "statistics":
        found = backend.statistics_forward(inputs, head, ("entropy",))
        slopes = EntropySlopes(given["grad_entropy"], found.values["entropy"])
        return backend.statistics_backward(given["grad"], slopes, inputs, found.lse, head, NEEDS)
    if way == "sharded":
        sweep = _ShardedHead(VocabShard(0, VOCABULARY), inputs, head)
        peak, total, _, _ = sweep.local_softmax()
        sweep.allocate(NEEDS)
        sweep.accumulate_gradients(given["grad"], None, peak, total.log())
        return sweep.gradients(given["hidden"].dtype)
    if way == "loss":
        ranking = RankingInputs(*sizes, rewards=torch.tensor(REWARDS))
        return Gradients(*backend.loss_sweep(inputs, ranking, head, PUBLISHED, NEEDS)[1])
    # As of an objective with an entropy bonus.
    store = _Store(_Sweep(inputs, head, NEEDS, ("entropy",)))
    store.sweep.mixes = True
    store.sweep.allocate(NEEDS)
    slopes = torch.stack([given["grad"], given["grad_entropy"]])
    for chunk in store.chunks([0, sum(LENGTHS[:2]), TOKENS]):
        store.hold(chunk)
        store.add_gradients(chunk, slopes[:, chunk.start : chunk.stop])
    return store.sweep.gradients(given["hidden"].dtype)


def on_gpu(way: str, given: dict[str, Tensor], head: HeadOptions) -> list[Tensor]:
    with ValueGPU().here(90):
        return [g.value for g in gradients(way, {name: OnGPU(t) for name, t in given.items()}, head)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_has_no_gradient_is_skipped(way: str, kind: str, name: str) -> None:
    given, dtype = numbers(), KINDS[kind]
    given |= {key: given[key].to(dtype) for key in ("hidden", "weight", "bias")}
    finite = gradients(way, given, HEADS[name])
    given["hidden"][INERT] = torch.nan
    for got, want in zip(on_gpu(way, given, HEADS[name]), finite, strict=True):
        assert got.isfinite().all()
        error = (got.double() - want.double()).norm()
        assert error <= torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2) * want.double().norm()
    for got in gradients(way, given, HEADS[name]):
        assert got.isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("way", ["logps", "loss"])
def test_what_has_a_gradient_is_not(way: str, value: float) -> None:
    """A NaN that the loss depends on still shows."""
    given = numbers()
    given["hidden"][2, 0] = value
    hidden, weight, _ = on_gpu(way, given, HeadOptions())
    assert hidden[2].isnan().any()
    assert weight.isnan().any()
