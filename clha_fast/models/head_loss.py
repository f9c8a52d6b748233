"""What stands in the output embedding's call, a loss or log-probabilities: its weight whole, spread, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from clha_fast.functional import linear_loss, token_logps
from clha_fast.models.embedding import head_name
from clha_fast.models.heads import HeadForward
from clha_fast.models.own_forward import check_backend, token_statistics
from clha_fast.models.own_forward import head_loss as own_forward_loss
from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.ops.dispatch import Backend
from clha_fast.options import HeadOptions
from clha_fast.types import RankingInputs, VocabShard


def head_loss(
    hidden: Tensor,
    weight: Tensor | HeadForward,
    bias: Tensor | None,
    tensors: Mapping[str, Tensor | None],
    *,
    head: HeadOptions,
    objective: Objective,
    backend: Backend = "auto",
) -> tuple[Tensor, CLHAMetrics]:
    """`functional.linear_loss` on what `heads.fused_head` hands to its `compute`.

    Args:
        hidden: [B * T, H]. weight: [V, H], plain, or a DTensor that is replicated or has its rows sharded over one
            mesh dimension (a column-parallel head); hidden may be a DTensor with it. A `HeadForward` is called a
            chunk of tokens at a time, see `own_forward`. bias: [V] or None.
        tensors: `CandidateBatch.loss_inputs()`, and the counts of a larger batch if given.
        backend: a sharded head is computed in torch; "auto" and "torch" take it. A `HeadForward` is taken by "auto",
            and by "reference", which forms all of its logits at once.

    Raises:
        ValueError: the weight is laid out in another way, or `backend` names one that has no sharded form.
        BackendError: `backend` names one that cannot call a `HeadForward`.
    """
    targets, row_index = tensors["targets"], tensors.get("row_index")
    assert targets is not None
    given = RankingInputs(**{name: tensors.get(name) for name in RankingInputs._fields})  # type: ignore[arg-type]
    settings: dict[str, Any] = {"head": head, "objective": objective}
    if isinstance(weight, HeadForward):
        _check_plain(hidden, weight)
        return own_forward_loss(hidden, weight, bias, targets, row_index, given, backend=backend, **settings)
    hidden, rows, bias, shard = _local(hidden, weight, bias)
    settings |= {"given": given, "row_index": row_index, "backend": backend}
    return linear_loss(hidden, rows, targets, bias=bias, shard=shard, **settings)


def head_values(
    hidden: Tensor,
    weight: Tensor | HeadForward,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None,
    *,
    temperature: Tensor | None = None,
    head: HeadOptions,
    backend: Backend = "auto",
    statistics: Sequence[str] = (),
) -> Tensor:
    """[1 + S, N] of what `functional.token_logps` gives, in the place of `head_loss`; arguments and errors as there."""
    settings: dict[str, Any] = {"row_index": row_index, "temperature": temperature, "head": head}
    if isinstance(weight, HeadForward):
        _check_plain(hidden, weight)
        check_backend(backend, weight)
        settings["in_chunks"] = backend != "reference"
        logps, values = token_statistics(hidden, weight, targets, tuple(statistics), bias, **settings)
    else:
        hidden, rows, bias, shard = _local(hidden, weight, bias)
        settings |= {"shard": shard, "backend": backend}
        logps, values = token_logps(hidden, rows, targets, bias=bias, statistics=statistics, **settings)
    return torch.stack([logps, *(values[name] for name in statistics)])


def _check_plain(hidden: Tensor, weight: HeadForward) -> None:
    if isinstance(hidden, DTensor):
        raise ValueError(
            f"hidden: expected a plain tensor before {head_name(weight.module)}, got {hidden.placements} "
            "(adapters on a tensor-parallel head are not computed)"
        )


def _local(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """(hidden, this process's rows of the weight, their bias, where they lie), all plain tensors."""
    if not isinstance(weight, DTensor):
        return hidden, weight, bias, None
    shard = _shard_of(weight, reduce_hidden=not isinstance(hidden, DTensor))
    if isinstance(hidden, DTensor):
        if tuple(hidden.placements) != (Replicate(),):
            raise ValueError(f"hidden: expected a replicated DTensor before the head, got {hidden.placements}")
        # What is not added up here is a partial sum, and DTensor's own backward adds those up.
        hidden = hidden.to_local(grad_placements=[Replicate() if shard is None else Partial()])
    rows = weight.to_local()
    if isinstance(bias, DTensor):
        if tuple(bias.placements) != tuple(weight.placements):
            raise ValueError(f"bias: expected the weight's placement {weight.placements}, got {bias.placements}")
        bias = bias.to_local()
    elif bias is not None and shard is not None:
        if bias.requires_grad:
            raise ValueError(
                "bias: expected one that is sharded as the weight is, or not trained, got a whole one that is: each "
                "process would have the gradient of its own rows only"
            )
        bias = bias[shard.start : shard.start + rows.shape[0]]
    return hidden, rows, bias, shard


def _shard_of(weight: DTensor, reduce_hidden: bool) -> VocabShard | None:
    """Where this process's rows lie; None where it holds them all."""
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if placements == (Replicate(),):
        return None
    if placements != (Shard(0),):
        raise ValueError(
            f"weight: expected an output embedding that is replicated or sharded by rows over one mesh dimension, "
            f"got {placements} on a mesh of {mesh.ndim} dimension(s)"
        )
    size, processes = weight.shape[0], mesh.size()
    share = -(-size // processes)  # as torch.chunk splits
    if share * (processes - 1) >= size:  # on every process: others would wait for the one that has none
        raise ValueError(
            f"weight: expected rows of the output embedding on each of {processes} processes, got {size} in shares of "
            f"{share}, which leave the last without any; take fewer processes, or more words (resize_token_embeddings)"
        )
    start = mesh.get_local_rank() * share
    return VocabShard(start, size, mesh.get_group(), reduce_hidden)
