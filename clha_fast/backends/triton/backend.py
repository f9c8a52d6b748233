"""The Triton backend: allocates, launches, and never waits for the GPU.

Grids depend on shapes alone; what only the data know (spans of candidates, how many tokens have a gradient) stays on
the device. Nothing of size [N, V] exists: the forward keeps a maximum and a sum per token and vocabulary block, the
backward walks chunks of dL/dlogits through one workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.backends.triton.backward import Active, Backward
from clha_fast.backends.triton.clha import CLHARanking
from clha_fast.backends.triton.combine import combine, token_statistics
from clha_fast.backends.triton.forward import Blocks, launch_head, make_route
from clha_fast.backends.triton.head import Head, on
from clha_fast.backends.triton.launchers import launcher
from clha_fast.backends.triton.persistent import PersistentBackward
from clha_fast.backends.triton.routed import routed_backward
from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.options import HeadOptions
from clha_fast.types import (
    EntropySlopes,
    Gradients,
    HeadInputs,
    HeadResult,
    LossResult,
    Needs,
    RankingInputs,
    StatisticsResult,
)
from csrc_triton.clha import METRICS


def token_logps_forward(inputs: HeadInputs, head: HeadOptions) -> HeadResult:
    """logps float32 and lse float64 of `reference.token_logps`, the logits never stored.

    A target outside [0, V) that is not `head.ignore_index`, or a row outside [0, M), gives NaN: no synchronisation.

    Raises:
        ValueError: float64 input. BackendError: neither a GPU that the kernels know nor the interpreter.
    """
    ready = Head.of(inputs, head)
    with on(inputs.hidden.device):
        peaks, sums, logits, _ = _statistics(inputs, ready, head)
        logps, lse = combine(peaks, sums, logits, ready.targets, ready)
        if head.max_dropped_mass is None:
            return HeadResult(logps, lse, logps.new_empty(0))
        return HeadResult(logps, lse, make_route(peaks, sums, lse, ready, head.max_dropped_mass)[0])


def statistics_forward(inputs: HeadInputs, head: HeadOptions, names: tuple[str, ...]) -> StatisticsResult:
    """`token_logps_forward`, and of the same launch's blocks what `reference.token_statistics` says."""
    ready = Head.of(inputs, head)
    with on(inputs.hidden.device):
        blocks = launch_head(inputs.hidden, ready, head.workspace_bytes, routed=False, moments=True)
        logps, lse = combine(*blocks[:3], ready.targets, ready)
        values = token_statistics(blocks, lse, ready.targets, ready)
    return StatisticsResult(logps, lse, {name: values[name].clone() for name in names})


def _statistics(inputs: HeadInputs, ready: Head, head: HeadOptions) -> Blocks:
    return launch_head(inputs.hidden, ready, head.workspace_bytes, routed=head.max_dropped_mass is not None)


def loss_forward(inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective) -> LossResult:
    """Loss, metrics, scores and slopes with one GEMM and no logits; all float32 but lse.

    lse is float64 for the backward's sake. Shapes and meaning as in `functional.linear_loss`. With CLHA's kernels the
    host never waits, and counts that do not add up or an SFT index outside its prompt read nothing out of bounds; any
    other objective reads the sizes on the host. Raises as `token_logps_forward` does.
    """
    ready = Head.of(inputs, head)
    with on(inputs.hidden.device):
        return rank(*_statistics(inputs, ready, head)[:3], ready, given, objective, head.max_dropped_mass)


def rank(
    block_peak: Tensor,
    block_sum: Tensor,
    target_logit: Tensor,
    head: Head,
    given: RankingInputs,
    objective: Objective,
    max_dropped_mass: float | None = None,
) -> LossResult:
    """What `loss_forward` returns, from the head kernel's block statistics."""
    ranked = launcher(objective, given, head)
    counting = ranked if isinstance(ranked, CLHARanking) else None
    logps, lse = combine(block_peak, block_sum, target_logit, head.targets, head, counting)
    slopes = ranked.rank(0, given.candidates_per_prompt.shape[0], logps).to(torch.float32)
    loss, metrics, scores = ranked.finish(logps)
    route = logps.new_empty(0)
    if max_dropped_mass is not None:
        common = slice(METRICS.value, len(METRIC_NAMES))
        route, metrics[common] = make_route(block_peak, block_sum, lse, head, max_dropped_mass)
    return LossResult(loss, metrics, scores, slopes, lse, route)


def token_logps_backward(
    grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """Gradients of sum_t grad_logps_t * logp_t, in the inputs' dtypes.

    Recomputes the logits in chunks of at most `head.workspace_bytes` (64 MiB; at least one tile). Sums run in float32
    and in a fixed order: two calls give the same bits. Tokens with a zero gradient are skipped. None is returned, and
    nothing launched or allocated, for what is not needed. With `head.max_dropped_mass` only the (token, vocabulary
    block) pairs that `route` keeps are computed; of the others dhidden gets their mass times the block's mean row.
    """
    return _backward(grad_logps, None, inputs, lse, route, head, needs)


def statistics_backward(
    grad_logps: Tensor, slopes: EntropySlopes, inputs: HeadInputs, lse: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """`token_logps_backward` of sum_t grad_logps_t * logp_t + slopes.grad_t * entropy_t, in the same passes."""
    return _backward(grad_logps, slopes, inputs, lse, lse.new_empty(0), head, needs)


def _backward(
    grad_logps: Tensor,
    slopes: EntropySlopes | None,
    inputs: HeadInputs,
    lse: Tensor,
    route: Tensor,
    head: HeadOptions,
    needs: Needs,
) -> Gradients:
    hidden, weight, bias = inputs[:3]
    needs = Needs(needs.hidden, needs.weight, needs.bias and bias is not None)
    if not any(needs):
        return Gradients(None, None, None)
    if inputs.targets.shape[0] == 0:
        zeros = (None if t is None else t.new_zeros(t.shape) for t in (hidden, weight, bias))
        return Gradients(*(zero if need else None for zero, need in zip(zeros, needs, strict=True)))
    ready = Head.of(inputs, head)
    with on(hidden.device):
        active = Active.of(grad_logps, ready, hidden.shape[0], slopes)
        if head.max_dropped_mass is not None:
            return routed_backward(hidden, ready, active, lse, route, head, needs)
        kind = PersistentBackward if ready.is_persistent_backward else Backward
        sweep = kind(hidden, ready, active, lse, head.workspace_bytes, needs)
        sweep.run()
        dbias = None if sweep.dbias is None else sweep.dbias.to(weight.dtype)
        return Gradients(sweep.dhidden, sweep.dweight, dbias)
