"""The torch backend's columns of logits: tokens in whole alignments, and those without a gradient left out in runs."""

from __future__ import annotations

import pytest
import torch

from clha_fast import HeadOptions
from clha_fast.backends.torch import head
from clha_fast.types import HeadInputs
from tests.backends.test_torch_backend import HEADS, logps_and_gradients
from tests.support.helpers import make_case


@pytest.mark.parametrize("counts", [(4,), (16,), (17, 5), (35, 0, 3)])
@pytest.mark.parametrize("row_index", [False, True])
def test_products_take_whole_alignments(counts, row_index) -> None:
    """Rows of zeros follow each part's, whatever stands in the rows of `hidden`."""
    total, width = sum(counts), 8
    hidden = torch.arange(1.0, total + 4).unsqueeze(1).expand(-1, width)
    index = torch.arange(total).flip(0) + 3 if row_index else None
    inputs = HeadInputs(hidden, torch.zeros(128, width), None, torch.zeros(total, dtype=torch.int64), index)
    rows = head.TorchHead(inputs, HeadOptions()).token_rows(*torch.arange(total).split(list(counts)))
    assert len(rows) == sum(-(-count // 16) * 16 for count in counts)
    token = 0
    for own, count in zip(rows.split([-(-count // 16) * 16 for count in counts]), counts, strict=True):
        for row in own[:count]:
            assert bool((row == (total - token + 3 if row_index else token + 1)).all())
            token += 1
        assert not own[count:].any()


@pytest.mark.parametrize("every", [2, 3, 20, 45, 1000])
@pytest.mark.parametrize("words", [19, 300])
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_tokens_without_a_gradient_leave_runs(every, words, head):
    """Stored columns are taken run by run, or copied together where there are many runs: from none to 45 of them."""
    case = make_case([15] * 6, [6], hidden_size=40, vocab_size=words, bias=True, rows=40)
    upstream = torch.where(torch.arange(90) % every == every - 1, 0.0, torch.linspace(-1, 1, 90, dtype=torch.float64))
    head = head.replace(workspace_bytes=8 * words * 50)
    _, gradients = logps_and_gradients(case, upstream, "torch", head)
    _, expected = logps_and_gradients(case, upstream, "reference", head)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("poison", ["an unread row", "a row without a gradient"])
def test_zeros_beside_the_tokens_stay_zeros(count, poison):
    """Products take zeros up to a whole alignment: nothing that is not finite comes in by them."""
    case = make_case([count + 1], [1], hidden_size=8, vocab_size=300, rows=count + 2)
    index = torch.arange(count + 1) + 1
    hidden = case.hidden.clone()
    if poison == "an unread row":
        hidden[0] = torch.nan
        upstream = torch.ones(count + 1, dtype=torch.float64)
    else:
        hidden[1] = torch.inf
        upstream = torch.arange(count + 1, dtype=torch.float64)
    case = case.replace(row_index=index, hidden=hidden)
    _, (dhidden, dweight) = logps_and_gradients(case, upstream, "torch")
    clean = case.replace(hidden=torch.where(hidden.isfinite(), hidden, 0.0))
    _, (clean_dhidden, clean_dweight) = logps_and_gradients(clean, upstream, "torch")
    torch.testing.assert_close(dhidden, clean_dhidden, rtol=0, atol=0)
    torch.testing.assert_close(dweight, clean_dweight, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens_keep_their_own_products(count):
    inputs = HeadInputs(torch.ones(count, 8), torch.zeros(128, 8), None, torch.zeros(count, dtype=torch.int64), None)
    assert len(head.TorchHead(inputs, HeadOptions()).token_rows(torch.arange(count))) == count


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 17, 40, 300])
@pytest.mark.parametrize("size", [10.0, 1000.0])
def test_routed_logits_are_those_of_the_scan(tokens, size):
    """Sure tokens, all blocks kept: exp(z - lse) - 1 of their targets is 0 only where z is formed alike twice."""
    case = make_case([tokens], [1], hidden_size=64, vocab_size=2000, dtype=torch.float32, seed=tokens)
    hidden = case.hidden * size
    case = case.replace(hidden=hidden, targets=(hidden.double() @ case.weight.double().t()).argmax(1))
    upstream = torch.ones(tokens)
    errors = []
    exact = case.to(torch.float64)
    _, wanted = logps_and_gradients(exact, upstream.double(), "reference")
    for backend, options in (("reference", HeadOptions()), ("torch", HeadOptions(max_dropped_mass=0.0))):
        _, found = logps_and_gradients(case, upstream, backend, options)
        errors.append([float((a.double() - b).norm()) for a, b in zip(found, wanted, strict=True)])
    for eager, routed, whole in zip(*errors, wanted, strict=True):
        assert routed <= 4 * eager + 1e-6 * float(whole.norm()) + 1e-9
