"""flash-attn's operators over texts of different lengths, written out on CPUs; no test.

Names, arguments, defaults and what is changed in place are those of `flash_attn.flash_attn_interface` 2.7 and 2.8, and
so are the checks of what they are given. They compute in float64 and round what they return.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clha_fast.models import varlen

_TEXTS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
_TEXTS += "float softmax_scale, bool causal"
FORWARD = (
    f"({{q}}, {{k}}, {{v}}, {_TEXTS}, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, "
    "Tensor? seqused_k=None{more}) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, Tensor(b!)? dk, "
    f"Tensor(c!)? dv, {_TEXTS}, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None{more}) -> Tensor"
)
_numbers = itertools.count()


def _check(q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], most: tuple[int, int], exact: bool) -> None:
    dtypes = (torch.float64,) if exact else (torch.float16, torch.bfloat16)
    assert q.dtype in dtypes
    assert q.dtype == k.dtype == v.dtype
    heads, size = q.shape[1:]
    assert size % 8 == 0
    assert size <= 256
    assert k.shape == v.shape
    assert k.shape[2] == size
    assert heads % k.shape[1] == 0
    assert len(ends[0]) == len(ends[1]) > 1
    for cumulative, total, bound in zip(ends, (len(q), len(k)), most, strict=True):
        assert cumulative.dtype == torch.int32
        assert cumulative.is_contiguous()
        assert int(cumulative[0]) == 0
        assert int(cumulative[-1]) == total
        lengths = cumulative.diff()
        assert int(lengths.min()) >= 1
        assert int(lengths.max()) <= bound
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """([heads, queries, keys] float64, its slope over the plain scores): the last query stands at the last key."""
    plain = torch.einsum("qhd,khd->hqk", q, k) * scale
    found, slope = plain, torch.ones_like(plain)
    if softcap > 0:
        found = softcap * torch.tanh(plain / softcap)
        slope = 1 - (found / softcap) ** 2
    apart = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - (len(k) - len(q))
    right = 0 if causal else right
    blind = torch.zeros_like(apart, dtype=torch.bool)
    blind |= (apart > right) if right >= 0 else blind
    blind |= (apart < -left) if left >= 0 else blind
    return found.masked_fill(blind, -math.inf), slope


def _texts(ends: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> list[tuple[slice, slice, int]]:
    bounds = [list(itertools.pairwise(part.tolist())) for part in ends]
    return [(slice(*a), slice(*b), q.shape[1] // k.shape[1]) for a, b in zip(*bounds, strict=True)]


def stand_in(exact: bool = False, mutates: bool = True, more: str = "") -> ModuleType:
    """The module `flash_attn.flash_attn_interface`; each call of its operators is noted in `calls`.

    Args:
        exact: float64 in and out, instead of 16 bits. mutates: whether the forward says that it changes its inputs, as
            some releases do. more: further arguments at the end.
    """
    module: Any = ModuleType("flash_attn.flash_attn_interface")
    module.calls = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        return_softmax: bool = False, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        ends = cu_seqlens_q, cu_seqlens_k
        _check(q, k, v, ends, (max_seqlen_q, max_seqlen_k), exact)
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        module.calls.append(("forward", softcap, window_size_left))
        out, lse = torch.full_like(q, math.nan), q.new_full(q.shape[1::-1], math.nan, dtype=torch.float64)
        for here, there, repeat in _texts(ends, q, k):
            own, keys, values = q[here].double(), k[there].double(), v[there].double()
            keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
            scores, _ = _scores(own, keys, softmax_scale, causal, window_size_left, window_size_right, softcap)
            lse[:, here] = scores.logsumexp(-1)
            out[here] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
        return out, lse if exact else lse.float(), q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, *rest: Any,
    ) -> Tensor:  # fmt: skip
        ends = cu_seqlens_q, cu_seqlens_k
        _check(q, k, v, ends, (max_seqlen_q, max_seqlen_k), exact)
        assert (dropout_p, alibi_slopes, deterministic) == (0.0, None, False)
        assert dout.dtype == out.dtype == q.dtype
        assert dout.shape == out.shape == q.shape
        assert dout.stride(-1) == out.stride(-1) == 1
        assert softmax_lse.dtype == (torch.float64 if exact else torch.float32)
        assert softmax_lse.shape == q.shape[1::-1]
        assert softmax_lse.is_contiguous()
        module.calls.append(("backward", softcap, window_size_left))
        totals = [torch.zeros(t.shape, dtype=torch.float64) for t in (q, k, v)]
        for here, there, repeat in _texts(ends, q, k):
            own, given, made = (t[here].double() for t in (q, dout, out))
            keys, values = (t[there].double().repeat_interleave(repeat, 1) for t in (k, v))
            scores, slope = _scores(own, keys, softmax_scale, causal, window_size_left, window_size_right, softcap)
            shares = (scores - softmax_lse[:, here, None].double()).exp()
            steps = torch.einsum("qhd,khd->hqk", given, values) - (given * made).sum(-1).t()[..., None]
            steps = shares * steps * slope * softmax_scale
            totals[0][here] = torch.einsum("hqk,khd->qhd", steps, keys)
            totals[1][there] = torch.einsum("hqk,qhd->khd", steps, own).unflatten(1, (-1, repeat)).sum(2)
            totals[2][there] = torch.einsum("hqk,qhd->khd", shares, given).unflatten(1, (-1, repeat)).sum(2)
        for gradient, total, like in zip((dq, dk, dv), totals, (q, k, v), strict=True):
            assert gradient.dtype == like.dtype
            assert gradient.shape == like.shape
            assert gradient.stride(-1) == 1
            gradient.copy_(total)
        return torch.zeros(q.shape[1], len(q) + 128 * (len(cu_seqlens_q) - 1))

    pairs = zip("abc", "qkv", strict=True)
    inputs = [f"Tensor({letter}!) {name}" if mutates else f"Tensor {name}" for letter, name in pairs]
    schemas = {
        "forward": FORWARD.format(**dict(zip("qkv", inputs, strict=True)), more=more),
        "backward": BACKWARD.format(more=more),
    }
    changed = {"forward": ("q", "k", "v") if mutates else (), "backward": ("dq", "dk", "dv")}
    space = f"flash_attn_stand_in_{next(_numbers)}"
    for direction, function in (("forward", forward), ("backward", backward)):
        name = f"_flash_attn_varlen_{direction}"
        made = _operator(f"{space}::{name}", function, changed[direction], schemas[direction])
        setattr(module, name, made)
        setattr(module, f"_wrapped{name}", getattr(getattr(torch.ops, space), name))
    return module


def _operator(name: str, function: Callable[..., Any], changed: tuple[str, ...], schema: str) -> Any:
    return torch.library.custom_op(name, function, mutates_args=changed, device_types="cpu", schema=schema)


def install(monkeypatch: Any, module: ModuleType | None) -> None:
    """Puts it where `import` finds it; None: there is no such package."""
    package = ModuleType("flash_attn")
    for found in (package, module):
        if found is not None:
            found.__spec__ = importlib.machinery.ModuleSpec(found.__name__, None)
    monkeypatch.setitem(sys.modules, "flash_attn", None if module is None else package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    varlen.flash_attn.cache_clear()
