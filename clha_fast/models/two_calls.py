"""Attention in rows of several prompts and candidates without a mask of [tokens, tokens].

Where a model's mask is causal and no more, two calls of a fused operator: every prompt and every candidate causal on
itself, and all candidates of a prompt, as one block, on the prompt. With outputs o and log-sum-exps l of the two,

    l = log(exp(l1) + exp(l2) [+ exp(sink)]),    o = exp(l1 - l) o1 + exp(l2 - l) o2.

The softmax of the whole is exp(s - l) for the scores s of either call, so that the gradients of a call are what its
backward gives with the *merged* output and log-sum-exp. The operators' own autograd leaves out the gradient of a
log-sum-exp and would be wrong here; their backward operators are called instead.

Where an operator has windows, a sliding one is one call: each text on the end of its prompt that the window leaves, and
on itself. Anything else (chunks, softcaps, windows on a CPU) runs a block of queries at a time on the keys of its
prompt and candidate that the model's own mask function lets it see, and recomputes it for the gradients: exact, and no
larger than [block, text].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from clha_fast.batching.segments import Span
from clha_fast.layout import accumulate
from clha_fast.models.segment_plan import SegmentPlan

BLOCK = 1024  # queries at a time where a fused operator has no form for the mask


class _OnCPU:
    """torch's fused attention on CPUs; tensors [1, heads, tokens, size], a text a call."""

    windows = False

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


class _Places(NamedTuple):
    """The two calls of all rows in one, as cumulative lengths, and where their tokens are among [rows * tokens]."""

    own: Tensor
    longest: int
    queries: Tensor
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _places(plan: SegmentPlan, device: torch.device) -> _Places:
    """Of one device, made once; padding is a text of its own, which nobody reads."""
    if device in plan.places:
        return plan.places[device]
    width, own, queries, keys = plan.segments.width, [], [], []
    for row, calls in enumerate(plan.rows):
        lengths = [length for _, length in calls.own]
        rest = width - sum(lengths)
        own += [*lengths, rest] if rest else lengths
        queries += [(row * width + start, length) for (start, length), _ in calls.blocks]
        keys += [(row * width + start, length) for _, (start, length) in calls.blocks]

    def index(spans: list[Span]) -> Tensor:
        parts = [torch.arange(start, start + length) for start, length in spans]
        return torch.cat(parts or [torch.arange(0)]).to(device)

    counts = [[length for _, length in spans] for spans in (queries, keys)]
    found = _Places(
        _ends(own, device),
        max(own),
        index(queries),
        index(keys),
        _ends(counts[0], device),
        _ends(counts[1], device),
        max(counts[0], default=0),
        max(counts[1], default=0),
    )
    plan.places[device] = found
    return found


class _Gathered(NamedTuple):
    """All texts of all rows in one call, each on the keys that a window leaves it."""

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


def _gathered(plan: SegmentPlan, device: torch.device) -> _Gathered:
    """Of one device, made once: a candidate's keys are the end of its prompt and its own, padding is a text."""
    if device in plan.places:
        return plan.places[device]
    assert plan.window is not None
    width = plan.segments.width
    texts: list[list[tuple[Span, Span]]] = [[] for _ in plan.rows]  # of the prompt, and their own
    for row, prompt, candidates in plan.segments.groups:
        tail = min(prompt[1], plan.window - 1)
        texts[row].append(((0, 0), prompt))
        texts[row] += [((sum(prompt) - tail, tail), own) for own in candidates]
    for found in texts:
        used = sum(length for _, (_, length) in found)
        found += [((0, 0), (used, width - used))] if used < width else []
    keys = [
        torch.arange(row * width + start, row * width + start + length)
        for row, found in enumerate(texts)
        for pair in found
        for start, length in pair
    ]
    queries = [own[1] for found in texts for _, own in found]
    counts = [tail[1] + own[1] for found in texts for tail, own in found]
    made = _Gathered(
        torch.cat(keys).to(device), _ends(queries, device), _ends(counts, device), max(queries), max(counts)
    )
    plan.places[device] = made
    return made


class _OnCUDA:
    """torch's flash attention over texts of different lengths, two launches or one; tensors [tokens, heads, size]."""

    windows = True

    @staticmethod
    def _call(
        q: Tensor, k: Tensor, v: Tensor, ends: Any, most: Any, causal: bool, scale: float, window: int | None = None
    ) -> tuple[Tensor, ...]:
        call, sides = torch.ops.aten._flash_attention_forward, _sides(window)
        found = call(q, k, v, *ends, *most, 0.0, causal, False, scale=scale, **sides)
        return found[0], found[1]

    @staticmethod
    def _grads(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Any, most: Any, causal: bool,
        scale: float, window: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        call = torch.ops.aten._flash_attention_backward
        found: tuple[Tensor, ...] = call(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            *ends,
            *most,
            0.0,
            causal,
            state,
            unused,
            scale=scale,
            **_sides(window),
        )
        return found

    @classmethod
    def forward(cls, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scale: float) -> tuple[Tensor, Tensor]:
        shape = q.shape
        q, k, v = (_flat(t) for t in (q, k, v))
        if not plan.causal:
            few = _gathered(plan, q.device)
            ends, most = (few.query_ends, few.key_ends), (few.most_queries, few.most_keys)
            out, lse = cls._call(q, k[few.keys], v[few.keys], ends, most, False, scale, plan.window)
            return _rows(out, shape), lse.unflatten(1, (shape[0], shape[2])).transpose(0, 1)
        at = _places(plan, q.device)
        ends, most = (at.own, at.own), (at.longest, at.longest)
        out, lse = cls._call(q, k, v, ends, most, True, scale)
        if len(at.queries):
            ends, most = (at.query_ends, at.key_ends), (at.most_queries, at.most_keys)
            other, log = cls._call(q[at.queries], k[at.keys], v[at.keys], ends, most, False, scale)
            merged, total = merge(out[at.queries], lse[:, at.queries].t(), other, log.t())
            out[at.queries], lse[:, at.queries] = merged, total.t()
        return _rows(out, shape), lse.unflatten(1, (shape[0], shape[2])).transpose(0, 1)

    @classmethod
    def backward(
        cls, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: SegmentPlan, scale: float
    ) -> tuple[Tensor, ...]:
        shapes = q.shape, k.shape, v.shape
        grad, q, k, v, out = (_flat(t) for t in (grad, q, k, v, out))
        log = lse.transpose(0, 1).flatten(1)
        if not plan.causal:
            few = _gathered(plan, q.device)
            ends, most = (few.query_ends, few.key_ends), (few.most_queries, few.most_keys)
            given = grad, q, k[few.keys], v[few.keys], out, log, ends, most, False, scale, plan.window
            found, *parts = cls._grads(*given)
            whole = torch.zeros_like(k), torch.zeros_like(v)
            for total, part in zip(whole, parts, strict=True):
                accumulate(total, few.keys, part)  # a prompt's end is there once for each of its candidates
            return tuple(_rows(t, shape) for t, shape in zip((found, *whole), shapes, strict=True))
        at = _places(plan, q.device)
        ends, most = (at.own, at.own), (at.longest, at.longest)
        grads = cls._grads(grad, q, k, v, out, log, ends, most, True, scale)
        if len(at.queries):
            here, there = at.queries, at.keys
            ends, most = (at.query_ends, at.key_ends), (at.most_queries, at.most_keys)
            more = cls._grads(
                grad[here], q[here], k[there], v[there], out[here], log[:, here], ends, most, False, scale
            )
            for total, part, index in zip(grads, more, (here, there, there), strict=True):
                total.index_add_(0, index, part)
        return tuple(_rows(t, shape) for t, shape in zip(grads, shapes, strict=True))


def _sides(window: int | None) -> dict[str, int]:
    """How far a query sees to either side, as `torch.nn.attention.varlen` gives it."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _flat(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(0, 1).contiguous()


def _rows(t: Tensor, shape: torch.Size) -> Tensor:
    return t.unflatten(0, (shape[0], shape[2])).transpose(1, 2)


def _part(row: int, span: Span) -> Any:
    return slice(row, row + 1), slice(None), slice(span[0], span[0] + span[1])


def merge(out: Tensor, lse: Tensor, other: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [..., size] and log-sum-exps [...] of attention on two sets of keys, as on both at once."""
    total = torch.logaddexp(lse, log)
    mine, theirs = (lse - total).exp()[..., None], (log - total).exp()[..., None]
    return (out * mine + other * theirs).to(out.dtype), total


class TwoCalls(torch.autograd.Function):
    """softmax(scale q k^T) v of every token on its prompt and its own candidate.

    q, k, v: [rows, heads, tokens, size], equal in heads and size. sinks: [heads] or None, a logit a head without a
    value. Tokens in no group give 0 and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: SegmentPlan, scale: float
    ) -> Tensor:
        operator = _operator(q)
        out, lse = operator.forward(q, k, v, plan, scale)
        if sinks is not None:
            one = sinks.to(lse.dtype).view(1, -1, 1)
            total = torch.logaddexp(lse, one)
            out, lse = (out * (lse - total).exp()[..., None]).to(out.dtype), total
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        grads = _operator(q).backward(grad.contiguous(), q, k, v, out, lse, ctx.plan, ctx.scale)
        of_sinks = None
        if sinks is not None:
            # d o / d sink = -p o, with p the sink's share of the softmax.
            share = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp() * lse.isfinite()
            of_sinks = -(share * (grad * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return (*grads, of_sinks, None, None)


def _operator(q: Tensor) -> Any:
    return _OnCPU if q.device.type == "cpu" else _OnCUDA


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether a fused operator has a form for these: any size on a CPU; 16 bits and sizes up to 256 elsewhere."""
    small = max(query.shape[-1], value.shape[-1]) <= 256
    return query.device.type == "cpu" or (small and query.dtype in (torch.float16, torch.bfloat16))


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
    has_form = plan.causal or (plan.window is not None and _operator(query).windows)
    fused = has_form and softcap is None and takes(query, value)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and (not fused or query.device.type == "cpu"):
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if not fused:
        return _blockwise(query, key, value, plan, scale, softcap, sinks)
    size = value.shape[-1]
    # A narrower side is filled up with zeros, which change no score and no output; GPUs take multiples of 8.
    wide = max(query.shape[-1], size)
    wide = wide if query.device.type == "cpu" else -(-wide // 8) * 8
    query, key, value = (F.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value))
    out: Tensor = TwoCalls.apply(query, key, value, sinks, plan, scale)
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
