"""The functional face: token log-probabilities, and losses of them, from hidden states and an output embedding."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from clha_fast import ops, reference
from clha_fast.backends import SWEEPING
from clha_fast.objectives import BUILT_IN, Group, Objective, as_objective, encode
from clha_fast.objectives.additive import check_adds_up
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.objectives.ranked import RankedBatch
from clha_fast.ops import checks, derivatives
from clha_fast.ops.dispatch import Backend, resolve, token_limit
from clha_fast.options import HeadOptions
from clha_fast.types import STATISTICS, HeadInputs, RankingInputs, VocabShard

_DEFAULT_HEAD = HeadOptions()


def _resolve(backend: Backend, inputs: HeadInputs, head: HeadOptions, sweep: bool) -> str:
    hidden = inputs.hidden
    gradients = sweep and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:3])
    routed, limit, fits = head.max_dropped_mass is not None, 0, False
    if backend == "auto" and gradients and not routed and hidden.device.type == "cuda":
        # Read only where the choice depends on them: a compiled graph then holds for this head alone, and for calls
        # on one side of the limit.
        vocabulary, width = (operator.index(size) for size in inputs.weight.shape)
        trains, given = inputs.weight.requires_grad, head.workspace_bytes
        limit = token_limit(str(hidden.device), hidden.dtype, vocabulary, width, trains, given)
        if inputs.targets.shape[0] <= limit:  # a branch is a guard; a number would be one for each number of tokens
            fits = True
    return resolve(
        backend, str(hidden.device), hidden.dtype, gradients=gradients, routed=routed, limit=limit, fits=fits
    )


@overload
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    temperature: Tensor | None = None,
    head: HeadOptions = _DEFAULT_HEAD,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
    statistics: None = None,
) -> Tensor: ...
@overload
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    temperature: Tensor | None = None,
    head: HeadOptions = _DEFAULT_HEAD,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
    statistics: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor]]: ...
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    temperature: Tensor | None = None,
    head: HeadOptions = _DEFAULT_HEAD,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
    statistics: Sequence[str] | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of target tokens without the [N, V] logits; differentiable in hidden, weight and bias.

    Replaces::

        logits = F.linear(hidden[row_index], weight, bias).float()      # then scale, softcap, temperature
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    Args:
        hidden: [M, H] hidden states, float64 (torch backend), float32, float16 or bfloat16; any strides.
        weight: [V, H] output embedding, hidden's dtype. bias: [V] or None.
        targets: [N] int64, the token each position must predict; `head.ignore_index` marks tokens not scored.
        row_index: [N] int64, token t reads `hidden[row_index[t]]`, repeats allowed; None when M == N.
        temperature: [N] floating, positive: each token's logits are divided by its own, after scale and softcap, in
            the place of `head.temperature`, which must be 1 then. No gradient flows into it. None is the head's.
        head: scale, softcap, temperature, workspace and `max_dropped_mass` of the gradients, see `HeadOptions`.
        shard: None where `weight` is whole; else [V_local, H] are this process's rows of it, V_local >= 1, and all
            processes of the group call with the same `hidden`, `targets` and `row_index`. In the forward two
            collectives over [N] numbers run, in the backward one over dhidden (`VocabShard.reduce_hidden`).
        backend: "auto", "triton", "workspace", "torch" or "reference" (eager: it does form the logits); a `shard` is
            taken by "auto" and "torch".
        statistics: names of what is wanted beside logp, from the same pass, of p = softmax(z) with z the logits after
            scale, softcap and temperature: "entropy" = -sum_v p log p in nats, differentiable, with 0 log 0 = 0;
            "sum_sq_probs" = sum_v p^2; "mean_logit" = sum_v z / V; "is_top1", 1 where no logit is above the target's,
            else 0. The last three have no gradient.

    Returns:
        [N] nats, float32 (float64 for float64 input); 0 for ignored tokens. Under autocast the inputs are cast as
        `F.linear` casts them. On a GPU a target out of range gives NaN, without a synchronisation. With `statistics`
        (logps, values): a dict of the names asked for, each [N] in logps' dtype, 0 for ignored tokens.

    Raises:
        ValueError: shapes, dtypes, devices or the kind of `head` do not fit; on CPU tensors also targets or row indices
            out of range, and temperatures that are not positive; `head.max_dropped_mass` with statistics or with a
            temperature for each token.
        BackendError: the backend asked for cannot run here.
        RuntimeError: forward-mode or second derivatives, which only "reference" has; torch.func's grad, vjp, jacrev and
            vmap are taken by all.
    """
    checks.settings(head)
    inputs = checks.head_inputs(hidden, weight, bias, targets, row_index)
    inputs = checks.with_temperature(inputs, temperature, head)
    names = None if statistics is None else checks.statistics(statistics, head)
    if shard is not None:
        logps, values = _sharded(inputs, head, shard, backend, names or ())
        return logps if names is None else (logps, values)
    name = _resolve(backend, inputs, head, sweep=False)
    if name == "reference":
        checks.input_values(inputs, head.ignore_index)
        of = (*inputs[:5], head, inputs.temperature)
        logps = reference.token_logps(*of)
        if names is None:
            return logps
        values = reference.token_statistics(*of)
        return logps, {n: values[n] for n in names}
    if not names:
        logps = ops.token_logps(*inputs, head.encoded, name)[0]
        return logps if names is None else (logps, {})
    logps, _, *found = ops.token_statistics(*inputs, head.encoded, name, ",".join(names))
    values = dict(zip(STATISTICS, found, strict=True))
    return logps, {n: values[n] for n in names}


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
    given = RankingInputs(candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts, prompt_count)
    return linear_loss(
        hidden, weight, targets, given, options, bias=bias, row_index=row_index, head=head, backend=backend
    )


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    given: RankingInputs,
    objective: Objective | Callable[[Group], Tensor] = PUBLISHED,
    *,
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    head: HeadOptions = _DEFAULT_HEAD,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, CLHAMetrics]:
    """Any objective of ranked candidates' token log-probabilities, fused with the output embedding.

    Replaces::

        logps = token_logps(hidden, weight, targets)                          # never as [N, V] logits here
        s = torch.stack([part.mean() for part in logps.split(lengths)])
        loss = ...                                                            # of all prompts, as the objective says

    Args:
        hidden, weight, targets, bias, row_index, head, backend: as in `token_logps`; tokens are packed candidate
            after candidate, prompt after prompt.
        given: whose tokens are whose, and what the objective reads: ``RankingInputs(candidate_lengths,
            candidates_per_prompt, rewards=rewards)``. On the CPU or on hidden's device; sizes are read on the host,
            except for CLHA's kernels on the backends "triton" and, with all sizes on a GPU, "workspace".
        objective: one of `clha_fast.objectives.OBJECTIVES` (``CLHAOptions()``, ``DPOOptions()``, ...), an `Objective`
            of your own or a function of a `Group` of whole prompts that returns their loss; the last two are checked
            once to add up over prompts, and run eagerly only.
        shard: as in `token_logps`; all processes of the group give the same `given`.

    Returns:
        (loss, metrics): a scalar in nats, float32 (float64 for float64 input), and `CLHAMetrics` without a graph.
        Where no term is left the loss is exactly 0, with zero gradients.

    Raises:
        ValueError: shapes, dtypes or kinds of settings do not fit; a signal that the objective needs is missing, or one
            is given that it does not read; an objective of your own does not add up; for CPU tensors also sums that do
            not match, targets or `sft_index` out of range, rewards that are not finite.
        BackendError: the backend asked for cannot run here.
    """
    checks.settings(head)
    objective = check_adds_up(as_objective(objective))
    inputs = checks.head_inputs(hidden, weight, bias, targets, row_index)
    checks.ranking_inputs(given, targets.shape[0], objective, hidden.device)
    given = _data(given)
    names = checks.statistics(objective.wanted, head)
    scored = targets != head.ignore_index
    if shard is not None:
        # Before the collectives of the log-probabilities: a process that stops alone leaves the others waiting.
        checks.ranking_values(targets.shape[0], given, lambda: scored)
        logps, values = _sharded(inputs, head, shard, backend, names)
        return ranking_loss(logps, given, objective, scored=scored, statistics=values)
    name = _resolve(backend, inputs, head, sweep=True)
    if names and name != "reference" and (name not in SWEEPING or derivatives.transforming()):
        # What recomputes the logits takes one gradient through an operator of a loss, and two through this one.
        logps, values = token_logps(
            hidden, weight, targets, bias=bias, row_index=row_index, head=head, backend=backend, statistics=names
        )
        return ranking_loss(logps, given, objective, scored=scored, statistics=values)
    if name == "reference":
        checks.has_values(hidden)
        checks.input_values(inputs, head.ignore_index)
        logps = reference.token_logps(*inputs[:5], head)
        found = reference.token_statistics(*inputs[:5], head) if names else {}
        checks.ranking_values(targets.shape[0], given, lambda: scored)
        if type(objective) in BUILT_IN and not objective.is_watched:
            loss, sums, scores = reference.loss(logps, targets, given, head, objective, found.get("entropy"))
        else:
            ranked = RankedBatch(objective, given, scored, logps.dtype)
            loss, sums, scores = ranked.evaluate(logps, found)
        return loss, CLHAMetrics(sums, scores.detach(), names=objective.metric_names)
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in inputs[:3]]
    loss, sums, scores, *_ = ops.linear_loss(*inputs, *given, head.encoded, encode(objective), name, *needs)
    return loss, CLHAMetrics(sums, scores, names=objective.metric_names)


def _data(given: RankingInputs) -> RankingInputs:
    """Without a graph: the reference alone would follow one."""
    known = {name: value.detach() for name, value in given._asdict().items() if value is not None}
    return given._replace(**known)


def _sharded(
    inputs: HeadInputs, head: HeadOptions, shard: VocabShard, backend: Backend, names: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    from clha_fast.backends.torch import vocab_parallel

    checks.sharded_head(inputs, head, shard, backend)
    derivatives.reverse_mode_alone("token_logps")
    return vocab_parallel.token_logps(inputs, shard, head, names)


def _rank(logps: Tensor, entropies: Tensor | None, more: Mapping[str, Tensor], ranked: RankedBatch) -> tuple[Any, ...]:
    """(loss, metrics, scores, slopes)."""
    seen = {**more} if entropies is None else {**more, "entropy": entropies}
    slopes = ranked.rank(0, ranked.layout.num_prompts, logps, seen).to(logps.dtype)
    return (*ranked.finish(logps, seen), slopes)


def _rank_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _rank_gradients(ctx: Any, grad_loss: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    logps, slopes = ctx.saved_tensors
    if grad_loss is None:
        return None, None, None, None
    found = _Slopes.apply(slopes, grad_loss, logps)
    return (*found, None, None) if slopes.dim() == 2 else (found, None, None, None)


def _slopes_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The log-probabilities are an input so that a second derivative finds its refusal."""


def _no_second(ctx: Any, *grads: Any) -> NoReturn:
    derivatives.refuse_second("ranking_loss", _PLAIN)


_PLAIN = "linear_loss(..., backend='reference') has it, or write the loss in plain torch"
_Slopes = derivatives.as_function(
    "ranking_loss", lambda slopes, grad, logps: slopes * grad, _slopes_setup, _no_second, _PLAIN
)
_Rank = derivatives.as_function("ranking_loss", _rank, _rank_setup, _rank_gradients, _PLAIN)


def ranking_loss(
    logps: Tensor,
    given: RankingInputs,
    objective: Objective | Callable[[Group], Tensor] = PUBLISHED,
    *,
    scored: Tensor | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, CLHAMetrics]:
    """A loss of token log-probabilities that somebody else has computed: n-way, any objective.

    Replaces, for callers with log-probabilities of their own::

        s = torch.stack([part.mean() for part in logps.split(lengths)])
        loss = ...                                                            # of all prompts, as the objective says

    Args:
        logps: [N] nats, float32 or float64, packed candidate after candidate, prompt after prompt.
        given, objective: as in `linear_loss`; sizes are read on the host.
        scored: bool [N], tokens that count, the others' log-probabilities are not looked at. None is all of them.
        statistics: what an objective names in its `statistics` (``PolicyOptions(entropy_weight=0.01)``: the entropy),
            as `token_logps` gives them: [N] each, in the dtype of `logps`; an entropy that the objective reads with a
            graph where `logps` have one.

    Returns:
        (loss, metrics) in the dtype of `logps`; the loss has a gradient for `logps`, and for the entropy of
        `statistics` where the objective reads it; no second one.

    Raises:
        ValueError: as `linear_loss`.
    """
    objective = check_adds_up(as_objective(objective))
    checks.log_probabilities(logps, scored)
    checks.ranking_inputs(given, logps.shape[0], objective, logps.device)
    given = _data(given)
    seen = checks.token_statistics(statistics or {}, objective, logps)
    if scored is not None:
        logps = torch.where(scored, logps, 0.0)
        seen = {name: torch.where(scored, value, 0.0) for name, value in seen.items()}
    if scored is None:
        scored = torch.ones(logps.shape, dtype=torch.bool, device=logps.device)
    counted = scored
    checks.ranking_values(logps.shape[0], given, lambda: counted)
    entropies = seen.pop("entropy", None)
    ranked = RankedBatch(objective, given, scored, logps.dtype)
    # Not a dict, which torch.func takes apart.
    loss, values, scores, _ = _Rank.apply(logps, entropies, MappingProxyType(seen), ranked)
    return loss, CLHAMetrics(values, scores, names=objective.metric_names)
