"""The functional face: token log-probabilities and the CLHA loss from hidden states and an output embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast import reference
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.ops import checks
from clha_fast.ops import head as ops
from clha_fast.ops.dispatch import Backend, resolve
from clha_fast.options import PUBLISHED, CLHAOptions, HeadOptions
from clha_fast.types import HeadInputs, RankingInputs

_DEFAULT_HEAD = HeadOptions()


def head_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_index: Tensor | None
) -> HeadInputs:
    """The head's inputs, checked; floating ones in autocast's dtype where that is on, as `F.linear` takes them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    checks.require_tensors(hidden=hidden, weight=weight, bias=bias)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)

        def cast(tensor: Tensor) -> Tensor:
            # Like autocast itself, float64 is left alone.
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        hidden, weight, bias = cast(hidden), cast(weight), None if bias is None else cast(bias)
    inputs = HeadInputs(hidden, weight, bias, targets, row_index)
    checks.head_inputs(inputs)
    return inputs


def _resolve(backend: Backend, inputs: HeadInputs, head: HeadOptions, sweep: bool) -> str:
    hidden = inputs.hidden
    gradients = sweep and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:3])
    routed = head.max_dropped_mass is not None
    return resolve(backend, str(hidden.device), hidden.dtype, gradients=gradients, routed=routed)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    head: HeadOptions = _DEFAULT_HEAD,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probabilities of target tokens without the [N, V] logits; differentiable in hidden, weight and bias.

    Replaces::

        logits = F.linear(hidden[row_index], weight, bias).float()      # then scale, softcap, temperature
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    Args:
        hidden: [M, H] hidden states, float64 (torch backend), float32, float16 or bfloat16; any strides.
        weight: [V, H] output embedding, hidden's dtype. bias: [V] or None.
        targets: [N] int64, the token each position must predict; `head.ignore_index` marks tokens not scored.
        row_index: [N] int64, token t reads `hidden[row_index[t]]`, repeats allowed; None when M == N.
        head: scale, softcap, temperature, workspace and `max_dropped_mass` of the gradients, see `HeadOptions`.
        backend: "auto", "triton", "workspace", "torch" or "reference" (eager: it does form the logits).

    Returns:
        [N] nats, float32 (float64 for float64 input); 0 for ignored tokens. Under autocast the inputs are cast as
        `F.linear` casts them. On a GPU a target out of range gives NaN, without a synchronisation.

    Raises:
        ValueError: shapes, dtypes, devices or the kind of `head` do not fit; on CPU tensors also targets or row indices
            out of range.
        BackendError: the backend asked for cannot run here.
    """
    checks.settings(head)
    inputs = head_inputs(hidden, weight, bias, targets, row_index)
    name = _resolve(backend, inputs, head, sweep=False)
    if name == "reference":
        checks.target_values(inputs, head.ignore_index)
        return reference.token_logps(*inputs, head)
    return ops.token_logps(*inputs, head.encoded, name)[0]


def linear_clha_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    candidate_lengths: Tensor,
    candidates_per_prompt: Tensor,
    *,
    rewards: Tensor | None = None,
    sft_index: Tensor | None = None,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    pair_counts: Tensor | None = None,
    prompt_count: Tensor | None = None,
    head: HeadOptions = _DEFAULT_HEAD,
    options: CLHAOptions = PUBLISHED,
    backend: Backend = "auto",
) -> tuple[Tensor, CLHAMetrics]:
    """The CLHA loss (Fang et al. 2024, Eq. 3-6) of ranked candidates, fused with the output embedding.

    Replaces, for every prompt with candidates 0..n-1, best first::

        logps = token_logps(hidden, weight, targets)                          # never as [N, V] logits here
        s = torch.stack([part.mean() for part in logps.split(lengths)])       # Eq. 3
        for i, j in itertools.combinations(range(n), 2):
            if abs(rewards[i] - rewards[j]) > reward_margin:                  # the rescoring strategy
                rank_loss += relu(s[j] - s[i] + margin * (j - i))             # Eq. 4-6, then the reduction
        if rewards[t] > reward_floor:
            sft_loss -= sft_weight * (n - 1) ** 2 * logps_of_t.sum()          # adaptive SFT on target t

    Args:
        hidden, weight, targets, bias, row_index, head, backend: as in `token_logps`; tokens are packed candidate
            after candidate, prompt after prompt.
        candidate_lengths: [C] integers, tokens of each candidate, sum N. 0 stands for a candidate that was not run
            (an inert one): it keeps its place and reward, has score 0 and no pairs.
        candidates_per_prompt: [P] integers >= 1, sum C; best rank first within a prompt.
        rewards: [C] floating, a reward model's scores; None keeps all pairs and opens all SFT gates.
        sft_index: [P] integers, position of each prompt's SFT target; None is 0, the best.
        pair_counts: [D] kept pairs at rank distance 1..D that "distance_mean" and "pair_mean" divide by; None counts
            this batch's. Give the counts of the global batch to make the loss independent of how it is split.
        prompt_count: [] number of prompts that means over prompts divide by; None is P.
        options: margins, noise rule, reduction, SFT form, see `CLHAOptions`.

    The ranking tensors may live on the CPU or on hidden's device. Backends "torch" and "workspace" read the first two
    on the host; "triton" never synchronises.

    Returns:
        (loss, metrics): a scalar in nats, float32 (float64 for float64 input), and `CLHAMetrics` without a graph.
        Nothing kept and no open gate gives exactly 0, with zero gradients.

    Raises:
        ValueError: shapes, dtypes or kinds of settings do not fit; for CPU tensors also sums that do not match,
            targets or `sft_index` out of range, rewards that are not finite.
        BackendError: the backend asked for cannot run here.
    """
    checks.settings(head, options)
    inputs = head_inputs(hidden, weight, bias, targets, row_index)
    ranking = RankingInputs(candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts, prompt_count)
    checks.ranking_inputs(ranking)
    name = _resolve(backend, inputs, head, sweep=True)
    if name == "reference":
        checks.target_values(inputs, head.ignore_index)
        checks.ranking_values(targets.shape[0], ranking)
        logps = reference.token_logps(*inputs, head)
        loss, values, scores = reference.clha_loss(logps, targets, *ranking, head, options)
        return loss, CLHAMetrics(values, scores.detach())
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in inputs[:3]]
    loss, values, scores, *_ = ops.linear_clha(*inputs, *ranking, head.encoded, options.encoded, name, *needs)
    return loss, CLHAMetrics(values, scores)
