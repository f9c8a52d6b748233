"""The custom operator of a fused loss: an objective of the log-probabilities of whole prompts, and its gradients."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from clha_fast import backends
from clha_fast.backends import SWEEPING
from clha_fast.backends.memory import Workspace, padded_width
from clha_fast.objectives import decode
from clha_fast.objectives.metrics import metric_names
from clha_fast.ops import checks
from clha_fast.ops.derivatives import differentiable, plain, refuse_dropped_tangents, refuse_second, transforming
from clha_fast.ops.head import as_cast, fake_gradients, fake_statistics, head_gradients, or_empty, score_dtype
from clha_fast.ops.schema import HEAD, NEEDS, RANKING, schema
from clha_fast.options import HeadOptions
from clha_fast.types import Factors, Gradients, HeadInputs, LossResult, Needs, RankingInputs, SweptGradients

_HEAD, _ALL = len(HEAD), len(HEAD) + len(RANKING)
_RESULT, _FACTORS = len(LossResult._fields), len(Factors._fields)
_HEAD_GRADIENTS = len(Gradients._fields)
_SWEPT = _HEAD_GRADIENTS + _FACTORS
_SLOPES = LossResult._fields.index("slopes")


class _Call:
    """An operator's flat arguments as the tuples that backends take."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.inputs, self.given = HeadInputs(*arguments[:_HEAD]), RankingInputs(*arguments[_HEAD:_ALL])
        self.head, self.objective, self.backend = arguments[_ALL : _ALL + 3]
        self.needs = Needs(*arguments[_ALL + 3 :])

    @property
    def keeps_factors(self) -> bool:
        """Whether the sweep leaves the weight's gradient as a product."""
        hidden, (vocabulary, width) = self.inputs.hidden, self.inputs.weight.shape
        given = HeadOptions.decode(self.head).workspace_bytes
        size = Workspace(vocabulary, width, hidden.dtype.itemsize, given, self.needs.weight)
        return self.backend == "workspace" and size.keeps_factors(self.inputs.targets.shape[0])


def _no_factors(like: Tensor) -> Factors:
    return Factors(*(like.new_empty(0) for _ in range(_FACTORS)))


def _linear_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """`LossResult`, then (dhidden, dweight, dbias) and `Factors`.

    A sweeping backend returns the gradients with the loss; the others leave them empty and recompute.
    """
    refuse_dropped_tangents("linear_loss")
    call = _Call(arguments)
    head, objective = HeadOptions.decode(call.head), decode(call.objective)
    checks.input_values(call.inputs, head.ignore_index)
    targets = call.inputs.targets
    checks.ranking_values(targets.shape[0], call.given, lambda: targets != head.ignore_index)
    backend, gradients = backends.load(call.backend), SweptGradients(None, None, None)
    with as_cast(call.inputs.hidden):
        if call.backend in SWEEPING:
            sweeping = cast(backends.SweepingBackend, backend)
            result, gradients = sweeping.loss_sweep(call.inputs, call.given, head, objective, call.needs)
        else:
            result = backend.loss_forward(call.inputs, call.given, head, objective)
    hidden, weight, bias = gradients
    factors = weight if isinstance(weight, Factors) else None
    whole = Gradients(hidden, None if isinstance(weight, Factors) else weight, bias)
    return (*result, *or_empty(whole, call.inputs.hidden), *(factors or _no_factors(call.inputs.hidden)))


_operator = torch.library.custom_op(
    "clha_fast::linear_loss",
    _linear_loss,
    mutates_args=(),
    schema=schema([*HEAD, *RANKING, "str head", "str objective", "str backend", *NEEDS], _RESULT + _SWEPT),
)


@_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(arguments)
    hidden, candidates = call.inputs.hidden, call.given.candidate_lengths.shape
    dtype, sweeps, keeps = score_dtype(hidden), call.backend in SWEEPING, call.keeps_factors
    needs = Needs(*(need and sweeps for need in call.needs))
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(metric_names(decode(call.objective))), dtype=torch.float32),
        hidden.new_empty(candidates, dtype=dtype),
        hidden.new_empty(call.inputs.targets.shape, dtype=dtype),
        *fake_statistics(call.inputs, call.head, call.backend),
        # They stay wide until the upstream gradient has been multiplied in: one rounding, and no float16 underflow.
        *fake_gradients(call.inputs, dtype, needs._replace(weight=needs.weight and not keeps)),
        *_fake_factors(call.inputs, keeps),
    )


def _fake_factors(inputs: HeadInputs, kept: bool) -> Factors:
    """As the workspace backend returns them."""
    hidden, (vocabulary, width), count = inputs.hidden, inputs.weight.shape, inputs.targets.shape[0]
    if not kept:
        return _no_factors(hidden)
    left, right = hidden.new_empty(count, padded_width(vocabulary)), hidden.new_empty(count, width)
    return Factors(left, right, hidden.new_empty((), dtype=torch.float32))


def _weight_gradient(left: Tensor, right: Tensor, unit: Tensor, scale: Tensor, vocabulary: int, wide: bool) -> Tensor:
    """dweight [V, H] of `Factors` times the loss's upstream gradient; in their dtype, or float32 where `wide`."""
    refuse_dropped_tangents("weight_gradient")
    backend: Any = backends.load("workspace")
    with as_cast(right):
        found: Tensor = backend.weight_gradient(
            Factors(left, right, unit), scale, vocabulary, torch.float32 if wide else right.dtype
        )
    return found


_product_operator = torch.library.custom_op(
    "clha_fast::weight_gradient",
    _weight_gradient,
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor unit, Tensor scale, int vocabulary, bool wide) -> Tensor",
)


@_product_operator.register_fake
def _(left: Tensor, right: Tensor, unit: Tensor, scale: Tensor, vocabulary: int, wide: bool) -> Tensor:
    return right.new_empty(vocabulary, right.shape[1], dtype=torch.float32 if wide else right.dtype)


def _nothing_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """A second derivative is refused, whatever it is of."""


def _second(ctx: Any, *grads: Any) -> NoReturn:
    refuse_second("linear_loss: backend 'workspace'")


_product = differentiable("weight_gradient", _product_operator, _nothing_saved, _second)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = _Call(inputs)
    ctx.head, ctx.backend, ctx.dtype = call.head, call.backend, call.inputs.hidden.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.scaled = ctx.handed_out = False
    ctx.swept = call.backend in SWEEPING and any(call.needs)
    ctx.vocabulary = call.inputs.weight.shape[0] if call.keeps_factors else None
    if ctx.swept:
        swept = output[_RESULT:]
        ctx.save_for_backward(*(swept[:-_FACTORS] if ctx.vocabulary is None else swept))
    else:
        ctx.save_for_backward(*call.inputs, *output[_SLOPES:_RESULT])


def _gradients(ctx: Any, grad_loss: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * (_ALL + len(NEEDS))
    if grad_loss is None:
        return (None, None, None, *rest)
    if ctx.swept:
        return (*_scaled(ctx, grad_loss, ctx.needs_input_grad[:3]), *rest)
    slopes, lse, route = ctx.saved_tensors[_HEAD:]
    return (*head_gradients(ctx, slopes * grad_loss, lse, route), *rest)


def _rounded_product(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str = "torch") -> Tensor:
    """gradient * factor in `dtype`, in one pass: on a GPU each pass over [V, H] in float32 is 2% of a step."""
    out = torch.empty_like(gradient, dtype=dtype)
    if backend == "workspace" and gradient.is_contiguous():
        kernels: Any = backends.load(backend)
        kernels.scaled(gradient, factor, out)
        return out
    return torch.mul(gradient, factor, out=out)


def _scaled(ctx: Any, grad_loss: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The sweep's gradients times the loss's upstream gradient.

    In place where tensors are real: [V, H] must not exist twice. A graph that is walked a second time after that says
    so; buffers that an earlier walk handed out unscaled are copied, for somebody may hold them; under torch.compile
    the compiler owns the buffers and decides.
    """
    eager = type(grad_loss) is Tensor and plain(grad_loss)
    if ctx.scaled:
        raise RuntimeError(
            "linear_loss: the gradients of this call were scaled in place by an earlier backward pass; "
            "compute the loss again instead of walking its graph twice"
        )
    if type(grad_loss) is Tensor and torch.is_grad_enabled():
        # They are plain results of the forward: as part of a graph they would count as constants, silently.
        refuse_second(f"linear_loss: backend {ctx.backend!r}")
    saved = _saved(ctx)
    gradients = [g if need else None for g, need in zip(saved[:_HEAD_GRADIENTS], needs, strict=True)]
    if ctx.vocabulary is None or not needs[1]:
        return _times(ctx, gradients, grad_loss, eager)
    left, right, unit = saved[_HEAD_GRADIENTS:]
    # The largest first: what is rounded from the others is not there yet. A batch of upstream gradients is multiplied
    # in below, and needs it wide.
    batched = type(grad_loss) is Tensor and not eager
    scale = torch.ones_like(unit) if batched else grad_loss
    whole = _product(left, right, unit, scale, ctx.vocabulary, batched)
    hidden, weight, bias = _times(ctx, [gradients[0], whole if batched else None, gradients[2]], grad_loss, eager)
    return [hidden, weight if batched else whole, bias]


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        # A copy for a walk that may come would be another [V, H].
        if ctx.handed_out and "modified by an inplace operation" in str(error):
            raise RuntimeError(
                "linear_loss: expected gradients as an earlier backward pass of this call returned them, for a second "
                "pass gives the same tensors, got them changed in place; change a copy (g = g / n), or compute the "
                "loss again"
            ) from error
        raise
    return saved


def _times(ctx: Any, gradients: list[Tensor | None], grad_loss: Tensor, eager: bool) -> list[Tensor | None]:
    """The gradients times the upstream one, in the inputs' dtype."""
    if eager and grad_loss.is_cuda and ctx.dtype.itemsize == 2:
        return [None if g is None else _rounded_product(g, grad_loss, ctx.dtype, ctx.backend) for g in gradients]
    if eager and grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        ctx.handed_out = True
    elif not eager or ctx.handed_out:
        gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
    else:
        ctx.scaled = True
        gradients = [None if g is None else g.mul_(grad_loss) for g in gradients]
    return [None if g is None else g.to(ctx.dtype) for g in gradients]


_loss = differentiable("linear_clha_loss", _operator, _setup, _gradients)


def linear_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator; under torch.func without gradients from the sweep, which knows neither levels nor batches."""
    if transforming():
        arguments = (*arguments[: -len(NEEDS)], *(False for _ in NEEDS))
    result: tuple[Tensor, ...] = _loss(*arguments)
    return result
