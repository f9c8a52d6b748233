"""The custom operator of token log-probabilities: what autograd and torch.compile see of the backends.

Settings travel as the strings that `options.encoded` holds, so that a schema carries one argument for all of them.
A gradient that nobody asked for is an empty tensor here, for an operator cannot return None.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from clha_fast import backends
from clha_fast.ops import checks
from clha_fast.ops.derivatives import backward_operator, differentiable, refuse_dropped_tangents
from clha_fast.ops.schema import HEAD, NEEDS, schema
from clha_fast.options import ROUTE_WORDS, HeadOptions
from clha_fast.types import Gradients, HeadInputs, Needs

_WIDTH = len(HeadInputs._fields)


def as_cast(like: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast is off: it is on in an operator's body, and the inputs have been cast as it would."""
    return torch.autocast(like.device.type, enabled=False)


def or_empty(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as an operator returns them."""
    dhidden, dweight, dbias = (like.new_empty(0) if g is None else g for g in gradients)
    return dhidden, dweight, dbias


def score_dtype(hidden: Tensor) -> torch.dtype:
    """float32 or better."""
    return torch.promote_types(hidden.dtype, torch.float32)


def fake_statistics(inputs: HeadInputs, head: str, backend: str) -> tuple[Tensor, Tensor]:
    """(lse [N], route) as the backends return them."""
    hidden, count = inputs.hidden, inputs.targets.shape[0]
    # The kernels recompute probabilities from it: beside logits of 1e4 float32 has no digits left for them.
    dtype = torch.float64 if backend in ("triton", "workspace") else score_dtype(hidden)
    routed = backend == "triton" and HeadOptions.decode(head).max_dropped_mass is not None
    shape = (-(-inputs.weight.shape[0] // ROUTE_WORDS), count) if routed else (0,)
    return hidden.new_empty(count, dtype=dtype), hidden.new_empty(shape, dtype=torch.float32)


def fake_gradients(inputs: HeadInputs, dtype: torch.dtype, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) as the backends return them."""
    hidden, weight = inputs.hidden, inputs.weight
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dhidden, dweight, dbias = (
        hidden.new_empty(shape, dtype=dtype) if need else hidden.new_empty(0)
        for shape, need in zip(shapes, needs, strict=True)
    )
    return dhidden, dweight, dbias


def _token_logps(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logps [N], lse [N], route)."""
    refuse_dropped_tangents("token_logps")
    *tensors, head, backend = arguments
    inputs, settings = HeadInputs(*tensors), HeadOptions.decode(head)
    checks.input_values(inputs, settings.ignore_index)
    with as_cast(inputs.hidden):
        logps, lse, route = backends.load(backend).token_logps_forward(inputs, settings)
    return logps, lse, route


_token_logps_operator = torch.library.custom_op(
    "clha_fast::token_logps",
    _token_logps,
    mutates_args=(),
    schema=schema([*HEAD, "str head", "str backend"], 3),
)


@_token_logps_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, head, backend = arguments
    inputs = HeadInputs(*tensors)
    logps = inputs.hidden.new_empty(inputs.targets.shape, dtype=score_dtype(inputs.hidden))
    return logps, *fake_statistics(inputs, head, backend)


def _token_logps_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) by recomputing the logits; empty where not needed."""
    refuse_dropped_tangents("token_logps_backward")
    grad_logps, *tensors, lse, route, head, backend, need_hidden, need_weight, need_bias = arguments
    inputs, needs = HeadInputs(*tensors), Needs(need_hidden, need_weight, need_bias)
    settings = HeadOptions.decode(head)
    with as_cast(inputs.hidden):
        gradients = backends.load(backend).token_logps_backward(grad_logps, inputs, lse, route, settings, needs)
    return or_empty(gradients, inputs.hidden)


_backward_operator = torch.library.custom_op(
    "clha_fast::token_logps_backward",
    _token_logps_backward,
    mutates_args=(),
    schema=schema(["Tensor grad_logps", *HEAD, "Tensor lse", "Tensor route", "str head", "str backend", *NEEDS], 3),
)


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = HeadInputs(*arguments[1 : 1 + _WIDTH])
    return fake_gradients(inputs, inputs.hidden.dtype, Needs(*arguments[-3:]))


token_logps_backward = backward_operator("token_logps_backward", _backward_operator, "token_logps")


def head_gradients(ctx: Any, grad_logps: Tensor, lse: Tensor, route: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (hidden, weight, bias) for saved head inputs and a gradient of the log-probabilities."""
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    saved = ctx.saved_tensors[:_WIDTH]
    gradients = token_logps_backward(grad_logps, *saved, lse, route, ctx.head, ctx.backend, *needs)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _token_logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.head, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_logps_gradients(ctx: Any, grad_logps: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    if grad_logps is None:
        return (None,) * (_WIDTH + 2)
    return (*head_gradients(ctx, grad_logps, *ctx.saved_tensors[_WIDTH:]), *(None,) * (_WIDTH - 1))


token_logps = differentiable("token_logps", _token_logps_operator, _token_logps_setup, _token_logps_gradients)
