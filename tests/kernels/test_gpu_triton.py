"""What only a GPU can show: no synchronisation, graph capture, bfloat16, offsets past 2^31, and the same bits twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from clha_fast import functional, reference
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.options import HeadOptions
from tests.support.triton_harness import PLAIN, RICH, Problem, eager_gradients, error, gradients, problem

pytestmark = pytest.mark.gpu

ROUTED = PLAIN.replace(max_dropped_mass=1e-2)
EVERY_PAIR = PLAIN.replace(max_dropped_mass=0.0)
# Dense and routed; rows of whole tiles for TMA, and 1,001 columns that keep to pointers.
CASES = [(PLAIN, 1024), (RICH, 1024), (ROUTED, 1024), (PLAIN, 1001), (ROUTED, 1001)]


def ranked(p: Problem, lengths: list[int], sizes: list[int]) -> dict[str, Tensor]:
    device = p.hidden.device
    return {
        "candidate_lengths": torch.tensor(lengths, device=device),
        "candidates_per_prompt": torch.tensor(sizes, device=device),
        "rewards": -torch.arange(len(lengths), device=device).float(),
    }


def step(p: Problem, ranking: dict[str, Tensor]) -> list[Tensor]:
    """Loss and both gradients of one call."""
    leaves = [p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()]
    loss, _ = functional.linear_clha_loss(
        *leaves,
        p.targets,
        bias=p.bias,
        row_index=p.row_index,
        head=p.head,
        options=PUBLISHED,
        backend="triton",
        **ranking,
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize(("head", "width"), CASES, ids=str)
@pytest.mark.parametrize("rows", [None, 300])
def test_forward_and_backward_never_wait(head: HeadOptions, width: int, rows: int | None) -> None:
    p = problem(700, 5000, width, dtype=torch.bfloat16, head=head, rows=rows)
    ranking = ranked(p, [100, 200, 150, 250], [2, 2])
    first = step(p, ranking)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    second = step(p, ranking)
    torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("head", "width"), CASES, ids=str)
def test_a_graph_of_forward_and_backward_replays(head: HeadOptions, width: int) -> None:
    p = problem(700, 5000, width, dtype=torch.bfloat16, head=head, rows=300)
    ranking = ranked(p, [100, 200, 150, 250], [2, 2])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(p, ranking)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(p, ranking)
    p.hidden.copy_(torch.randn_like(p.hidden))
    p.targets.copy_(p.targets.flip(0))
    graph.replay()
    for value, wanted in zip(captured, step(p, ranking), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("head", [PLAIN, RICH, EVERY_PAIR], ids=["plain", "rich", "every pair"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(600, 5003, 512), (1500, 3000, 1001), (130, 9000, 2048)])
def test_gradients_are_no_worse_than_the_eager_path(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype, head: HeadOptions
) -> None:
    p = problem(tokens, vocabulary, width, dtype=dtype, head=head)
    p.weight.mul_(0.1)
    grad = torch.randn(tokens, device="cuda")
    exact = eager_gradients(p, grad, torch.float64)
    for value, eager, wanted in zip(gradients(p, grad)[:2], eager_gradients(p, grad, dtype), exact, strict=True):
        assert value is not None
        assert error(value, wanted) <= 1.05 * error(eager, wanted)


def test_a_percent_of_the_mass_costs_no_more_than_bfloat16_itself() -> None:
    p = problem(1000, 20_000, 512, dtype=torch.bfloat16, head=ROUTED)
    p.weight.mul_(0.5)  # a softmax of about 2 nats
    grad = torch.randn(1000, device="cuda")
    exact = eager_gradients(p, grad, torch.float64)
    for value, eager, wanted in zip(
        gradients(p, grad)[:2], eager_gradients(p, grad, torch.bfloat16), exact, strict=True
    ):
        assert value is not None
        assert error(value, wanted) <= 2 * error(eager, wanted)


@pytest.mark.parametrize("head", [PLAIN, ROUTED], ids=["dense", "routed"])
def test_131072_tokens_at_once(head: HeadOptions) -> None:
    """2^34 logits, and offsets past 2^31 in block statistics, routes and lists; checked on tokens from both ends."""
    tokens, vocabulary, width = 131_072, 128_256, 256
    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw, device="cuda", dtype=torch.bfloat16).mul_(0.2)
    weight.requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=draw, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps = functional.token_logps(hidden, weight, targets, head=head, backend="triton")
    grad = torch.zeros(tokens, device="cuda")
    some = torch.cat([torch.arange(64), torch.arange(tokens - 64, tokens)]).cuda()
    grad[some] = torch.randn(128, generator=draw, device="cuda")
    dhidden, dweight = torch.autograd.grad(logps, [hidden, weight], grad)
    # Statistics and route: 12 bytes a token and block of 128. The rest: sorted rows, float32 sums, workspace.
    blocks = -(-vocabulary // 128)
    expected = tokens * blocks * 12 + tokens * width * 8 + vocabulary * width * 4 + 2 * 64 * 2**20
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * expected
    leaves = [hidden[some].detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    exact = reference.token_logps(*leaves, None, targets[some], None, PLAIN)
    torch.testing.assert_close(logps[some].double(), exact, rtol=1e-4, atol=1e-3)
    wanted = torch.autograd.grad(exact, leaves, grad[some].double())
    assert error(dhidden[some], wanted[0]) < 1e-2
    assert error(dweight, wanted[1]) < 1e-2
    others = torch.ones(tokens, dtype=torch.bool, device="cuda")
    others[some] = False
    assert (dhidden[others] == 0).all()


@pytest.mark.parametrize(("head", "width"), CASES, ids=str)
def test_the_same_bits_ten_times(head: HeadOptions, width: int) -> None:
    p = problem(3000, 9000, width, dtype=torch.bfloat16, head=head, rows=2000)
    grad = torch.randn(3000, device="cuda")
    first = gradients(p, grad)[:2]
    for _ in range(9):
        for value, wanted in zip(gradients(p, grad)[:2], first, strict=True):
            assert value is not None
            assert wanted is not None
            assert torch.equal(value, wanted)
