"""The Triton backend: allocates, launches, and never waits for the GPU.

Grids depend on shapes alone; what only the data know (spans of candidates, how many tokens have a gradient) stays on
the device. Nothing of size [N, V] exists: the forward keeps a maximum and a sum per token and vocabulary block, the
backward walks chunks of dL/dlogits through one workspace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clha_fast.inputs import Gradients, HeadInputs, HeadResult, LossResult, Needs, RankingInputs
from clha_fast.metrics import METRIC_NAMES
from clha_fast.options import CLHAOptions, HeadOptions
from clha_fast.triton_backward import Active, Backward
from clha_fast.triton_forward import launch_head, make_route
from clha_fast.triton_head import Head, on, tiles
from clha_fast.triton_persistent import PersistentBackward
from clha_fast.triton_routed import routed_backward
from csrc_triton import ranking

_NOISE = {"none": ranking.NOISE_NONE, "abs": ranking.NOISE_ABS, "signed": ranking.NOISE_SIGNED}
_REDUCE = {
    "sum": ranking.REDUCE_SUM,
    "distance_mean": ranking.REDUCE_DISTANCE_MEAN,
    "pair_mean": ranking.REDUCE_PAIR_MEAN,
}


def _noise(options: CLHAOptions, rewards: Tensor | None) -> Any:
    """The kernels' noise rule; without rewards no pair is noise."""
    return _NOISE["none" if rewards is None else options.noise_rule]


@dataclass(frozen=True)
class _Plan:
    """The ranking side of `clha_forward` on the device: ends of candidates and prompts, rewards, counts."""

    token_ends: Tensor
    prompt_ends: Tensor
    rewards: Tensor | None
    lengths: Tensor
    pair_counts: Tensor | None
    own_counts: bool


def _launch_combine(
    block_peak: Tensor,
    block_sum: Tensor,
    target_logit: Tensor,
    head: Head,
    plan: _Plan | None,
    options: CLHAOptions,
) -> tuple[Tensor, Tensor]:
    """(logps [N] float32, lse [N] float64); with a plan its lengths and its own pair counts are filled as well."""
    logps, lse = torch.empty_like(target_logit), torch.empty_like(target_logit, dtype=torch.float64)
    num_tokens = logps.shape[0]
    config = head.config("combine")
    prompts = 0 if plan is None else plan.prompt_ends.shape[0]
    programs = tiles(num_tokens, config["BLOCK_N"]) + prompts
    if programs:
        ranking.combine_kernel[(programs,)](
            block_peak,
            block_sum,
            target_logit,
            head.targets,
            logps,
            lse,
            None if plan is None else plan.token_ends,
            None if plan is None else plan.prompt_ends,
            None if plan is None else plan.rewards,
            None if plan is None else plan.lengths,
            None if plan is None else plan.pair_counts,
            num_tokens,
            0 if plan is None else plan.lengths.shape[0],
            block_peak.shape[0],
            head.ignore_index,
            float(options.reward_margin),
            HAS_PROMPTS=plan is not None,
            HAS_REWARDS=plan is not None and plan.rewards is not None,
            NOISE=_noise(options, None if plan is None else plan.rewards),
            REDUCE=_REDUCE[options.reduction],
            COUNT_PAIRS=plan is not None and plan.own_counts,
            **config,
        )
    return logps, lse


def token_logps_forward(inputs: HeadInputs, head: HeadOptions) -> HeadResult:
    """logps float32 and lse float64 of `reference.token_logps`, the logits never stored.

    A target outside [0, V) that is not `head.ignore_index`, or a row outside [0, M), gives NaN: no synchronisation.

    Raises:
        ValueError: float64 input. BackendError: neither a GPU that the kernels know nor the interpreter.
    """
    ready = Head.of(inputs, head)
    with on(inputs.hidden.device):
        peaks, sums, logits = _statistics(inputs, ready, head)
        logps, lse = _launch_combine(peaks, sums, logits, ready, None, CLHAOptions())
        if head.max_dropped_mass is None:
            return HeadResult(logps, lse, logps.new_empty(0))
        return HeadResult(logps, lse, make_route(peaks, sums, lse, ready, head.max_dropped_mass)[0])


def _statistics(inputs: HeadInputs, ready: Head, head: HeadOptions) -> tuple[Tensor, Tensor, Tensor]:
    return launch_head(inputs.hidden, ready, head.workspace_bytes, routed=head.max_dropped_mass is not None)


def clha_forward(
    inputs: HeadInputs, ranking_inputs: RankingInputs, head: HeadOptions, options: CLHAOptions
) -> LossResult:
    """Loss, metrics, scores and coefficients with one GEMM and no logits; all float32 but lse.

    lse is float64 for the backward's sake. Shapes and meaning as in `functional.linear_clha_loss`. Counts that do not
    add up or an SFT index outside its prompt read nothing out of bounds. Raises as `token_logps_forward` does.
    """
    ready = Head.of(inputs, head)
    with on(inputs.hidden.device):
        return rank(*_statistics(inputs, ready, head), ready, ranking_inputs, options, head.max_dropped_mass)


def rank(
    block_peak: Tensor,
    block_sum: Tensor,
    target_logit: Tensor,
    head: Head,
    ranking_inputs: RankingInputs,
    options: CLHAOptions,
    max_dropped_mass: float | None = None,
) -> LossResult:
    """What `clha_forward` returns, from the head kernel's block statistics."""
    device = target_logit.device
    rewards, sft_index, prompt_count = ranking_inputs.rewards, ranking_inputs.sft_index, ranking_inputs.prompt_count
    plan = _make_plan(ranking_inputs, options, device)
    logps, lse = _launch_combine(block_peak, block_sum, target_logit, head, plan, options)
    num_candidates, num_prompts = plan.lengths.shape[0], plan.prompt_ends.shape[0]
    scores, coefficients = (torch.empty(num_candidates, dtype=torch.float32, device=device) for _ in range(2))
    sums = torch.empty(num_candidates, dtype=torch.float64, device=device)
    partials = torch.empty(num_prompts, ranking.METRICS.value, dtype=torch.float64, device=device)
    ranking.prompts_kernel[(num_prompts,)](
        logps,
        plan.lengths,
        plan.token_ends,
        plan.prompt_ends,
        plan.rewards,
        None if sft_index is None else sft_index.to(device, torch.int64, non_blocking=True).contiguous(),
        plan.pair_counts,
        None if prompt_count is None else prompt_count.to(device, torch.float32, non_blocking=True),
        sums,
        scores,
        coefficients,
        partials,
        logps.shape[0],
        num_candidates,
        num_prompts,
        0 if plan.pair_counts is None else plan.pair_counts.shape[0],
        float(options.margin),
        float(options.reward_margin),
        float(options.rank_weight),
        float(options.sft_weight),
        float(options.reward_floor),
        HAS_REWARDS=rewards is not None,
        HAS_SFT_INDEX=sft_index is not None,
        HAS_PROMPT_COUNT=prompt_count is not None,
        NOISE=_noise(options, rewards),
        REDUCE=_REDUCE[options.reduction],
        SFT_MEAN=options.sft == "mean",
        SFT_SQUARED=options.sft_factor == "squared",
        **head.config("prompts"),
    )
    loss = torch.empty((), dtype=torch.float32, device=device)
    # The kernel fills the first 16; the others stay 0 where gradients are exact.
    metrics = torch.zeros(len(METRIC_NAMES), dtype=torch.float32, device=device)
    ranking.finish_kernel[(1,)](partials, loss, metrics, num_prompts, **head.config("finish"))
    route = logps.new_empty(0)
    if max_dropped_mass is not None:
        route, metrics[ranking.METRICS.value :] = make_route(block_peak, block_sum, lse, head, max_dropped_mass)
    return LossResult(loss, metrics, scores, coefficients, lse, route)


def _make_plan(ranking_inputs: RankingInputs, options: CLHAOptions, device: torch.device) -> _Plan:
    candidate_lengths, candidates_per_prompt, rewards, _, pair_counts, _ = ranking_inputs
    num_candidates = candidate_lengths.shape[0]
    counts = None
    if options.reduction != "sum":
        if pair_counts is not None:
            counts = pair_counts.to(device, torch.float32, non_blocking=True).contiguous()
            if options.reduction == "pair_mean":
                counts = counts.sum().reshape(1)
        else:
            distances = max(1, num_candidates - 1) if options.reduction == "distance_mean" else 1
            counts = torch.zeros(distances, dtype=torch.int32, device=device)
    return _Plan(
        token_ends=candidate_lengths.to(device, torch.int64, non_blocking=True).cumsum(0),
        prompt_ends=candidates_per_prompt.to(device, torch.int64, non_blocking=True).cumsum(0),
        rewards=None if rewards is None else rewards.to(device, torch.float32, non_blocking=True).contiguous(),
        lengths=torch.empty(num_candidates, dtype=torch.int32, device=device),
        pair_counts=counts,
        own_counts=counts is not None and pair_counts is None,
    )


def token_logps_backward(
    grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """Gradients of sum_t grad_logps_t * logp_t, in the inputs' dtypes.

    Recomputes the logits in chunks of at most `head.workspace_bytes` (64 MiB; at least one tile). Sums run in float32
    and in a fixed order: two calls give the same bits. Tokens with a zero gradient are skipped. None is returned, and
    nothing launched or allocated, for what is not needed. With `head.max_dropped_mass` only the (token, vocabulary
    block) pairs that `route` keeps are computed; of the others dhidden gets their mass times the block's mean row.
    """
    hidden, weight, bias = inputs[:3]
    needs = Needs(needs.hidden, needs.weight, needs.bias and bias is not None)
    if not any(needs):
        return Gradients(None, None, None)
    if inputs.targets.shape[0] == 0:
        zeros = (None if t is None else t.new_zeros(t.shape) for t in (hidden, weight, bias))
        return Gradients(*(zero if need else None for zero, need in zip(zeros, needs, strict=True)))
    ready = Head.of(inputs, head)
    with on(hidden.device):
        active = Active.of(grad_logps, ready, hidden.shape[0])
        if head.max_dropped_mass is not None:
            return routed_backward(hidden, ready, active, lse, route, head, needs)
        kind = PersistentBackward if ready.is_persistent else Backward
        sweep = kind(hidden, ready, active, lse, head.workspace_bytes, needs)
        sweep.run()
        dbias = None if sweep.dbias is None else sweep.dbias.to(weight.dtype)
        return Gradients(sweep.dhidden, sweep.dweight, dbias)
