"""Custom operators: what autograd and torch.compile see of the fused backends.

Settings travel as the strings that `options.encoded` holds, so that a schema carries one argument for all of them.
A gradient that nobody asked for is an empty tensor here, for an operator cannot return None. The schemas are flat, as
operators' are; `inputs` holds the tuples that the backends take.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.ops import checks
from clha_fast.ops.dispatch import SWEEPING
from clha_fast.options import ROUTE_WORDS, CLHAOptions, HeadOptions
from clha_fast.types import Gradients, HeadInputs, LossResult, Needs, RankingInputs

# Imported when they are asked for: Triton's need triton.
_MODULES = {
    "torch": "clha_fast.backends.torch.backend",
    "triton": "clha_fast.backends.triton.backend",
    "workspace": "clha_fast.backends.triton.workspace",
}


def _module(backend: str) -> ModuleType:
    return importlib.import_module(_MODULES[backend])


def _or_empty(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = (like.new_empty(0) if g is None else g for g in gradients)
    return dhidden, dweight, dbias


def _score_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _fake_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, head: str, backend: str) -> tuple[Tensor, Tensor]:
    """(lse [N], route) as the backends return them."""
    # The kernels recompute probabilities from it: beside logits of 1e4 float32 has no digits left for them.
    dtype = torch.float64 if backend in ("triton", "workspace") else _score_dtype(hidden)
    routed = backend == "triton" and HeadOptions.decode(head).max_dropped_mass is not None
    shape = (-(-weight.shape[0] // ROUTE_WORDS), targets.shape[0]) if routed else (0,)
    return hidden.new_empty(targets.shape, dtype=dtype), hidden.new_empty(shape, dtype=torch.float32)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_hidden, need_weight, need_bias)
    dhidden, dweight, dbias = (
        hidden.new_empty(shape, dtype=dtype) if need else hidden.new_empty(0)
        for shape, need in zip((hidden.shape, weight.shape, weight.shape[:1]), needs, strict=True)
    )
    return dhidden, dweight, dbias


@torch.library.custom_op("clha_fast::token_logps", mutates_args=())
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    head: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps [N], lse [N], route)."""
    settings = HeadOptions.decode(head)
    inputs = HeadInputs(hidden, weight, bias, targets, row_index)
    checks.target_values(inputs, settings.ignore_index)
    logps, lse, route = _module(backend).token_logps_forward(inputs, settings)
    return logps, lse, route


@token_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    head: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logps = hidden.new_empty(targets.shape, dtype=_score_dtype(hidden))
    return logps, *_fake_statistics(hidden, weight, targets, head, backend)


@torch.library.custom_op("clha_fast::token_logps_backward", mutates_args=())
def token_logps_backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    lse: Tensor,
    route: Tensor,
    head: str,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) by recomputing the logits; empty where not needed."""
    inputs = HeadInputs(hidden, weight, bias, targets, row_index)
    needs = Needs(need_hidden, need_weight, need_bias)
    settings = HeadOptions.decode(head)
    gradients = _module(backend).token_logps_backward(grad_logps, inputs, lse, route, settings, needs)
    return _or_empty(gradients, hidden)


@token_logps_backward.register_fake
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    lse: Tensor,
    route: Tensor,
    head: str,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, hidden.dtype, need_hidden, need_weight, need_bias)


def _head_gradients(ctx: Any, grad_logps: Tensor, lse: Tensor, route: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (hidden, weight, bias) for saved head inputs and a gradient of the log-probabilities."""
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    gradients = token_logps_backward(grad_logps, *ctx.saved_tensors[:5], lse, route, ctx.head, ctx.backend, *needs)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _token_logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.head, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_logps_gradients(ctx: Any, grad_logps: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    if grad_logps is None:
        return (None,) * 7
    return (*_head_gradients(ctx, grad_logps, *ctx.saved_tensors[5:]), None, None, None, None)


token_logps.register_autograd(_token_logps_gradients, setup_context=_token_logps_setup)


@torch.library.custom_op("clha_fast::linear_clha", mutates_args=())
def linear_clha(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    candidate_lengths: Tensor,
    candidates_per_prompt: Tensor,
    rewards: Tensor | None,
    sft_index: Tensor | None,
    pair_counts: Tensor | None,
    prompt_count: Tensor | None,
    head: str,
    options: str,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, scores, dL/dS, lse, route, dhidden, dweight, dbias).

    A sweeping backend returns the gradients with the loss; the others leave them empty and recompute.
    """
    settings, loss_settings = HeadOptions.decode(head), CLHAOptions.decode(options)
    inputs = HeadInputs(hidden, weight, bias, targets, row_index)
    ranking = RankingInputs(candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts, prompt_count)
    checks.target_values(inputs, settings.ignore_index)
    checks.ranking_values(targets.shape[0], ranking)
    module, gradients = _module(backend), Gradients(None, None, None)
    result: LossResult
    if backend in SWEEPING:
        needs = Needs(need_hidden, need_weight, need_bias)
        result, gradients = module.clha_sweep(inputs, ranking, settings, loss_settings, needs)
    else:
        result = module.clha_forward(inputs, ranking, settings, loss_settings)
    return (*result, *_or_empty(gradients, hidden))


@linear_clha.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    candidate_lengths: Tensor,
    candidates_per_prompt: Tensor,
    rewards: Tensor | None,
    sft_index: Tensor | None,
    pair_counts: Tensor | None,
    prompt_count: Tensor | None,
    head: str,
    options: str,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _score_dtype(hidden)
    sweeps = backend in SWEEPING
    needs = (need_hidden and sweeps, need_weight and sweeps, need_bias and sweeps)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(METRIC_NAMES), dtype=torch.float32),
        hidden.new_empty(candidate_lengths.shape, dtype=dtype),
        hidden.new_empty(candidate_lengths.shape, dtype=dtype),
        *_fake_statistics(hidden, weight, targets, head, backend),
        # They stay wide until the upstream gradient has been multiplied in: one rounding, and no float16 underflow.
        *_fake_gradients(hidden, weight, dtype, *needs),
    )


def _linear_clha_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (hidden, weight, bias, targets, row_index, lengths, *_ranking, ctx.head, _options, backend, _, _, _) = inputs
    ctx.backend = backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype
    ctx.scaled = ctx.handed_out = False
    if backend in SWEEPING:
        ctx.save_for_backward(*output[6:])
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, row_index, lengths, *output[3:6])


def _linear_clha_gradients(ctx: Any, grad_loss: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 14
    if grad_loss is None:
        return (None, None, None, *rest)
    if ctx.backend in SWEEPING:
        needs = ctx.needs_input_grad[:3]
        return (*_scaled(ctx, grad_loss, needs), *rest)
    lengths, coefficients, lse, route = ctx.saved_tensors[5:]
    grad_logps = torch.repeat_interleave(
        coefficients * grad_loss, lengths.to(coefficients.device, non_blocking=True), output_size=lse.shape[0]
    )
    return (*_head_gradients(ctx, grad_logps, lse, route), *rest)


def _rounded_product(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in one pass: on a GPU each pass over [V, H] in float32 is 2% of a step."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _scaled(ctx: Any, grad_loss: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The sweep's gradients times the loss's upstream gradient.

    In place where tensors are real: [V, H] must not exist twice. A graph that is walked a second time after that says
    so; buffers that an earlier walk handed out unscaled are copied, for somebody may hold them; under torch.compile
    the compiler owns the buffers and decides.
    """
    eager = type(grad_loss) is Tensor
    if ctx.scaled:
        raise RuntimeError(
            "linear_clha_loss: the gradients of this call were scaled in place by an earlier backward pass; "
            "compute the loss again instead of walking its graph twice"
        )
    if eager and torch.is_grad_enabled():
        # They are plain results of the forward: as part of a graph they would count as constants, silently.
        raise RuntimeError(
            f"linear_clha_loss: backend {ctx.backend!r} has no second derivative (create_graph=True); "
            "use backend='reference'"
        )
    gradients = [g if need else None for g, need in zip(ctx.saved_tensors, needs, strict=True)]
    if eager and grad_loss.is_cuda and ctx.dtype.itemsize == 2:
        return [None if g is None else _rounded_product(g, grad_loss, ctx.dtype) for g in gradients]
    if eager and grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        ctx.handed_out = True
    elif not eager or ctx.handed_out:
        gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
    else:
        ctx.scaled = True
        gradients = [None if g is None else g.mul_(grad_loss) for g in gradients]
    return [None if g is None else g.to(ctx.dtype) for g in gradients]


linear_clha.register_autograd(_linear_clha_gradients, setup_context=_linear_clha_setup)
