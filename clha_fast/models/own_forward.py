"""Heads that are more than one weight (adapters, quantised weights): their own forward, a chunk of tokens at a time.

The logits of a bounded chunk of scored tokens come from the head itself, become log-probabilities and are forgotten;
the backward computes them again. So every parameter of the head has the gradient that full logits would give it, for
the price of a second forward of the head and of autograd's memory for one chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clha_fast.errors import BackendError
from clha_fast.functional import ranking_loss
from clha_fast.models.embedding import UnsupportedHeadError, head_name
from clha_fast.models.heads import HeadForward
from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.ops import checks
from clha_fast.ops.dispatch import _say_once
from clha_fast.options import HeadOptions
from clha_fast.types import HeadInputs, RankingInputs

_MIN_WORKSPACE = 64 * 2**20


def check_backend(backend: str, head: HeadForward) -> None:
    """BackendError where a backend was named that reads the head's weight: a named backend never falls back."""
    name = head_name(head.module)
    if backend not in ("auto", "reference"):
        raise BackendError(
            f"backend {backend!r} cannot run on the output embedding {name}: {head.reason}; backend 'auto' calls its "
            "own forward in chunks of tokens"
        )
    if backend == "auto" and not torch.compiler.is_compiling():
        _say_once(f"backend auto: the own forward of {name} in chunks of tokens ({head.reason})")


def token_statistics(
    hidden: Tensor,
    forward: HeadForward,
    targets: Tensor,
    names: tuple[str, ...],
    bias: Tensor | None = None,
    row_index: Tensor | None = None,
    head: HeadOptions = HeadOptions(),  # noqa: B008 - frozen
    in_chunks: bool = True,
    temperature: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`functional.token_logps` with a head that is a function: log-probabilities, and of the same logits what is named.

    Replaces::

        logits = forward(hidden[row_index]).float() + bias                # then scale, softcap, temperature
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    Args:
        hidden: [M, H]. forward: from `heads.inspect_head(own_forward=True)`. targets: [N] int64. names: of
            `types.STATISTICS`. bias: [V], added behind the head, or None. row_index: [N] int64 or None. head: as in
            `functional.token_logps`; `workspace_bytes` bounds what a chunk's logits and their gradients take together.
        in_chunks: False forms all logits at once. temperature: [N], each token's in the place of the head's, or None.

    Returns:
        [N] nats, float32 (float64 for float64 logits), with a graph to `hidden` and to all that the head reads, and
        each statistic, [N]. Dropout in the head is drawn chunk by chunk, and the same in the backward.

    Raises:
        ValueError: on CPU tensors, targets or row indices out of range.
        UnsupportedHeadError: a gradient is needed, and the head has none for its input.
    """
    if temperature is not None:
        temperature = temperature.to(_wide(hidden.dtype))
    inputs = HeadInputs(hidden, hidden, bias, targets, row_index, temperature)  # the weight's place is not looked at
    checks.input_values(inputs, head.ignore_index, vocabulary=forward.vocab_size)
    if head.max_dropped_mass is not None:
        raise ValueError(
            f"max_dropped_mass: expected None for {head_name(forward.module)}, whose own forward is called, "
            f"got {head.max_dropped_mass}"
        )
    training = torch.is_grad_enabled()
    if training and hidden.requires_grad and not forward.differentiable:
        raise UnsupportedHeadError(
            f"model: expected a head with a gradient for its input, got {head_name(forward.module)}, which is "
            "made for inference alone; score with it under torch.no_grad(), or train with a head that has one"
        )
    spread = any(hasattr(parameter, "ds_id") for parameter in forward.module.parameters())
    if in_chunks and spread and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedHeadError(
            f"model: expected a head whose weights are whole where it runs, got {head_name(forward.module)} under "
            "ZeRO-3, which fetches them call by call while processes have different numbers of chunks; use ZeRO-2 or "
            "FSDP2, backend='reference' (all logits at once), or leave the head without an adapter"
        )
    rows = hidden if row_index is None else hidden[row_index]
    count = rows.shape[0]
    if count == 0:
        # One row goes through, so that whatever the head reads has a gradient (of zeros), and so does the bias.
        nothing = forward(hidden[:1]).flatten()[:0].to(_wide(hidden.dtype))
        nothing = nothing if bias is None else nothing + bias[:0]
        return nothing, dict.fromkeys(names, nothing)
    # Logits, their log-softmax, its gradient and theirs; a softcap keeps one more.
    row_bytes = forward.vocab_size * (4 if head.softcap is None else 5) * _wide(hidden.dtype).itemsize
    budget = head.workspace_bytes or max(_MIN_WORKSPACE, forward.vocab_size * hidden.shape[1])
    size = max(1, budget // row_bytes) if in_chunks else count
    pieces = rows.split(size), targets.split(size)
    divisors = [None] * len(pieces[0]) if temperature is None else temperature.split(size)
    parts = []
    for part, goals, divisor in zip(*pieces, divisors, strict=True):
        if training and in_chunks:
            parts.append(checkpoint(_chunk, forward, part, goals, bias, head, names, divisor, use_reentrant=False))
        else:
            parts.append(_chunk(forward, part, goals, bias, head, names, divisor))
    logps, *values = torch.cat(parts, 1)
    return logps, dict(zip(names, values, strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk(
    forward: HeadForward,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: HeadOptions,
    names: tuple[str, ...],
    temperature: Tensor | None,
) -> Tensor:
    """Log-probabilities and what is named [1 + names, n]."""
    z = forward(rows)
    z = z.to(_wide(z.dtype))
    if bias is not None:
        z = z + bias
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    if temperature is not None:
        z = z / temperature.to(z.dtype)[:, None]
    elif head.temperature != 1.0:
        z = z / head.temperature
    scored = targets != head.ignore_index
    # Checked before on a CPU; on a GPU such a target makes its token NaN without a wait, as in the kernels.
    valid = (targets >= 0) & (targets < z.shape[1])
    log_p = z.log_softmax(-1)
    chosen = log_p.gather(1, torch.where(valid, targets, 0).unsqueeze(1)).squeeze(1)
    made = [chosen, *(_MADE[name](z, log_p, chosen) for name in names)]
    return torch.stack([torch.where(scored, torch.where(valid, value, torch.nan), 0.0) for value in made])


# Of logits, their log-softmax and that of the targets; words that cannot come (-inf) have no share, and no slope.
_MADE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": lambda z, log_p, chosen: -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1),
    "sum_sq_probs": lambda z, log_p, chosen: log_p.detach().exp().square().sum(-1),
    "mean_logit": lambda z, log_p, chosen: z.detach().mean(-1),
    "is_top1": lambda z, log_p, chosen: torch.where(chosen.isnan(), chosen.detach(), chosen >= log_p.amax(-1)),
}


def head_loss(
    hidden: Tensor,
    forward: HeadForward,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    given: RankingInputs,
    *,
    head: HeadOptions,
    objective: Objective,
    backend: str = "auto",
) -> tuple[Tensor, CLHAMetrics]:
    """`functional.linear_loss` with a head that is a function.

    Raises:
        BackendError: `backend` is neither "auto" nor "reference" (which forms all logits at once).
        ValueError, UnsupportedHeadError: as `token_statistics` and `functional.linear_loss`.
    """
    check_backend(backend, forward)
    logps, values = token_statistics(
        hidden, forward, targets, objective.wanted, bias, row_index, head, in_chunks=backend != "reference"
    )
    return ranking_loss(logps, given, objective, scored=targets != head.ignore_index, statistics=values)
