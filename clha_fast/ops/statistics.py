"""The custom operator of token log-probabilities with statistics of their distributions, and its one backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clha_fast import backends
from clha_fast.ops import checks
from clha_fast.ops.derivatives import backward_operator, differentiable, refuse_dropped_tangents
from clha_fast.ops.head import as_cast, fake_gradients, or_empty, score_dtype, token_logps_backward
from clha_fast.ops.schema import HEAD, NEEDS, schema
from clha_fast.options import HeadOptions
from clha_fast.types import STATISTICS, EntropySlopes, HeadInputs, Needs

_WIDTH = len(HeadInputs._fields)


def _token_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    """logps, lse float64, and each of `STATISTICS`: empty where it is not among `names`, separated by commas."""
    refuse_dropped_tangents("token_statistics")
    *tensors, head, backend, names = arguments
    inputs, settings = HeadInputs(*tensors), HeadOptions.decode(head)
    checks.input_values(inputs, settings.ignore_index)
    with as_cast(inputs.hidden):
        result = backends.load(backend).statistics_forward(inputs, settings, tuple(names.split(",")))
    empty = (result.logps.new_empty(0) for _ in STATISTICS)
    return result.logps, result.lse, *(result.values.get(name, e) for name, e in zip(STATISTICS, empty, strict=True))


_operator = torch.library.custom_op(
    "clha_fast::token_statistics",
    _token_statistics,
    mutates_args=(),
    schema=schema([*HEAD, "str head", "str backend", "str names"], 2 + len(STATISTICS)),
)


@_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, names = HeadInputs(*arguments[:_WIDTH]), arguments[-1].split(",")
    hidden, shape = inputs.hidden, inputs.targets.shape
    dtype = score_dtype(hidden)
    values = (hidden.new_empty(shape if name in names else (0,), dtype=dtype) for name in STATISTICS)
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=torch.float64), *values


def _statistics_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) by recomputing the logits; empty where not needed."""
    refuse_dropped_tangents("token_statistics_backward")
    grad_logps, grad_entropy, *tensors, lse, entropy, head, backend, need_hidden, need_weight, need_bias = arguments
    inputs, needs = HeadInputs(*tensors), Needs(need_hidden, need_weight, need_bias)
    slopes = EntropySlopes(grad_entropy, entropy)
    with as_cast(inputs.hidden):
        backend = backends.load(backend)
        gradients = backend.statistics_backward(grad_logps, slopes, inputs, lse, HeadOptions.decode(head), needs)
    return or_empty(gradients, inputs.hidden)


_SLOPES = ("Tensor grad_logps", "Tensor grad_entropy")
_backward_operator = torch.library.custom_op(
    "clha_fast::token_statistics_backward",
    _statistics_backward,
    mutates_args=(),
    schema=schema([*_SLOPES, *HEAD, "Tensor lse", "Tensor entropy", "str head", "str backend", *NEEDS], 3),
)


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = HeadInputs(*arguments[2 : 2 + _WIDTH])
    return fake_gradients(inputs, inputs.hidden.dtype, Needs(*arguments[-3:]))


_backward = backward_operator("token_statistics_backward", _backward_operator, "token_logps")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.head, ctx.backend, _ = inputs
    _, lse, entropy, *others = output
    ctx.save_for_backward(*tensors, lse, entropy)
    ctx.mark_non_differentiable(lse, *others)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, lse, entropy = ctx.saved_tensors
    grad_logps, grad_entropy = grads[0], grads[2]
    if (grad_logps is None and grad_entropy is None) or (not entropy.numel() and grad_logps is None):
        return (None,) * (_WIDTH + 3)
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    if grad_entropy is None or not entropy.numel():
        route = lse.new_empty(0, dtype=torch.float32)
        found = token_logps_backward(grad_logps, *saved, lse, route, ctx.head, ctx.backend, *needs)
    else:
        grad_logps = torch.zeros_like(grad_entropy) if grad_logps is None else grad_logps
        found = _backward(grad_logps, grad_entropy, *saved, lse, entropy, ctx.head, ctx.backend, *needs)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * _WIDTH)


token_statistics = differentiable("token_statistics", _operator, _setup, _gradients)
