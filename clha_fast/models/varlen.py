"""Fused attention over texts of different lengths on GPUs: torch's operator, or the package flash-attn's.

Both are FlashAttention 2 with one interface: outputs [tokens, heads, size], log-sum-exps [heads, tokens], windows
counted from the end of the keys, and a backward that takes output and log-sum-exp, which may be those of more keys than
the call's. torch's has no softcap. The package's autograd is not used: like torch's, it leaves out the gradient of a
log-sum-exp.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clha_fast.batching.segments import Span
from clha_fast.layout import accumulate
from clha_fast.models.segment_plan import SegmentPlan

logger = logging.getLogger("clha_fast")

_Ends = tuple[Tensor, Tensor]  # of queries and of keys, cumulative
_Most = tuple[int, int]
_TEXTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal")
_MASK = ("window_size_left", "window_size_right", "softcap", "alibi_slopes")
# What flash-attn's two operators are called with, since 2.7.
_FORWARD = ("q", "k", "v", *_TEXTS, *_MASK, "return_softmax")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_TEXTS, *_MASK, "deterministic")


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


def _most(lengths: list[int]) -> int:
    # Both operators have a way of their own for single queries, made for decoding; 2 is an upper bound as well.
    return max([2, *lengths])


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
        _most(own),
        index(queries),
        index(keys),
        _ends(counts[0], device),
        _ends(counts[1], device),
        _most(counts[0]),
        _most(counts[1]),
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
        torch.cat(keys).to(device), _ends(queries, device), _ends(counts, device), _most(queries), _most(counts)
    )
    plan.places[device] = made
    return made


class Varlen:
    """Two launches over all texts of all rows, or one where there is a window; a subclass has the operator.

    `call(q, k, v, ends, most, causal, scale, window)` returns (out, log-sum-exps [heads, tokens]),
    `grads(grad, q, k, v, out, lse, ...)` the gradients; tensors [tokens, heads, size], heads of keys and values a
    divisor of the queries'.
    """

    grouped = True  # fewer heads of keys than of queries
    multiple = 8  # of sizes

    call: Callable[..., tuple[Tensor, ...]]
    grads: Callable[..., tuple[Tensor, ...]]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scale: float) -> tuple[Tensor, Tensor]:
        """([rows, heads, tokens, size], log-sum-exps [rows, heads, tokens]) of the same; k and v of fewer heads."""
        shape = q.shape
        q, k, v = (_flat(t) for t in (q, k, v))
        if not plan.causal:
            few = _gathered(plan, q.device)
            ends, most = (few.query_ends, few.key_ends), (few.most_queries, few.most_keys)
            out, lse = self.call(q, k[few.keys], v[few.keys], ends, most, False, scale, plan.window)
            return _rows(out, shape), lse.unflatten(1, (shape[0], shape[2])).transpose(0, 1)
        at = _places(plan, q.device)
        ends, most = (at.own, at.own), (at.longest, at.longest)
        out, lse = self.call(q, k, v, ends, most, True, scale)
        if len(at.queries):
            ends, most = (at.query_ends, at.key_ends), (at.most_queries, at.most_keys)
            other, log = self.call(q[at.queries], k[at.keys], v[at.keys], ends, most, False, scale)
            merged, total = merge(out[at.queries], lse[:, at.queries].t(), other, log.t())
            out[at.queries], lse[:, at.queries] = merged, total.t()
        return _rows(out, shape), lse.unflatten(1, (shape[0], shape[2])).transpose(0, 1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: SegmentPlan, scale: float
    ) -> tuple[Tensor, ...]:
        """Of q, k and v, with the output and the log-sum-exps of all their keys."""
        shapes = q.shape, k.shape, v.shape
        grad, q, k, v, out = (_flat(t) for t in (grad, q, k, v, out))
        log = lse.transpose(0, 1).flatten(1)
        if not plan.causal:
            few = _gathered(plan, q.device)
            ends, most = (few.query_ends, few.key_ends), (few.most_queries, few.most_keys)
            given = grad, q, k[few.keys], v[few.keys], out, log, ends, most, False, scale, plan.window
            found, *parts = self.grads(*given)
            whole = torch.zeros_like(k), torch.zeros_like(v)
            for total, part in zip(whole, parts, strict=True):
                accumulate(total, few.keys, part)  # a prompt's end is there once for each of its candidates
            return tuple(_rows(t, shape) for t, shape in zip((found, *whole), shapes, strict=True))
        at = _places(plan, q.device)
        ends, most = (at.own, at.own), (at.longest, at.longest)
        grads = self.grads(grad, q, k, v, out, log, ends, most, True, scale)
        if len(at.queries):
            here, there = at.queries, at.keys
            ends, most = (at.query_ends, at.key_ends), (at.most_queries, at.most_keys)
            more = self.grads(
                grad[here], q[here], k[there], v[there], out[here], log[:, here], ends, most, False, scale
            )
            for total, part, index in zip(grads, more, (here, there, there), strict=True):
                total.index_add_(0, index, part)
        return tuple(_rows(t, shape) for t, shape in zip(grads, shapes, strict=True))


class OfTorch(Varlen):
    """The operator behind `torch.nn.attention.varlen`."""

    @staticmethod
    def call(
        q: Tensor, k: Tensor, v: Tensor, ends: _Ends, most: _Most, causal: bool, scale: float, window: int | None = None
    ) -> tuple[Tensor, ...]:
        call, sides = torch.ops.aten._flash_attention_forward, _sides(window)
        found = call(q, k, v, *ends, *most, 0.0, causal, False, scale=scale, **sides)
        return found[0], found[1]

    @staticmethod
    def grads(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: _Ends, most: _Most, causal: bool,
        scale: float, window: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        call, sides = torch.ops.aten._flash_attention_backward, _sides(window)
        given = grad, q, k, v, out, lse.contiguous()
        found: tuple[Tensor, ...] = call(*given, *ends, *most, 0.0, causal, state, unused, scale=scale, **sides)
        return found


class OfFlashAttn(Varlen):
    """flash-attn's operators; `softcap` 0 is none."""

    def __init__(self, interface: Any, softcap: float = 0.0) -> None:
        self._interface, self._softcap = interface, softcap

    def _settings(self, ends: _Ends, most: _Most, causal: bool, scale: float, window: int | None) -> dict[str, Any]:
        left, right = (-1, -1) if window is None else (window - 1, 0)
        values = (*ends, *most, 0.0, scale, causal, left, right, self._softcap, None)
        return dict(zip((*_TEXTS, *_MASK), values, strict=True))

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, ends: _Ends, most: _Most, causal: bool, scale: float,
        window: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        settings = self._settings(ends, most, causal, scale, window)
        out, lse, *_ = self._interface._wrapped_flash_attn_varlen_forward(q, k, v, **settings, return_softmax=False)
        return out, lse

    def grads(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: _Ends, most: _Most,
        causal: bool, scale: float, window: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)  # it fills them
        self._interface._wrapped_flash_attn_varlen_backward(
            *(grad, q, k, v, out, lse.contiguous(), *found),
            **self._settings(ends, most, causal, scale, window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found


_NAMES: dict[type, str] = {
    OfTorch: "torch's varlen operator",
    OfFlashAttn: "flash-attn's varlen operator",
    type(None): "blocks of queries",
}


def choose(softcap: float | None) -> Varlen | None:
    """What there is on a GPU: torch's where it was built with it and there is no softcap, else flash-attn's."""
    if softcap is None and torch_has():
        found: Varlen | None = OfTorch()
    else:
        interface = flash_attn()
        found = None if interface is None else OfFlashAttn(interface, float(softcap or 0))
    _say(_NAMES[type(found)], "" if softcap is None else " with softcaps")
    return found


@functools.cache
def _say(name: str, what: str) -> None:
    logger.info("rows of several responses: attention%s runs by %s", what, name)


def torch_has() -> bool:
    """Whether this torch was built with its flash attention."""
    return torch.backends.cuda.is_flash_attention_available()


@functools.cache
def flash_attn() -> Any:
    """flash-attn's module of operators; None without the package, or, which is said, where they are others."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        for direction, names in (("forward", _FORWARD), ("backward", _BACKWARD)):
            _check_arguments(getattr(interface, f"_wrapped_flash_attn_varlen_{direction}"), names)
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        logger.warning("flash-attn: installed, and not used for rows of several responses (%s)", said)
        return None
    return interface


def _check_arguments(operator: Any, names: tuple[str, ...]) -> None:
    """TypeError where it lacks one of `names`, or needs another one."""
    # Of a custom operator, whose signature says less.
    schema = getattr(getattr(operator, "default", None), "_schema", None)
    if schema is not None:
        needed = {argument.name: not argument.has_default_value() for argument in schema.arguments}
    else:
        parameters = inspect.signature(operator).parameters
        needed = {name: parameter.default is parameter.empty for name, parameter in parameters.items()}
    lacking = [name for name in names if name not in needed]
    more = [name for name, is_needed in needed.items() if is_needed and name not in names]
    if lacking or more:
        told = [f"without {', '.join(lacking)}"] * bool(lacking) + [f"that needs {', '.join(more)}"] * bool(more)
        raise TypeError(f"expected the operators of flash-attn 2.7 to 2.8, got one {' and '.join(told)}")


def text(device: torch.device) -> str:
    """Which operators attention without masks has on a device, for people."""
    if device.type == "cpu":
        return "torch's operator for CPUs, windows and softcaps by blocks"
    plain, capped = (_NAMES[type(choose(softcap))] for softcap in (None, 1.0))
    return f"{plain}, softcaps by {capped}"


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether these operators have a form for it: 16 bits, sizes up to 256."""
    return max(query.shape[-1], value.shape[-1]) <= 256 and query.dtype in (torch.float16, torch.bfloat16)


def merge(out: Tensor, lse: Tensor, other: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [..., size] and log-sum-exps [...] of attention on two sets of keys, as on both at once."""
    total = torch.logaddexp(lse, log)
    mine, theirs = (lse - total).exp()[..., None], (log - total).exp()[..., None]
    return (out * mine + other * theirs).to(out.dtype), total


def _sides(window: int | None) -> dict[str, int]:
    """How far a query sees to either side, as `torch.nn.attention.varlen` gives it."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _flat(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(0, 1).contiguous()


def _rows(t: Tensor, shape: torch.Size) -> Tensor:
    return t.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
