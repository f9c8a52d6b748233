"""Two attention calls merged by their log-sum-exps, against a dense masked softmax, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from clha_fast.batching.segments import SegmentGroup, Segments, place
from clha_fast.models import two_calls
from clha_fast.models.segment_attention import plan_for, window_of
from clha_fast.models.segment_masks import by_position
from clha_fast.models.segment_plan import SegmentPlan, is_causal
from clha_fast.models.two_calls import TwoCalls, attend, merge
from clha_fast.models.varlen import OfTorch

# Prompts with three, no and one candidate; a second row; padding behind both.
SEGMENTS = place([(5, [3, 1, 4]), (2, []), (1, [2])], multiple=10)
TWO_ROWS = Segments(
    2, 9, (SegmentGroup(0, (0, 3), ((3, 2), (5, 4))), SegmentGroup(1, (0, 2), ((2, 1),)), SegmentGroup(1, (3, 4), ()))
)


def plan_of(segments, function=causal_mask_function):
    return plan_for(segments, function, torch.device("cpu"))


def dense(q, k, v, plan, scale, softcap=None, sinks=None):
    """A softmax over whole rows; tokens in no group give 0."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    tokens = plan.segments.tokens()
    rows, width = tokens.group_ids.shape
    index = torch.arange(width)
    visible = by_position(plan.function, tokens)(
        torch.arange(rows)[:, None, None], 0, index[None, :, None], index[None, None]
    )[:, None]
    there = (tokens.group_ids >= 0)[:, None, :, None]
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return torch.where(there, scores.softmax(-1)[..., :width] @ v, 0)


def inputs(segments, heads=2, groups=2, size=4, values=4, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((heads, size), (groups, size), (groups, values))
    return [
        torch.randn(segments.rows, h, segments.width, d, generator=draw, dtype=dtype).requires_grad_() for h, d in sizes
    ]


def test_by_hand():
    """Two keys with scores 0 and log 3, values 0 and 1, one after another: 1/4 of the first, 3/4 of the second."""
    out, lse = merge(torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1), torch.tensor([math.log(3)]))
    assert out.item() == pytest.approx(0.75)
    assert lse.item() == pytest.approx(math.log(4))
    segments = place([(1, [1, 1])])
    q = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(3), math.log(7)], dtype=torch.float64).view(1, 1, 3, 1)
    v = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).view(1, 1, 3, 1)
    # The second candidate does not see the first: 7/8, not 10/11.
    assert attend(q, k, v, plan_of(segments), 1.0).flatten().tolist() == pytest.approx([0, 3 / 4, 7 / 8])
    sink = torch.tensor([0.0], dtype=torch.float64)
    found = attend(q, k, v, plan_of(segments), 1.0, sinks=sink)
    assert found.flatten().tolist() == pytest.approx([0, 3 / 5, 7 / 9])


KINDS = {
    "plain": {},
    "grouped": {"heads": 4, "groups": 2},
    "values are narrower": {"size": 6, "values": 3},
    "values are wider": {"size": 3, "values": 5},
    "sinks": {"sinks": True},
    "window": {"function": sliding_window_causal_mask_function(3)},
    "window of one": {"function": sliding_window_causal_mask_function(1)},
    "window and sinks": {"function": sliding_window_causal_mask_function(4), "sinks": True},
    "softcap": {"softcap": 0.7},
    "softcap, sinks, window, grouped": {
        "softcap": 0.7, "sinks": True, "function": sliding_window_causal_mask_function(3), "heads": 4, "groups": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [SEGMENTS, TWO_ROWS], ids=["one row", "two rows"])
@pytest.mark.parametrize("block", [1024, 2])
def test_as_a_masked_softmax(kind, segments, block, monkeypatch):
    """float64: outputs, and gradients with an arbitrary upstream gradient, of padding too."""
    monkeypatch.setattr(two_calls, "BLOCK", block)
    settings = dict(KINDS[kind])
    plan = plan_of(segments, settings.pop("function", causal_mask_function))
    softcap, with_sinks = settings.pop("softcap", None), settings.pop("sinks", False)
    given = inputs(segments, **settings)
    heads = given[0].shape[1]
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_() if with_sinks else None
    leaves = [*given, *([sinks] if with_sinks else [])]
    out = attend(*given, plan, 0.6, softcap, sinks)
    expected = dense(*given, plan, 0.6, softcap, sinks)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(out, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_gradcheck():
    segments = place([(2, [2, 1]), (1, [1])], multiple=4)
    sinks = torch.tensor([0.3, -0.5], dtype=torch.float64).requires_grad_()
    given = inputs(segments, size=2, values=2)
    more = plan_of(segments), 0.7, two_calls._OnCPU
    assert torch.autograd.gradcheck(lambda *t: TwoCalls.apply(*t, *more), (*given, sinks))
    assert torch.autograd.gradcheck(lambda *t: TwoCalls.apply(*t, None, *more), tuple(given))


def test_the_rule_for_the_backward_is_needed():
    """A call's backward with its own output and log-sum-exp, instead of the merged ones, gives another gradient."""
    plan = plan_of(SEGMENTS)
    q, k, v = inputs(SEGMENTS)
    out, lse = two_calls._OnCPU.forward(q.detach(), k.detach(), v.detach(), plan, 0.6)
    upstream = torch.ones_like(out)
    right = two_calls._OnCPU.backward(upstream, q, k, v, out, lse, plan, 0.6)
    alone = SegmentPlan(place([(5, []), (3, []), (1, []), (4, []), (2, []), (1, []), (2, [])], 10), plan.function, True)
    own, log = two_calls._OnCPU.forward(q.detach(), k.detach(), v.detach(), alone, 0.6)
    wrong = two_calls._OnCPU.backward(upstream, q, k, v, own, log, plan, 0.6)
    assert (right[1] - wrong[1]).abs().max() > 1e-2
    expected = torch.autograd.grad(dense(q, k, v, plan, 0.6), (q, k, v), upstream)
    for one, other in zip(right, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_which_masks_are_causal():
    """By identity whatever the length; by pairs where they are few; a window only where it is never felt."""
    cpu = torch.device("cpu")
    assert is_causal(causal_mask_function, causal_mask_function, 10**6, cpu)
    window = sliding_window_causal_mask_function(20)
    assert [is_causal(window, causal_mask_function, length, cpu) for length in (20, 21)] == [True, False]
    assert not is_causal(window, causal_mask_function, 10**6, cpu)


def test_which_masks_are_windows():
    """transformers' own functions, by identity; what looks like one is none."""
    window = sliding_window_causal_mask_function(7)
    assert window_of(window) == 7
    others = (
        causal_mask_function,
        and_masks(causal_mask_function, sliding_window_overlay(7)),
        and_masks(sliding_window_overlay(7), causal_mask_function, causal_mask_function),
        and_masks(causal_mask_function, causal_mask_function),
        chunked_causal_mask_function(7, torch.zeros(1)),
        and_masks(window, causal_mask_function),
        lambda row, head, query, key: window(row, head, query, key),
        print,
    )
    assert [window_of(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    """Two outputs that are rounded, and their sum: at most twice the error of a dense softmax, which rounds once."""
    segments = place([(40, [20, 30, 10]), (10, [5])])
    plan = plan_of(segments)
    exact = inputs(segments, size=16, values=16, seed=3)
    given = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in given]
    upstream = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def all_of(function, tensors):
        out = function(*tensors, plan, 0.25)
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    truth, ours, theirs = all_of(dense, exact), all_of(attend, given), all_of(dense, given)
    for right, one, other in zip(truth, ours, theirs, strict=True):
        mine, eager = (float((t.double() - right).norm()) for t in (one, other))
        assert mine <= 2 * eager


@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(3)])
def test_under_autocast(function):
    """Queries and keys that rotation has left in float32, beside values in 16 bits: cast as sdpa casts them."""
    plan = plan_of(SEGMENTS, function)
    q, k, v = inputs(SEGMENTS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v.bfloat16(), plan, 0.6)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    halves = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    expected = attend(*halves, plan, 0.6)
    assert torch.equal(out, expected)
    for one, other in zip(grads, torch.autograd.grad(expected.sum(), halves), strict=True):
        assert torch.equal(one, other.float())


def hidden(queries, keys, causal, window):
    """Which keys a query does not see: the last of both are the same token, a window goes w - 1 to the left."""
    apart = torch.arange(keys)[None] - torch.arange(queries)[:, None] - (keys - queries)
    blind = apart > 0 if causal or window is not None else torch.zeros_like(apart, dtype=torch.bool)
    return blind if window is None else blind | (apart < -(window - 1))


def emulated(q, k, v, ends, most, causal, scale, window=None):
    """What the operator for texts of different lengths is documented to return: (out, lse [heads, tokens])."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    repeat = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert b - a <= most[0]
        assert d - c <= most[1]
        part = (t[c:d].repeat_interleave(repeat, 1) for t in (k, v))
        keys, values = part
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        scores = scores.masked_fill(hidden(int(b - a), int(d - c), causal, window), -math.inf)
        lse[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse


def emulated_grads(grad, q, k, v, out, lse, ends, most, causal, scale, window=None):
    """Flash attention's backward: p = exp(s - lse), ds = p (dp - sum(do o))."""
    repeat = q.shape[1] // k.shape[1]
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        keys, values = (t[c:d].repeat_interleave(repeat, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        scores = scores.masked_fill(hidden(int(b - a), int(d - c), causal, window), -math.inf)
        shares = (scores - lse[:, a:b, None]).exp()
        slope = torch.einsum("qhd,khd->hqk", grad[a:b], values) - (grad[a:b] * out[a:b]).sum(-1).t()[..., None]
        slope = shares * slope * scale
        grads[0][a:b] = torch.einsum("hqk,khd->qhd", slope, keys)
        for total, part in (
            (grads[1], torch.einsum("hqk,qhd->khd", slope, q[a:b])),
            (grads[2], torch.einsum("hqk,qhd->khd", shares, grad[a:b])),
        ):
            total[c:d] = part.unflatten(1, (-1, repeat)).sum(2)
    return tuple(grads)


@pytest.mark.parametrize("segments", [SEGMENTS, TWO_ROWS, place([(4, [])])], ids=["one row", "two rows", "a prompt"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 40])
def test_host_code_of_gpus(segments, groups, window, monkeypatch):
    """Lengths, places and layouts that the GPU's operator is called with, the operator itself written out."""
    monkeypatch.setattr(OfTorch, "call", staticmethod(emulated))
    monkeypatch.setattr(OfTorch, "grads", staticmethod(emulated_grads))
    monkeypatch.setattr(two_calls, "choose", lambda *given: OfTorch())
    monkeypatch.setattr(two_calls, "_blockwise", None)
    plan = plan_of(segments, causal_mask_function if window is None else sliding_window_causal_mask_function(window))
    assert plan.window == window
    assert plan.causal == (window is None or window >= segments.longest)
    given = inputs(segments, heads=4, groups=groups)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    out = attend(*given, plan, 0.6, sinks=sinks)
    expected = dense(*given, plan, 0.6, sinks=sinks)
    there = (segments.tokens().group_ids >= 0)[:, None, :, None]
    torch.testing.assert_close(torch.where(there, out, 0), expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * there
    for one, other in zip(
        torch.autograd.grad(out, (*given, sinks), upstream),
        torch.autograd.grad(expected, (*given, sinks), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(3)])
def test_the_operators_of_gpus_take_these_arguments(function):
    """Shapes and dtypes through torch's own description of its flash attention, on tensors without values."""
    plan = plan_of(SEGMENTS, function)
    q = torch.empty(1, 4, SEGMENTS.width, 64, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(1, 2, SEGMENTS.width, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out, lse = OfTorch().forward(q, k, v, plan, 0.125)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    grads = OfTorch().backward(torch.empty_like(q), q, k, v, out, lse, plan, 0.125)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
