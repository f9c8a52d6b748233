"""One line in anyone's loop: a model that takes a batch of candidates and returns the loss and its metrics."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import ModelOutput

from clha_fast.batching.batch import CandidateBatch, HostSizes, check_chains
from clha_fast.batching.segments import check_layout
from clha_fast.batching.totals import SCALARS, local_counts, step_counts
from clha_fast.models import switch
from clha_fast.models.forward import (
    MODEL_FIELDS,
    SEGMENT_FIELDS,
    CandidateForward,
    LogpForward,
    check_dropped,
    check_wide,
    checked_scale,
)
from clha_fast.models.heads import HeadInfo
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.measure import measure_head
from clha_fast.models.positions import RowLimit
from clha_fast.models.sequence_parallel import SequenceParallel
from clha_fast.models.tiled import tile_mlps, untile
from clha_fast.models.wrapped import DATA_PARALLEL, STATE, check_calls_what_it_wraps, check_whole, is_attached, unwrap
from clha_fast.objectives import Group, Objective, as_objective
from clha_fast.objectives.additive import check_adds_up
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.ops.dispatch import Backend, check_name
from clha_fast.options import HeadOptions
from clha_fast.types import RankingInputs

_LOSS_FIELDS = ("targets", "row_index", *RankingInputs._fields)
_UNUSED = {
    "labels": "its targets are scored",
    "use_cache": "no cache is kept",
    "logits_to_keep": "its row_index says which rows are scored",
    "output_hidden_states": "its output is a loss and metrics",
    "output_attentions": "its output is a loss and metrics",
}
_NEEDED = (*MODEL_FIELDS, "targets", "row_index", "candidate_lengths", "candidates_per_prompt")
# Trainer may add the number of items to what a model with **kwargs gets; the loss does not divide by tokens.
_OWN_FIELDS = {
    *(*MODEL_FIELDS, *_LOSS_FIELDS, "loss_scale", "num_inert", "inert_for", "chains", "host_sizes"),
    "num_items_in_batch",
}
# Fields of packed and shared rows that mean nothing else.
_OF_ROWS = tuple(name for name in SEGMENT_FIELDS if name != "position_ids")
# What only a batch of candidates has: with it in the call the loss is computed, without it the model is itself.
_MARK = "candidate_lengths"


@dataclass
class CLHAOutput(ModelOutput):
    """What an attached model returns for a batch of candidates.

    Attributes:
        loss: scalar in nats, with a graph; a mixture of experts' auxiliary loss is in it, with its coefficient.
        metrics: `CLHAMetrics` of this call.
        aux_loss: the auxiliary loss without its coefficient, where the model computes one.
    """

    loss: Tensor | None = None
    metrics: CLHAMetrics | None = None
    aux_loss: Tensor | None = None

    @property
    def scores(self) -> Tensor | None:
        """[C] s_i = S_i / |y_i| of every candidate of the batch, float32, nats a token, without a graph (Eq. 3).

        One that was dropped before the model ran (`RankedCollator(drop_inert=False)` drops none) is not among them.
        """
        return None if self.metrics is None else self.metrics.scores


class Attached:
    """The settings that `attach` put on a model; a context manager that detaches at its end.

    Attributes:
        model: the unwrapped one. info: its head as measured. options, backend: as given. tiled: MLPs that run in tiles.
        layout: `padded`, `packed`, `shared` or `auto`, for `RankedCollator`: rows that the model was seen to compute.
    """

    def __init__(
        self,
        model: nn.Module,
        info: HeadInfo,
        options: Objective,
        backend: Backend,
        layout: str,
        head: HeadOptions,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.info, self.options, self.backend = model, info, options, backend
        self.head_options, sequence = head, None if group is None else SequenceParallel(group)
        self._forward = CandidateForward(model, info, head, options, backend, sequence)
        self._logps = LogpForward(model, info, head, backend, sequence)
        self._row_limit = RowLimit(model)
        # A forward that something else has put on the instance; None is the class's own.
        self._previous: Callable[..., Any] | None = vars(model).get("forward")
        self._layouts = RowLayouts(model, self._logps, self.ordinary)
        self._layouts.settle(layout)
        self.tiled: list[nn.Module] = []

    @property
    def layout(self) -> str:
        return self._layouts.layout

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> nn.Module:
        """Makes the model itself again and returns it; a second call does nothing.

        Raises:
            ValueError: something else has replaced the model's forward since.
        """
        model = self.model
        if vars(model).get(STATE) is not self:
            return model
        if not is_attached(vars(model).get("forward")):
            raise ValueError(
                "model: expected the forward that attach put there, got another one over it; undo that first "
                "(accelerate: unwrap_model(model, keep_fp32_wrapper=False))"
            )
        for name in (STATE, "forward", *_METHODS):
            delattr(model, name)
        if self._previous is not None:
            model.forward = self._previous
        switch.remove(self.info.module)
        untile(self.tiled)
        return model

    def counts(
        self,
        batches: Sequence[Mapping[str, Any] | CandidateBatch],
        *,
        group: dist.ProcessGroup | None = None,
        losses: int | None = None,
    ) -> dict[str, Tensor]:
        """What the loss divides by, over all micro-batches of an optimiser step and all processes of `group`.

        Pass the result with each of the micro-batches, ``model(**batch, **counts)``: the mean of the losses over
        `batches` and processes is then the loss of the one large batch, however it was split. That is the mean that
        data-parallel wrappers and loops which divide by the accumulation steps take.

        Args:
            batches: this process's micro-batches of the step; every process of the group must call.
            group: processes with different batches (data parallel); None is all of them. Not those of tensor
                parallelism, which share a batch.
            losses: how many losses the loop takes the mean of, if not ``len(batches)`` times the processes; 1 where it
                sums them.

        Returns:
            What the objective divides by, named as in `RankingInputs` (CLHA: pair_counts [D] and prompt_count []), and
            loss_scale [], float32.

        Raises:
            ValueError: no batch, or a bad one; where it is another process's, on this one too, so that none waits.
        """
        counts, device, problem = torch.zeros(SCALARS, dtype=torch.float64), torch.device("cpu"), None
        try:
            parts = [part if isinstance(part, CandidateBatch) else CandidateBatch.from_dict(part) for part in batches]
            if not parts:
                raise ValueError("batches: expected at least one micro-batch, got none")
            # Never 0: a process without a prompt takes part in the collectives like any other.
            most = max([1, *(int(size) for part in parts for size in part.candidates_per_prompt.tolist())])
            counts, device = local_counts(parts, self.options, most), parts[0].targets.device
        except (ValueError, TypeError, AttributeError) as error:
            problem = error  # to be raised once the others, which wait in a collective, know of it
        processes = 1
        if dist.is_available() and dist.is_initialized():
            processes = dist.get_world_size(group)
            if device.type == "cpu" and dist.get_backend(group) == "nccl":
                device = torch.device("cuda", torch.cuda.current_device())
        counts = counts.to(device)
        if processes > 1:
            shared = torch.tensor([len(counts), int(problem is not None)], device=device)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
            longest, failed = shared.tolist()
            if failed:
                raise problem or ValueError("batches: expected batches on every process, got an error on another one")
            pairs, scalars = counts[:-SCALARS], counts[-SCALARS:]
            counts = torch.cat([pairs, counts.new_zeros(longest - len(counts)), scalars])
            dist.all_reduce(counts, group=group)
        if problem is not None:
            raise problem
        scale = len(batches) * processes if losses is None else losses
        return {
            **step_counts(counts, self.options),
            "loss_scale": torch.tensor(float(scale), dtype=torch.float32, device=device),
        }

    def token_logps(self, batch: Mapping[str, Any] | CandidateBatch) -> Tensor:
        """[N] nats: the log-probabilities of a batch's scored tokens as the model is now, in its mode, without a graph.

        What a frozen model says is another one's `reference_logps`::

            frozen = clha_fast.attach(copy.deepcopy(model).eval())
            batch["reference_logps"] = frozen.token_logps(batch)

        Raises:
            ValueError: as a call of the model.
        """
        if not isinstance(batch, CandidateBatch):
            batch = CandidateBatch.from_dict(batch)
        batch = self._layouts.taken(batch)
        return self._logps(self.ordinary, batch.model_inputs(), batch.targets, batch.row_index, wrapped=False)

    def ordinary(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        # By way of the class as it is now: FSDP2 changes it.
        return type(self.model).forward(self.model, *args, **kwargs)

    def candidates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CLHAOutput:
        """The loss of the batch in `kwargs`; what is neither a field of it nor a count goes to the model."""
        if args:
            raise ValueError(f"model: expected a batch of candidates as keyword arguments, got {len(args)} positional")
        for name, why in _UNUSED.items():
            got = "some" if isinstance(kwargs.get(name), Tensor) else kwargs.get(name)
            if got:
                raise ValueError(f"{name}: expected none beside a batch of candidates ({why}), got {got}")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict: expected True beside a batch of candidates (outputs have names), got False")
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds: expected input_ids (peft's prompt tuning shifts the positions that a batch scores); "
                "attach the PeftModel itself, after get_peft_model"
            )
        # Not a CandidateBatch: torch.compile does not follow what dataclasses know of themselves.
        for name in _NEEDED:
            if kwargs.get(name) is None:
                raise ValueError(f"{name}: expected in a batch of candidates, got the keys {', '.join(sorted(kwargs))}")
        if kwargs["candidates_per_prompt"].shape[0]:
            check_chains(kwargs.get("chains", ""), self.options)
        check_wide(kwargs)
        check_dropped(kwargs, self.options)
        segments = kwargs.get("segments")
        # position_ids alone are somebody's own.
        more = SEGMENT_FIELDS if any(kwargs.get(name) is not None for name in _OF_ROWS) else ()
        for name in more:
            if kwargs.get(name) is None:
                raise ValueError(f"{name}: expected, as all of {', '.join(more)}, of packed or shared rows, got none")
        if segments is not None or kwargs.get("position_ids") is None:
            self._row_limit.check_rows(segments, kwargs["input_ids"].shape[1])
        inputs = {name: kwargs[name] for name in (*MODEL_FIELDS, *more)}
        tensors = {name: kwargs[name] for name in _LOSS_FIELDS if kwargs.get(name) is not None}
        if kwargs.get("host_sizes") is not None and not torch.compiler.is_compiling():
            lengths, per_prompt = kwargs["candidate_lengths"], kwargs["candidates_per_prompt"]
            sizes = HostSizes.of(kwargs["host_sizes"], lengths, per_prompt)
            tensors |= {} if sizes is None else vars(sizes)
        others = {name: value for name, value in kwargs.items() if name not in (*_OWN_FIELDS, *more, *_UNUSED)}
        inputs, tensors = self._layouts.fitted(inputs, tensors, others)
        scale = checked_scale(kwargs.get("loss_scale"))
        times = 1 if scale is None else scale
        found = self._forward(self.ordinary, inputs, tensors, scale=times, others=others, wrapped=False)
        metrics = found.metrics
        if scale is not None:
            factor = scale.to(metrics.values) if isinstance(scale, Tensor) else scale
            values = torch.cat([metrics.values[:2] * factor, metrics.values[2:]])
            metrics = CLHAMetrics(values, metrics.scores, names=metrics.names)
        return CLHAOutput(loss=found.loss, metrics=metrics, aux_loss=found.auxiliary)


def empty_batch(device: torch.device | str = "cpu") -> CandidateBatch:
    """A batch without a prompt, for a process that has none left while others go on: loss 0, gradients of zeros."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    rows = none.reshape(0, 0)
    return CandidateBatch(rows, rows, none, none, none, none, none.to(torch.float32), none)


def _attached_forward(model: nn.Module) -> MethodType:
    """The new forward, bound to `model`; it finds its settings by way of `self`, so that a deep copy has its own."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attached: Attached | None = getattr(self, STATE, None)
        if attached is None:  # detached, and somebody has kept this method
            return self.forward(*args, **kwargs)
        if _MARK not in kwargs:
            return attached.ordinary(*args, **kwargs)
        return attached.candidates(args, kwargs)

    # The signature, which generation and Trainer read, but no __wrapped__: accelerate would unwrap this one too.
    own = inspect.signature(model.forward)
    slot = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = own.replace(parameters=[slot, *own.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = model.forward.__doc__
    setattr(forward, STATE, True)
    return MethodType(forward, model)


def _no_replicas(self: nn.Module) -> nn.Module:
    raise ValueError(DATA_PARALLEL)


def attach(
    model: nn.Module,
    options: Objective | Callable[[Group], Tensor] = PUBLISHED,
    *,
    backend: Backend = "auto",
    temperature: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    max_dropped_mass: float | None = None,
    layout: str = "padded",
    tiled_mlp: bool | int = False,
    sequence_parallel: dist.ProcessGroup | None = None,
) -> Attached:
    """Makes ``model(**batch)`` return the CLHA loss when `batch` holds ranked candidates, in whatever loop calls it.

    Replaces, in the loop::

        logits = model(input_ids=ids, attention_mask=mask).logits         # [B, T, V], never formed here
        loss = clha_loss(logits[...].log_softmax(-1), ...)

    A call with `candidate_lengths` among its keywords takes the fields of `CandidateBatch.as_dict()` and returns a
    `CLHAOutput`; further keywords go to the model. Every other call (generation, evaluation) is the model's own.
    Optional keywords of such a call are what `Attached.counts` returns, and the signals that the objective reads
    (`reference_logps`, `old_logps`, `advantages`, see `RankingInputs`) for the batch's scored tokens, or candidates. A
    batch without any prompt gives 0 with zero gradients: a process that has run out of data can keep the others
    company. Rows beyond the model's positions are refused where these are a table and said once where they are computed
    (not under torch.compile). Several threads may call at a time. Pickled, saved whole or copied, the model comes back
    attached.

    Attach first and wrap then (DDP, fully_shard, parallelize_module, accelerate, Trainer, torch.compile). A model
    that is already in DDP, torch.compile, fully_shard, a tensor-parallel plan or a DeepSpeed engine (all but ZeRO-3)
    is taken too; under the sharded ones all processes must attach.

    Args:
        model: a causal language model of transformers, or a PeftModel around one. A head that is more than one weight
            (LoRA or DoRA on it, quantised) is computed by its own forward in chunks of tokens, see
            `models.own_forward`.
        options: the loss: one of `clha_fast.objectives.OBJECTIVES`, an `Objective` of your own, or a function of a
            `Group` of whole prompts.
        backend: "auto", "triton", "workspace", "torch" or "reference".
        temperature: divisor of the logits. ignore_index: target that is not scored. workspace_bytes, max_dropped_mass:
            see `HeadOptions`.
        layout: `packed` or `shared` take batches of such rows (`RankedCollator(layout=)`), once a probe has seen that
            the model computes them as it computes each candidate alone; the first batch and longer ones are compared.
            `auto` is `padded` where the probe fails, and from the batch on that is not computed so; else it stays, and
            `RankedCollator` counts the tokens of each batch and makes it shared where that pays, else padded.
        tiled_mlp: MLPs run this many tokens at a time (True chooses): the same outputs and gradients, less memory, see
            `models.tiled`.
        sequence_parallel: processes that are given the same batches and each hold a part of every row's tokens, see
            `models.sequence_parallel`; all call. The *mean* of their gradients is that of one process.

    Returns:
        `Attached`: ``.detach()`` undoes it, as leaving a ``with`` block does.

    Raises:
        ValueError: nn.DataParallel, a model with its loss attached already, or a setting out of range.
        UnsupportedHeadError: the head cannot be fused, with the reason.
        BackendError: `backend` reads the head's weight, and the head is more than one.
        UnsupportedLayoutError: the model does not compute such rows as it computes each candidate alone.

    Example::

        attached = clha_fast.attach(model)
        for batch in loader:                        # RankedCollator's dictionaries
            output = model(**batch)
            output.loss.backward()
    """
    check_name(backend)
    check_layout(layout, "auto")
    objective = check_adds_up(as_objective(options))
    inner = unwrap(model)
    if STATE in vars(inner):
        raise ValueError(
            "model: expected one without a loss, got one attached already; detach() that first, copy before attaching"
        )
    check_whole(inner)
    check_calls_what_it_wraps(model, inner)
    info = measure_head(inner, backend)
    head = info.options(temperature, ignore_index, workspace_bytes, max_dropped_mass)
    attached = Attached(inner, info, objective, backend, layout, head, sequence_parallel)
    attached.tiled = tile_mlps(inner, tiled_mlp)
    _put_on(inner, attached)
    return attached


def _put_on(model: nn.Module, attached: Attached) -> None:
    forward = _attached_forward(model)
    setattr(model, STATE, attached)
    model.forward = forward
    switch.install(attached.info.module)
    for name, method in _METHODS.items():
        setattr(model, name, MethodType(method, model))


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For pickle and torch.save: the model without what stands on it, and what puts it there again.

    A method on an instance is pickled as the attribute of its name, which a class need not have.
    """
    reduced: Any = type(self).__reduce_ex__(self, protocol)
    make, arguments, state, *_ = reduced
    attached: Attached = getattr(self, STATE)
    if attached._previous is not None:
        raise ValueError(
            "model: expected a forward of its class's to save an attached model, got one that something else has put "
            "there; save model.state_dict(), or detach first"
        )
    own = {name: value for name, value in state.items() if name not in (STATE, "forward", *_METHODS)}
    return make, arguments, (own, vars(attached)), None, None, _load


def _load(model: nn.Module, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    own, settings = state
    model.__setstate__(own)
    attached = Attached.__new__(Attached)
    vars(attached).update(settings)
    _put_on(model, attached)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy` does it for a module: methods on the instance become those of the copy."""
    forbidden = getattr(type(self), "__deepcopy__", None)
    if forbidden is not None:  # FSDP2's says why
        return cast(nn.Module, forbidden(self, memo))
    reduced: Any = type(self).__reduce_ex__(self, 4)
    make, arguments, state, *_ = reduced
    other: nn.Module = make(*arguments)
    memo[id(self)] = other
    other.__setstate__(copy.deepcopy(state, memo))
    return other


# On the instance beside `forward`; pickle and copy look there first.
_METHODS: dict[str, Callable[..., Any]] = {
    "_replicate_for_data_parallel": _no_replicas,
    "__reduce_ex__": _reduce,
    "__deepcopy__": _deepcopy,
}
