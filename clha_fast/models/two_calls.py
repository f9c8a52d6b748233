"""Attention in rows of several prompts and candidates without a mask of [tokens, tokens].

Where a model's mask is causal and no more, two calls of a fused operator: every prompt and every candidate causal on
itself, and all candidates of a prompt, as one block, on the prompt. With outputs o and log-sum-exps l of the two,

    l = log(exp(l1) + exp(l2) [+ exp(sink)]),    o = exp(l1 - l) o1 + exp(l2 - l) o2.

The softmax of the whole is exp(s - l) for the scores s of either call, so that the gradients of a call are what its
backward gives with the *merged* output and log-sum-exp. The operators' own autograd leaves out the gradient of a
log-sum-exp and would be wrong here; their backward operators are called instead.

On GPUs (`varlen`) a sliding window is one call: each text on the end of its prompt that the window leaves, and on
itself. Anything else (chunks, windows on a CPU, softcaps without flash-attn) runs a block of queries at a time on the
keys of its prompt and candidate that the model's own mask function lets it see, and recomputes it for the gradients:
exact, and no larger than [block, text].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from clha_fast.batching.segments import Span
from clha_fast.models import varlen
from clha_fast.models.segment_plan import SegmentPlan
from clha_fast.models.varlen import merge

BLOCK = 1024  # queries at a time where a fused operator has no form for the mask


class _OnCPU:
    """torch's fused attention on CPUs; tensors [1, heads, tokens, size], a text a call."""

    grouped, multiple = False, 1

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scale: float) -> tuple[Tensor, Tensor]:
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for row, calls in enumerate(plan.rows):
            for span in calls.own:
                here = _part(row, span)
                out[here], lse[here] = call(q[here], k[here], v[here], 0.0, True, scale=scale)
            for queries, keys in calls.blocks:
                here, there = _part(row, queries), _part(row, keys)
                other, log = call(q[here], k[there], v[there], 0.0, False, scale=scale)
                out[here], lse[here] = merge(out[here], lse[here], other, log)
        return out, lse

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: SegmentPlan, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

        def add(here: Any, there: Any, causal: bool) -> None:
            log = lse[here].contiguous()
            found = call(grad[here], q[here], k[there], v[there], out[here], log, 0.0, causal, scale=scale)
            for total, part, place in zip(grads, found, (here, there, there), strict=True):
                total[place] += part

        for row, calls in enumerate(plan.rows):
            for span in calls.own:
                add(_part(row, span), _part(row, span), True)
            for queries, keys in calls.blocks:
                add(_part(row, queries), _part(row, keys), False)
        return grads


def _part(row: int, span: Span) -> Any:
    return slice(row, row + 1), slice(None), slice(span[0], span[0] + span[1])


class TwoCalls(torch.autograd.Function):
    """softmax(scale q k^T) v of every token on its prompt and its own candidate.

    q, k, v: [rows, heads, tokens, size], equal in heads and size. sinks: [heads] or None, a logit a head without a
    value. operator: what `choose` gives. Tokens in no group give 0 and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: SegmentPlan,
        scale: float,
        operator: type[_OnCPU] | varlen.Varlen,
    ) -> Tensor:
        out, lse = operator.forward(q, k, v, plan, scale)
        if sinks is not None:
            one = sinks.to(lse.dtype).view(1, -1, 1)
            total = torch.logaddexp(lse, one)
            out, lse = (out * (lse - total).exp()[..., None]).to(out.dtype), total
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan, ctx.scale, ctx.operator = plan, scale, operator
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        grads = ctx.operator.backward(grad.contiguous(), q, k, v, out, lse, ctx.plan, ctx.scale)
        of_sinks = None
        if sinks is not None:
            # d o / d sink = -p o, with p the sink's share of the softmax.
            share = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp() * lse.isfinite()
            of_sinks = -(share * (grad * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return (*grads, of_sinks, None, None, None)


def choose(
    query: Tensor, value: Tensor, plan: SegmentPlan, softcap: float | None
) -> type[_OnCPU] | varlen.Varlen | None:
    """The fused operator that has a form for these; None leaves them to blocks."""
    if query.device.type == "cpu":
        return _OnCPU if plan.causal and softcap is None else None
    if not (plan.causal or plan.window is not None) or not varlen.takes(query, value):
        return None
    return varlen.choose(softcap)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[rows, heads, tokens, value size]: what a masked softmax over whole rows gives, in memory of single texts.

    Args:
        query: [rows, heads, tokens, size]; key, value: of as many heads or a divisor, value of any size.
        softcap: c of c tanh(s / c) on the scores. sinks: [heads], a logit without a value.
    """
    if torch.is_autocast_enabled(query.device.type):  # as the function does that these operators stand behind
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    operator = choose(query, value, plan, softcap)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and (operator is None or not operator.grouped):
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if operator is None:
        return _blockwise(query, key, value, plan, scale, softcap, sinks)
    size = value.shape[-1]
    # A narrower side is filled up with zeros, which change no score and no output.
    wide = -(-max(query.shape[-1], size) // operator.multiple) * operator.multiple
    query, key, value = (F.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value))
    out: Tensor = TwoCalls.apply(query, key, value, sinks, plan, scale, operator)
    return out[..., :size]


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    whole = q.new_zeros(*q.shape[:-1], v.shape[-1])
    pieces, places = [], []
    for row, queries, keys, visible in _pieces(plan, q.device):
        given = (q[_part(row, queries)], *(_gather(t, row, keys) for t in (k, v)), visible, scale, softcap, sinks)
        pieces.append(checkpoint(_piece, *given, use_reentrant=False, preserve_rng_state=False))
        places.append((row, queries))
    if len(plan.rows) == 1 and sum(length for _, (_, length) in places) == q.shape[2]:
        return torch.cat(pieces, 2)
    for (row, span), piece in zip(places, pieces, strict=True):
        whole[_part(row, span)] = piece
    return whole


def _gather(t: Tensor, row: int, spans: list[Span]) -> Tensor:
    parts = [t[_part(row, span)] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _pieces(plan: SegmentPlan, device: torch.device) -> Iterator[tuple[int, Span, list[Span], Tensor]]:
    """(row, queries, keys, visible [queries, keys]): the keys of a prompt and a candidate that any of them sees."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    for row, prompt, candidates in plan.segments.groups:
        for number, (start, length) in enumerate((prompt, *candidates)):
            behind = prompt[1] if number else 0
            for first in range(0, length, BLOCK):
                count = min(BLOCK, length - first)
                place = behind + first
                queries = torch.arange(place, place + count, device=device)[:, None]
                if (place, count) not in plan.begins:  # a GPU is waited for once, not once a layer
                    keys = torch.arange(place + count, device=device)
                    seen = torch.as_tensor(plan.function(zero, zero, queries, keys), device=device)
                    # A window's or a chunk's first key; what stands before it is nobody's here.
                    plan.begins[place, count] = int(seen.expand(count, len(keys)).any(0).int().argmax())
                begin = plan.begins[place, count]
                keys = torch.arange(begin, place + count, device=device)
                visible = torch.as_tensor(plan.function(zero, zero, queries, keys), device=device)
                inside = max(begin - behind, 0)
                spans = [(start + inside, first + count - inside)]
                if begin < behind:
                    spans.insert(0, (prompt[0] + begin, behind - begin))
                yield row, (start + first, count), spans, visible.expand(count, len(keys))


def _piece(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    shares = scores.softmax(-1)[..., : k.shape[2]]
    return shares.to(v.dtype) @ v
