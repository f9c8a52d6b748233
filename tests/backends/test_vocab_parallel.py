"""Vocabulary-parallel log-probabilities in a group of one, where all values are known; two processes: test_wrappers.

Shards whose words are all ruled out, in two processes, are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clha_fast import (
    CLHAOptions,
    HeadOptions,
    PolicyOptions,
    RankingInputs,
    linear_clha_loss,
    linear_loss,
    reference,
    token_logps,
)
from clha_fast.types import STATISTICS, VocabShard
from tests.support import forked


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_closed_form() -> None:
    """z = (0, ln 3): probabilities 1/4 and 3/4; dlogp/dz_v = 1[v = y] - p_v."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64, requires_grad=True)
    logps = token_logps(hidden, weight, torch.tensor([1]), shard=VocabShard(0, 2))
    assert logps.item() == pytest.approx(math.log(0.75))
    dhidden, dweight = torch.autograd.grad(2 * logps.sum(), (hidden, weight))
    assert dweight.flatten().tolist() == pytest.approx([-0.5, 0.5])
    assert dhidden.item() == pytest.approx(0.5 * math.log(3))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "head", [HeadOptions(), HeadOptions(scale=0.5, softcap=2.0, temperature=0.7, workspace_bytes=600)]
)
@pytest.mark.parametrize("rows_of_hidden", [7, 19], ids=["fewer than tokens", "more"])
def test_error_is_within_the_eager_one(dtype: torch.dtype, head: HeadOptions, rows_of_hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in ((rows_of_hidden, 16), (53, 16), (53,))]
    targets, rows = torch.randint(53, (11,), generator=generator), torch.randint(7, (11,), generator=generator)
    targets[2] = head.ignore_index
    upstream = torch.randn(11, generator=generator)

    def gradients(exact: bool, fused: bool) -> list[torch.Tensor]:
        inputs = [leaf.double() if exact else leaf.clone() for leaf in leaves]
        hidden, weight, bias = (leaf.requires_grad_() for leaf in inputs)
        if fused:
            logps = token_logps(hidden, weight, targets, shard=VocabShard(0, 53), bias=bias, row_index=rows, head=head)
        else:
            logps = reference.token_logps(hidden, weight, bias, targets, rows, head)
        values = torch.autograd.grad(logps @ upstream.to(logps.dtype), (hidden, weight, bias))
        return [logps.detach(), *values]

    exact, eager, fused = gradients(True, False), gradients(False, False), gradients(False, True)
    for want, rough, got in zip(exact, eager, fused, strict=True):
        # A few float32 roundings on top where the eager error happens to vanish.
        allowed = 1.05 * (rough.double() - want).norm() + 2e-7 * want.norm()
        assert (got.double() - want).norm() <= allowed


def test_loss_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(21, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(21, (9,), generator=generator)
    ranking = (torch.tensor([2, 3, 0, 4]), torch.tensor([3, 1]))
    options = CLHAOptions(margin=0.5)
    given = {"rewards": torch.tensor([7.0, 1.0, 0.0, 2.0]), "prompt_count": torch.tensor(5.0)}
    results = []
    for parallel in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if parallel:
            loss, metrics = linear_loss(
                *leaves, targets, RankingInputs(*ranking, **given), options, shard=VocabShard(0, 21)
            )
        else:
            loss, metrics = linear_clha_loss(*leaves, targets, *ranking, options=options, **given)
        results.append([loss.detach(), metrics.values, metrics.scores, *torch.autograd.grad(3 * loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_degenerate() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    logps = token_logps(torch.randn(2, 3), weight, nothing, shard=VocabShard(0, 5), row_index=nothing)
    assert logps.shape == (0,)
    (dweight,) = torch.autograd.grad(logps.sum(), (weight,))
    assert torch.equal(dweight, torch.zeros_like(weight))
    hidden = torch.randn(2, 3)
    hidden[1, 0] = float("nan")
    logps = token_logps(hidden, weight, torch.tensor([4, 4]), shard=VocabShard(0, 5))
    assert logps.isnan().tolist() == [False, True]
    ignored = token_logps(hidden, weight, torch.tensor([4, -100]), shard=VocabShard(0, 5))
    assert ignored[1].item() == 0


def test_bad_arguments() -> None:
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, V = 8\) or -100, got 8 at position 1"):
        token_logps(hidden, weight, torch.tensor([7, 8]), shard=VocabShard(0, 8))
    with pytest.raises(ValueError, match="shard: expected rows 4 to 9 within a vocabulary of 8"):
        token_logps(hidden, weight, torch.tensor([0, 1]), shard=VocabShard(4, 8))
    # In the vocabulary, but on no process: as an index out of range on a GPU.
    logps = token_logps(hidden, weight, torch.tensor([4, 7]), shard=VocabShard(0, 8))
    assert logps.isnan().tolist() == [False, True]


def test_statistics_are_the_plain_ones() -> None:
    """Values of one shard that holds everything, with a temperature for each token; NaN and -inf included."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 4), (21, 4), (21,)))
    hidden[5], bias[3] = math.nan, -math.inf
    targets, temperature = torch.tensor([3, 1, -100, 7, 20, 2]), torch.linspace(0.5, 2, 6)
    found = []
    for shard in (None, VocabShard(0, 21)):
        leaves = [hidden[:, :].clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        arguments = {"bias": leaves[2], "temperature": temperature, "shard": shard, "statistics": STATISTICS}
        logps, values = token_logps(*leaves[:2], targets, **arguments)
        kept = torch.tensor([1, 3, 4])
        loss = (logps[kept] * values["entropy"][kept]).sum()
        found.append([logps.detach(), *(v.detach() for v in values.values()), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(found[1], found[0], equal_nan=True)


def test_a_bonus_of_entropy_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, 4), (21, 4)))
    targets = torch.randint(21, (9,), generator=generator)
    given = RankingInputs(torch.tensor([2, 3, 0, 4]), torch.tensor([3, 1]), rewards=torch.tensor([7.0, 1.0, 0.0, 2.0]))
    results = []
    for shard in (None, VocabShard(0, 21)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, metrics = linear_loss(*leaves, targets, given, PolicyOptions(entropy_weight=0.2), shard=shard)
        results.append([loss.detach(), metrics.values, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[1], results[0])


# Of 6 words, 3 a process, those with a logit of -inf: a whole shard, also but for one word of the other.
RULED_OUT = {
    "second": (3, 4, 5),
    "first": (0, 1, 2),
    "all but one": (1, 2, 3, 4, 5),
    "all but the last": (0, 1, 2, 3, 4),
}


def ruled_out(name: str, shard: VocabShard | None, here: slice) -> list[torch.Tensor]:
    """Log-probabilities, statistics and gradients where some words cannot be; of an own shard, its own rows."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 4), (6, 4)))
    bias = torch.zeros(6, dtype=torch.float64)
    bias[list(RULED_OUT[name])] = -torch.inf
    last = next(word for word in range(5, -1, -1) if word not in RULED_OUT[name])
    targets = torch.tensor([last, last, -100, RULED_OUT[name][0]])
    leaves = [hidden.requires_grad_(), weight[here].requires_grad_(), bias[here].requires_grad_()]
    logps, values = token_logps(*leaves[:2], targets, bias=leaves[2], shard=shard, statistics=STATISTICS)
    loss = logps[:2].sum() + (values["entropy"] * torch.arange(4.0)).sum()
    return [logps.detach(), *(value.detach() for value in values.values()), *torch.autograd.grad(loss, leaves)]


def shard_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    here = slice(3 * rank, 3 * rank + 3)
    torch.save({name: ruled_out(name, VocabShard(3 * rank, 6), here) for name in RULED_OUT}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_shard_without_a_word_that_can_be_adds_nothing(tmp_path: Path) -> None:
    code = f"import os, sys; from {__name__} import shard_process; shard_process(int(os.environ['RANK']), sys.argv[1])"
    done = forked.run("train", "-c", code, str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in RULED_OUT:
            *values, dhidden, dweight, dbias = ruled_out(name, None, slice(None))
            assert not torch.stack(values[:3]).isnan().any()
            here = slice(3 * rank, 3 * rank + 3)
            torch.testing.assert_close(found[name], [*values, dhidden, dweight[here], dbias[here]])
