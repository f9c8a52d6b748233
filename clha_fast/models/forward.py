"""The way from a batch of candidates through a model to a loss or log-probabilities: for loops, trainer and scoring."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from clha_fast.batching.batch import inert_mask
from clha_fast.batching.segments import TOKEN_SEGMENTS, Segments, TokenSegments
from clha_fast.models.embedding import UnsupportedHeadError, input_embedding_weight, output_embedding
from clha_fast.models.head_loss import head_loss, head_values
from clha_fast.models.heads import (
    FusedHead,
    HeadCompute,
    HeadForward,
    HeadInfo,
    cache_flags,
    fused_head,
    replaced_head,
)
from clha_fast.models.hooks import through_hooks
from clha_fast.models.router import auxiliary_coefficient
from clha_fast.models.segment_masks import IN_TWO_CALLS, UnsupportedLayoutError, segmented
from clha_fast.models.sequence_parallel import SequenceParallel, check_no_router, spread_loss, spread_values
from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import CLHAMetrics, metric_names
from clha_fast.ops.dispatch import Backend
from clha_fast.options import HeadOptions, is_number
from clha_fast.types import COUNTS, SIGNALS

MODEL_FIELDS = ("input_ids", "attention_mask")
SEGMENT_FIELDS = ("segments", *TOKEN_SEGMENTS)


def check_wide(batch: Mapping[str, Any]) -> None:
    """ValueError for numbers of a batch that have 16 bits: whoever cast them has rounded them, and made ties."""
    for name in ("rewards", *SIGNALS, *COUNTS):
        given = batch.get(name)
        if isinstance(given, Tensor) and given.is_floating_point() and given.itemsize < 4:
            raise ValueError(
                f"{name}: expected float32 or float64, got {given.dtype}; a wrapper that casts its inputs rounds them "
                "(FSDP2: MixedPrecisionPolicy(..., cast_forward_inputs=False); Lightning Fabric: precision='32-true'), "
                f"and what comes in 16 bits from the data is {name}.float()"
            )


def check_dropped(batch: Mapping[str, Any], objective: Objective) -> None:
    """A collator drops what its own objective does not need; ValueError where this one does.

    Reads the batch on the host only where the two differ.

    Args:
        batch: fields of a `CandidateBatch`.
    """
    dropped_for = batch.get("inert_for")
    if not dropped_for or dropped_for == objective.encoded or torch.compiler.is_compiling():
        return
    rewards, target = (None if batch.get(name) is None else batch[name].cpu() for name in ("rewards", "sft_index"))
    inert = inert_mask(rewards, batch["candidates_per_prompt"].cpu(), target, objective)
    needed = (batch["candidate_lengths"].cpu() == 0) & ~inert
    if needed.any():
        dropper = dropped_for.partition(" ")[0]
        raise ValueError(
            f"batch: expected only candidates dropped that the objective {objective.name!r} does not depend on, "
            f"got candidate {int(needed.nonzero()[0])} without tokens, which a collator dropped for {dropper!r}; "
            "give RankedCollator the same objective, or drop_inert=False"
        )


def checked_scale(scale: Any) -> Any:
    """`loss_scale` as it was given; looked at on the host only where that waits for no GPU."""
    if scale is None or torch.compiler.is_compiling():
        return scale
    number = is_number(scale)
    if not number and not (isinstance(scale, Tensor) and scale.dim() == 0):
        got = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(f"loss_scale: expected one number, as Attached.counts gives it, got {got}")
    if (number or scale.device.type == "cpu") and not 0 <= float(scale) < math.inf:
        raise ValueError(f"loss_scale: expected a finite number of at least 0, got {float(scale)}")
    return scale


class Scored(NamedTuple):
    """loss: a scalar in nats, with a graph and the auxiliary loss in it; auxiliary: a mixture of experts' own."""

    loss: Tensor
    metrics: CLHAMetrics
    auxiliary: Tensor | None


def _first_row(model: nn.Module) -> int:
    """The row of a table of positions that a text begins with: behind the one of padding, in RoBERTa's kind."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def first_position(model: nn.Module) -> int | None:
    """What a text's positions begin with, None for a model that is told none."""
    takes = inspect.signature(type(model).forward).parameters
    # Some hand what they do not name to the model inside; whether it arrives shows when the layout is probed.
    handed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    return _first_row(model) if "position_ids" in takes or handed_on else None


def split_segments(
    inputs: Mapping[str, Any], first: int | None
) -> tuple[Segments | None, TokenSegments | None, Mapping[str, Any]]:
    """What says which tokens see which, and the rest, which a model's forward takes; `first` is `first_position`."""
    segments = inputs.get("segments")
    if segments is None:
        return None, None, inputs
    tokens = TokenSegments(*(inputs[name] for name in TOKEN_SEGMENTS))
    rest = {name: inputs[name] for name in MODEL_FIELDS}
    if first is not None:
        rest["position_ids"] = tokens.position_ids + first
    return segments, tokens, rest


class _Forward:
    """A model whose head, as measured, gives place to a function of what the head reads.

    Args:
        model: the unwrapped model, its embeddings whole. info: from `measure.measure_head`.
        sequence: the processes over which the tokens of rows are spread, or None.
    """

    def __init__(self, model: nn.Module, info: HeadInfo, sequence: SequenceParallel | None = None) -> None:
        self.model, self.info, self.sequence = model, info, sequence
        self._flags = cache_flags(model)
        self._first_position = first_position(model)
        self._embeddings = input_embedding_weight(model).shape[0]

    def _run(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Any],
        targets: Tensor | None,
        compute: HeadCompute,
        others: Mapping[str, Any] | None = None,
        wrapped: bool = True,
        tensors: Mapping[str, Tensor | None] = MappingProxyType({}),
    ) -> tuple[Any, FusedHead]:
        """(the model's output, the head with what `compute` returned) of one forward of `run`.

        tensors: what `compute` reads.
        """
        self._check(inputs["input_ids"], targets)
        if not inputs["input_ids"].numel():  # a model must run, on every process
            inputs = {name: tensor.new_ones(1, 1) for name, tensor in inputs.items()}
        place = fused_head if wrapped else replaced_head
        segments, tokens, inputs = split_segments(inputs, self._first_position)
        two_calls = not torch.compiler.is_compiling() and self.model in IN_TWO_CALLS
        if self.sequence is not None:
            if not two_calls or self._first_position is None:
                what = (
                    "a compiled one" if torch.compiler.is_compiling() else "a copy of one, or one attached anew since"
                )
                raise UnsupportedLayoutError(
                    f"sequence_parallel: expected the model that was attached with it, run eagerly, got {what}; attach "
                    "this one"
                )
            scored = [] if targets is None else [targets]
            self.sequence.same_batch(inputs["input_ids"], *scored, mask=inputs["attention_mask"], more=tensors)
            segments, tokens, inputs = self.sequence.cut(segments, tokens, inputs, self._first_position)
        with (
            place(self.model, compute, self.info) as fused,
            through_hooks(self.info, fused),
            segmented(segments, tokens, two_calls, self.sequence),
        ):
            output = run(**inputs, **(others or {}), **self._flags)
        if not fused.called:
            raise UnsupportedHeadError(f"model: expected {type(self.model).__name__} to call its head, it did not")
        return output, fused

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Rows of the input embedding, and tokens that the head scores."""
        return self._embeddings, self.info.vocab_size

    @property
    def last(self) -> nn.Module:
        """The head."""
        return self.info.module

    def _check(self, input_ids: Tensor, targets: Tensor | None) -> None:
        head: Any = output_embedding(self.model)
        while isinstance(head, FullyShardedDataParallel):  # a wrapper's policy may have taken it for itself
            head = head.module
        if head is not self.info.module:
            raise UnsupportedHeadError(
                "model: expected the output embedding that was there when it was attached, got another one (an adapter "
                "on the head, or another one active?); detach, change the head and attach again"
            )
        if torch.compiler.is_compiling():
            return
        # On CPU tensors: a GPU would have to be waited for.
        sizes = (("input_ids", input_ids, self._embeddings), ("targets", targets, self.info.vocab_size))
        for name, ids, rows in sizes:
            if ids is not None and ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= rows:
                where = "input" if name == "input_ids" else "output"
                raise ValueError(
                    f"{name}: expected tokens below the {rows} rows of the model's {where} embedding, got "
                    f"{int(ids.max())}; is the tokenizer larger than the model? "
                    "(model.resize_token_embeddings(len(tokenizer)), then attach)"
                )


def _beside(hidden: Tensor, tensors: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
    """`tensors` on the head's device, where a device_map has put it on another than the batch's."""
    targets = tensors["targets"]
    if targets is None or targets.device == hidden.device:
        return tensors
    return {name: None if t is None else t.to(hidden.device) for name, t in tensors.items()}


class CandidateForward(_Forward):
    """A model whose head, as measured, gives place to a loss.

    Args:
        model, info: the unwrapped model, its embeddings whole; from `measure.measure_head`.
        head, objective, backend: as `functional.linear_loss` takes them. sequence: as `_Forward`.
    """

    def __init__(
        self,
        model: nn.Module,
        info: HeadInfo,
        head: HeadOptions,
        objective: Objective,
        backend: Backend,
        sequence: SequenceParallel | None = None,
    ) -> None:
        super().__init__(model, info, sequence)
        self.head, self.objective, self.backend = head, objective, backend

    def __call__(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Any],
        tensors: Mapping[str, Tensor | None],
        *,
        scale: Tensor | float = 1,
        others: Mapping[str, Any] | None = None,
        wrapped: bool = True,
    ) -> Scored:
        """One forward of `run`, which is the model or a wrapper around it.

        Args:
            inputs: `CandidateBatch.model_inputs()`.
            tensors: `CandidateBatch.loss_inputs()` and, where given, the counts of a step.
            scale: multiplies the loss, not the auxiliary loss nor the metrics. others: more arguments for `run`.
            wrapped: whether wrappers stand between `run` and the model, which hang hooks of theirs on the model's
                output; False leaves the model's forward alone.

        Raises:
            ValueError: tokens beyond the model's embeddings; as `functional.linear_loss`.
            UnsupportedHeadError: the head, or hooks on it, are not those that were measured.
        """

        def compute(hidden: Tensor, weight: Tensor | HeadForward, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            sizes = tensors["candidates_per_prompt"]
            if sizes is not None and sizes.shape[0] == 0:
                return self._no_prompts(hidden, weight, bias)
            settings: dict[str, Any] = {"head": self.head, "objective": self.objective, "backend": self.backend}
            if self.sequence is None:
                loss, metrics = head_loss(hidden, weight, bias, _beside(hidden, tensors), **settings)
            else:
                shape = inputs["input_ids"].shape
                loss, metrics = spread_loss(self.sequence, shape, hidden, weight, bias, tensors, **settings)
            return loss, metrics.values, metrics.scores

        output, fused = self._run(run, inputs, tensors["targets"], compute, others, wrapped, tensors)
        loss, values, scores = fused.result
        if fused.in_output:  # a wrapper may have put a node of its own behind it
            loss = output.logits
        if isinstance(scale, Tensor):
            loss = loss * scale.to(loss)
        elif scale != 1:
            loss = loss * scale
        auxiliary = getattr(output, "aux_loss", None)  # a mixture of experts that was asked for router logits
        check_no_router(self.sequence, auxiliary)
        if auxiliary is not None:
            loss = loss + auxiliary_coefficient(self.model) * auxiliary.to(loss.device)
        return Scored(loss, CLHAMetrics(values, scores, names=self.objective.metric_names), auxiliary)

    def _no_prompts(
        self, hidden: Tensor, weight: Tensor | HeadForward, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss 0 whose gradients are zeros for all that the head reads, and metrics of nothing."""
        if isinstance(weight, HeadForward):
            weight = weight(hidden[:1])
        local = [t.to_local() if isinstance(t, DTensor) else t for t in (hidden, weight, bias) if t is not None]
        zero = sum((t[:0].sum() for t in local), start=torch.zeros((), dtype=torch.float32, device=hidden.device))
        metrics = zero.new_zeros(len(metric_names(self.objective)), dtype=torch.float32)
        return zero, metrics, zero.new_zeros(0)


class LogpForward(_Forward):
    """A model whose head, as measured, gives place to the log-probabilities of the target tokens.

    Args:
        model, info, head, backend, sequence: as `CandidateForward`; `max_dropped_mass`, a matter of gradients, plays no
            part.
    """

    values, unit = "log-probabilities", "nats"

    def __init__(
        self,
        model: nn.Module,
        info: HeadInfo,
        head: HeadOptions,
        backend: Backend,
        sequence: SequenceParallel | None = None,
    ) -> None:
        super().__init__(model, info, sequence)
        self.head, self.backend = head.replace(max_dropped_mass=None), backend

    def alone(self) -> LogpForward:
        """The same of whole rows."""
        return LogpForward(self.model, self.info, self.head, self.backend)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """`with_graph` without a graph."""
        return self.with_graph(*args, **kwargs)

    def with_graph(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Any],
        targets: Tensor,
        row_index: Tensor | None,
        *,
        wrapped: bool = True,
    ) -> Tensor:
        """[N] nats, float32 or better, without the logits; arguments as `CandidateForward`.

        Dropout is as the model's mode has it.

        Raises:
            ValueError, UnsupportedHeadError: as `CandidateForward`.
        """
        return self.scored(run, inputs, targets, row_index, wrapped=wrapped)[0][0]

    def scored(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Any],
        targets: Tensor,
        row_index: Tensor | None,
        *,
        temperature: Tensor | None = None,
        statistics: Sequence[str] = (),
        others: Mapping[str, Any] | None = None,
        wrapped: bool = True,
    ) -> tuple[Tensor, Any]:
        """(log-probabilities and `statistics` [1 + S, N], on the head's device; the model's output).

        With a graph where gradients are on: one tensor, which wrappers that hang hooks on the output see whole.
        """
        settings: dict[str, Any] = {"head": self.head, "backend": self.backend, "statistics": statistics}

        def compute(hidden: Tensor, weight: Tensor | HeadForward, bias: Tensor | None) -> tuple[Tensor, ...]:
            goals = targets.to(hidden.device)
            rows = None if row_index is None else row_index.to(hidden.device)
            each = None if temperature is None else temperature.to(hidden.device)
            if self.sequence is not None:
                given = self.sequence, inputs["input_ids"].shape, hidden, weight, bias, goals, rows
                return (spread_values(*given, temperature=each, **settings),)
            return (head_values(hidden, weight, bias, goals, rows, temperature=each, **settings),)

        output, fused = self._run(run, inputs, targets, compute, others, wrapped)
        return (output.logits if fused.in_output else fused.result[0]), output
