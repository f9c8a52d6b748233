"""Sequence parallelism by heads (Ulysses): the tokens of rows spread over processes, whole sequences in each attention.

Process r of W holds tokens [r t, (r + 1) t) of every row, t = T / W rounded up, in all layers. Only attention looks
from one token at another: an all-to-all gives it all T tokens of H / W heads, another one brings its outputs back. Each
head computes what it would in one process, so that windows, softcaps and sinks stay exact. The log-probabilities of a
process's own tokens become those of all N by one all-reduce, from which every process computes the loss of whole rows,
whatever the objective.

Every process returns the same loss. Its gradients are those of its own tokens times W: their *mean* over the processes,
which DDP and FSDP take, is the gradient of one process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clha_fast.batching.segments import SegmentGroup, Segments, TokenSegments
from clha_fast.functional import ranking_loss
from clha_fast.models.head_loss import head_values
from clha_fast.models.heads import HeadForward
from clha_fast.models.lengths import rope_by_length
from clha_fast.models.segment_attention import UnsupportedAttentionError
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import METRIC_NAMES, CLHAMetrics
from clha_fast.ops import checks
from clha_fast.ops.dispatch import Backend
from clha_fast.options import HeadOptions
from clha_fast.types import RankingInputs

WAY = "leave sequence_parallel (a trainer's sequence_parallel_size) out to run whole rows in every process"
# By the bytes of a number.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(part: Tensor) -> Tensor:
    """Of numbers and their places, floats by their bits."""
    if part.is_floating_point():
        part = part.contiguous().view(_INTEGERS[part.itemsize])
    return (part.flatten().long() * torch.arange(1, part.numel() + 1, device=part.device)).sum()


def _checksums(tensors: Mapping[str, Tensor | None], device: torch.device) -> Tensor:
    """One of all that are there, by their names and shapes."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, tensor in tensors.items():
        if tensor is not None:
            mark = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total += mark * (1 + _checksum(tensor.detach().to(device)))
    return total


class SequenceParallel:
    """The processes that share the tokens of a batch's rows.

    Args:
        group: a process group of torch.distributed that this process is in.

    Attributes:
        size, rank: processes, and which one this is.

    Raises:
        ValueError: no such group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        ready = dist.is_available() and dist.is_initialized()
        if not ready or not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            got = f"a {type(group).__name__}" if ready else "no group at all (torch.distributed is not initialised)"
            raise ValueError(
                "sequence_parallel: expected a process group that this process is in (torch.distributed.group.WORLD is "
                f"that of all), got {got}"
            )
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        return self

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            "model: expected one without sequence_parallel to be saved whole, got one whose rows are spread over "
            f"{self.size} processes, which no file holds; save model.state_dict(), or detach first"
        )

    def check_model(self, model: nn.Module) -> None:
        """UnsupportedLayoutError for what a slice of a row's tokens does not show a model."""
        kind = rope_by_length(model)  # another one in each process
        if kind is not None:
            raise UnsupportedLayoutError(
                "sequence_parallel: expected rotary positions that do not depend on a row's length, got "
                f"rope_type {kind!r} in {type(model).__name__}; {WAY}"
            )
        config: Any = getattr(model, "config", None)
        if getattr(config, "output_router_logits", False):
            raise UnsupportedLayoutError(_ROUTER)

    def same_batch(
        self, *tensors: Tensor, mask: Tensor, more: Mapping[str, Tensor | None] = MappingProxyType({})
    ) -> None:
        """Whether all processes were given the same tensors, and rows with padding on the right alone: one all-reduce.

        Args:
            more: what processes may have or not, by name.

        Raises:
            ValueError: they were not; on every process.
        """
        sizes = torch.tensor([size for tensor in tensors for size in (tensor.dim(), *tensor.shape)])
        device = mask.device
        flat = [sizes.to(device), *(tensor.to(device).flatten() for tensor in tensors)]
        sums = [*map(_checksum, flat), *([_checksums(more, device)] if more else [])]
        left = (mask[:, 1:] > mask[:, :-1]).any().long()
        told = torch.stack([left, *sums])
        told = torch.cat([told, -told])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        most, least = told.tolist()[: len(sums) + 1], told.tolist()[len(sums) + 1 :]
        if any(a != -b for a, b in zip(most[1:], least[1:], strict=True)):
            raise ValueError(
                f"batch: expected the same one in all {self.size} processes of sequence_parallel, which share its "
                "tokens, got different ones; give each of these groups one batch, as a sampler by group does"
            )
        if most[0]:
            raise ValueError(
                "attention_mask: expected padding behind the text alone with sequence_parallel, got some before it; "
                "RankedCollator pads so"
            )

    def anywhere(self, problem: bool, device: torch.device) -> bool:
        """Whether any process has one."""
        found = torch.tensor(int(problem), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def cut(
        self,
        segments: Segments | None,
        tokens: TokenSegments | None,
        inputs: Mapping[str, Tensor],
        first: int,
    ) -> tuple[Segments, TokenSegments, dict[str, Tensor]]:
        """(segments of whole rows, and this process's slices: by token, and of the model's inputs).

        Args:
            segments, tokens, inputs: of `forward.split_segments`; rows without segments are padded on the right.
            first: as `forward.first_position`.
        """
        ids = inputs["input_ids"]
        rows, width = ids.shape
        if segments is None or tokens is None:
            segments = Segments(rows, width, tuple(SegmentGroup(row, (0, width), ()) for row in range(rows)))
            tokens = TokenSegments(*(part.to(ids.device) for part in segments.tokens()))
            inputs = {**inputs, "position_ids": tokens.position_ids + first}
        part = self._part(width)

        def mine(whole: Tensor) -> Tensor:
            return F.pad(whole, (0, self.size * part - width))[:, self.rank * part : (self.rank + 1) * part]

        found = {name: mine(value) for name, value in inputs.items()}
        return replace(segments, width=self.size * part), TokenSegments(*map(mine, tokens)), found

    def _part(self, width: int) -> int:
        return -(-max(width, 1) // self.size)

    def places(self, row_index: Tensor | None, count: int, shape: torch.Size, device: torch.device) -> list[Tensor]:
        """[which of `count` scored tokens this process has, the rows of its own hidden states that they read].

        Args:
            row_index: [count] in the flattened whole rows [B, T] of `shape`; None is all of them.
        """
        index = torch.arange(count, device=device) if row_index is None else row_index.to(device)
        width = max(shape[1], 1)
        part = self._part(width)
        row, column = index // width, index % width
        mine = (column // part == self.rank).nonzero()[:, 0]
        return [mine, row[mine] * part + column[mine] - self.rank * part]

    def to_heads(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All tokens of this process's heads, of [B, heads, its tokens, size]; and of a logit a head.

        Keys and values of fewer heads than processes are repeated as often as it takes.

        Raises:
            UnsupportedAttentionError: heads that cannot be divided. `name`: the layer's class.
        """
        heads, groups = query.shape[1], key.shape[1]
        if heads % self.size:
            right = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise UnsupportedAttentionError(
                f"sequence_parallel: expected a number of processes that divides the {heads} attention heads of {name} "
                f"({right}), got {self.size}"
            )
        repeat = math.lcm(groups, self.size) // groups
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        if sinks is not None:
            sinks = sinks.chunk(self.size)[self.rank]
        query, key, value = _Exchange.apply(self.group, 1, 2, query, key, value)
        return query, key, value, sinks

    def to_tokens(self, out: Tensor) -> Tensor:
        """This process's tokens of all heads, of [B, its heads, tokens, size]."""
        (found,) = _Exchange.apply(self.group, 2, 1, out)
        return found


_ROUTER = (
    "output_router_logits: expected False with sequence_parallel (a router's auxiliary loss is no sum over tokens, "
    f"which are spread), got True; {WAY}"
)


def check_no_router(sequence: SequenceParallel | None, auxiliary: Tensor | None) -> None:
    """UnsupportedLayoutError for an auxiliary loss of a slice of the tokens."""
    if sequence is not None and auxiliary is not None:
        raise UnsupportedLayoutError(_ROUTER)


def spread_values(
    sequence: SequenceParallel,
    shape: torch.Size,
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
    """`head_loss.head_values` [1 + S, N] of all scored tokens, where `hidden` is of this process's own.

    Args:
        shape: [B, T] of the whole rows.
    """
    mine, rows = sequence.places(row_index, len(targets), shape, hidden.device)
    each = None if temperature is None else temperature[mine]
    settings: dict[str, Any] = {"head": head, "backend": backend, "statistics": statistics, "temperature": each}
    values = head_values(hidden, weight, bias, targets.to(hidden.device)[mine], rows, **settings)
    found: Tensor = _Whole.apply(values, mine, len(targets), sequence)
    return found


def spread_loss(
    sequence: SequenceParallel,
    shape: torch.Size,
    hidden: Tensor,
    weight: Tensor | HeadForward,
    bias: Tensor | None,
    tensors: Mapping[str, Tensor | None],
    *,
    head: HeadOptions,
    objective: Objective,
    backend: Backend = "auto",
) -> tuple[Tensor, CLHAMetrics]:
    """`head_loss.head_loss` of whole rows, where `hidden` is of this process's own tokens."""
    targets = tensors["targets"]
    assert targets is not None
    targets = targets.to(hidden.device)
    given = RankingInputs(**{name: tensors.get(name) for name in RankingInputs._fields})  # type: ignore[arg-type]
    # Before the collectives: a process that stops alone leaves the others waiting.
    checks.ranking_inputs(given, targets.shape[0], objective, hidden.device)
    checks.ranking_values(targets.shape[0], given, lambda: targets != head.ignore_index)
    names = checks.statistics(objective.wanted, head)
    settings: dict[str, Any] = {"head": head, "backend": backend, "statistics": names}
    logps, *others = spread_values(sequence, shape, hidden, weight, bias, targets, tensors.get("row_index"), **settings)
    scored = targets != head.ignore_index
    loss, metrics = ranking_loss(
        logps, given, objective, scored=scored, statistics=dict(zip(names, others, strict=True))
    )
    if head.max_dropped_mass is not None:
        metrics.values[METRIC_NAMES.index("dropped_mass")] = torch.nan  # each process knows of its own tokens alone
    return loss, metrics


class _Whole(torch.autograd.Function):
    """[S, N] of every process's own columns; the gradient of its own ones comes back W times."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mine: Tensor, count: int, sequence: SequenceParallel) -> Tensor:
        ctx.save_for_backward(mine)
        ctx.size = sequence.size
        whole = values.new_zeros(values.shape[0], count)
        whole[:, mine] = values
        if whole.numel():
            dist.all_reduce(whole, group=sequence.group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (mine,) = ctx.saved_tensors
        return grad[:, mine] * ctx.size, None, None, None


class _Exchange(torch.autograd.Function):
    """Tensors split along one dimension, a part for each process, and joined along another, in one all-to-all.

    One, not one a tensor: in what order autograd would take several is nothing to rely on.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, split: int, join: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.settings = group, split, join
        return _exchange(group, split, join, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, split, join = ctx.settings
        return (None, None, None, *_exchange(group, join, split, grads))


def _exchange(group: dist.ProcessGroup, split: int, join: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    size = dist.get_world_size(group)
    parts = [torch.stack(tensor.chunk(size, split)) for tensor in tensors]
    forms = [(part.shape, part.dtype, part[0].numel() * part.element_size()) for part in parts]
    # As bytes: rotation may leave queries and keys in another dtype than values.
    sent = torch.cat([part.flatten(1).view(torch.uint8) for part in parts], 1)
    del parts
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    del sent
    pieces = got.split([length for *_, length in forms], 1)
    return tuple(
        torch.cat(piece.clone(memory_format=torch.contiguous_format).view(dtype).view(shape).unbind(), join)
        for piece, (shape, dtype, _) in zip(pieces, forms, strict=True)
    )
