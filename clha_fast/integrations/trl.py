"""TRL's trainers with this library's head: `use_clha` for those with a fused one, `FusedHeadMixin` for the others.

TRL (>= 1.15) puts a forward on the model's instance that answers ``model(..., labels=..., fused_lm_head=True)`` with
log-probabilities. It reads scale and softcap from names in the configuration; here they are measured. Its trainers,
their losses and their settings stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from transformers import TrainerCallback

from clha_fast.models import switch
from clha_fast.models.adapters import virtual_tokens
from clha_fast.models.embedding import output_embedding
from clha_fast.models.forward import LogpForward
from clha_fast.models.heads import HeadInfo
from clha_fast.models.measure import measure_head
from clha_fast.models.router import auxiliary_coefficient
from clha_fast.models.scoring import score_grid
from clha_fast.models.wrapped import unwrap
from clha_fast.ops.dispatch import Backend, check_name

OLDEST = (1, 15)
TRAINERS = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "SFTTrainer")
# Those that form all logits, for `FusedHeadMixin`.
MIXED = ("CPOTrainer", "ORPOTrainer")
# TRL's name of a statistic, and ours. Its `log_sum_sq_probs` is the logarithm of ours.
_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_IGNORED = -100


def import_trl() -> Any:
    """The package; ImportError where it is missing or older than was read and tried."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("trl: not installed; pip install 'clha-fast[trl]' brings it") from error
    if Version(version).release[:2] < OLDEST:
        raise ImportError(f"trl: expected 1.15 or newer, whose trainers call one fused head, got {version}")
    return importlib.import_module("trl")


class _Asked(NamedTuple):
    """What a trainer asked of TRL's fused head."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]


def _asked(model: nn.Module) -> _Asked | None:
    """The settings of TRL's forward on the instance, also under accelerate's mixed precision; None without one."""
    forward = vars(model).get("_original_forward", vars(model).get("forward"))
    function = getattr(forward, "__func__", None)
    if function is None or getattr(function, "__globals__", {}).get("__name__") != "trl.trainer.utils":
        return None
    found = inspect.getclosurevars(function).nonlocals
    if any(name not in found for name in _Asked._fields):
        return None
    return _Asked(*(found[name] for name in _Asked._fields))


class _Head:
    """The forward that stands on one model: TRL's, but for calls that ask for a fused head."""

    def __init__(self, model: nn.Module, asked: _Asked, backend: Backend, workspace_bytes: int | None) -> None:
        self.model, self.asked, self.on = model, asked, True
        self.trained = False  # whether a call with gradients was answered
        self._backend, self._workspace_bytes = backend, workspace_bytes
        self._scores: dict[nn.Module, LogpForward] = {}
        self.info: HeadInfo = self._score().info
        self._below: Callable[..., Any] = model.forward
        self._output = importlib.import_module("trl.trainer.utils").FusedCausalLMOutput
        self._switched = not switch.installed(self.info.module)
        switch.install(self.info.module)
        self._put_on()

    def _score(self) -> LogpForward:
        """For the head as it is: with an adapter switched off, a copy of it that the adapter trains gives place."""
        head: Any = output_embedding(self.model)
        while isinstance(head, FullyShardedDataParallel):  # a wrapper's policy may have taken it for itself
            head = head.module
        if head not in self._scores:
            info = measure_head(self.model, self._backend)
            options = info.options(self.asked.temperature, _IGNORED, self._workspace_bytes)
            self._scores[info.module] = LogpForward(self.model, info, options, self._backend)
        return self._scores[head]

    def _put_on(self) -> None:
        below = self._below

        def forward(module: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not (fused_lm_head and self.on):
                return below(*args, fused_lm_head=fused_lm_head, **kwargs)
            return self.answer(args, kwargs)

        # For generation, which looks at the signature; no __wrapped__, which accelerate would unwrap.
        own = inspect.signature(below)
        slot = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = own.replace(parameters=[slot, *own.parameters.values()])  # type: ignore[attr-defined]
        self._own = MethodType(forward, self.model)
        self.model.forward = self._own

    def take_off(self) -> None:
        self.on = False  # where a wrapper has the forward by now, it passes on what it gets
        if vars(self.model).get("forward") == self._own:
            self.model.forward = self._below
        if self._switched:
            switch.remove(self.info.module)
            self._switched = False

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """TRL's `FusedCausalLMOutput`, whose docstring says what each field is."""
        if args or kwargs.get("inputs_embeds") is not None or kwargs.get("input_ids") is None:
            raise ValueError(
                "input_ids: expected token ids as a keyword (prompt tuning, which gives inputs_embeds, is not taken; "
                "detach, and TRL's own head takes it)"
            )
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("use_cache", None)
        if shift_labels is None and labels is None:
            raise ValueError("labels: expected labels or shift_labels beside fused_lm_head=True, got neither")
        targets = shift_labels if shift_labels is not None else F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
        names = [name for name in self.asked.outputs if name in _STATISTICS]
        statistics = [_STATISTICS[name] for name in names]
        values, mask, output = score_grid(
            self._score(), self._below, kwargs, targets, statistics=statistics, wrapped=False
        )
        if shift_labels is None:
            values, mask = values[..., :-1], mask[:, :-1]
        logps = values[0]
        self.trained |= torch.is_grad_enabled()
        fields: dict[str, Tensor] = dict(zip(names, values[1:], strict=True))
        if "is_top1" in fields:
            fields["is_top1"] = fields["is_top1"].bool()
        if "log_sum_sq_probs" in fields:
            fields["log_sum_sq_probs"] = torch.where(mask, fields["log_sum_sq_probs"], 1.0).log()
        loss = -logps.sum() / (mask.sum().clamp(min=1) if items is None else items)
        auxiliary = getattr(output, "aux_loss", None)
        if auxiliary is not None:
            loss = loss + auxiliary_coefficient(self.model) * auxiliary
        return self._output(loss=loss, log_probs=logps, label_mask=mask, aux_loss=auxiliary, **fields)


class _Guard(TrainerCallback):
    """RuntimeError before the first optimiser step whose loss never asked for the fused head."""

    def __init__(self, trainer: Any, head: _Head) -> None:
        self._name, self._head = type(trainer).__name__, head

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self._head.trained:
            raise RuntimeError(
                f"use_clha: expected a loss made of the fused head's log-probabilities, got a step of {self._name} "
                "without; its loss is made of the logits, so detach"
            )


class TRLHead:
    """What `use_clha` put on a trainer's models; a context manager that detaches at its end.

    Attributes:
        infos: the heads as measured, the policy's first and then the reference model's where there is one.
    """

    def __init__(self, trainer: Any, heads: list[_Head]) -> None:
        self._trainer, self._heads = trainer, heads
        self.infos = [head.info for head in heads]
        self._guard = _Guard(trainer, heads[0])
        trainer.add_callback(self._guard)

    def __enter__(self) -> TRLHead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """TRL's own head answers again; a second call does nothing."""
        for head in self._heads:
            head.take_off()
        self._trainer.pop_callback(self._guard)


def use_clha(trainer: Any, *, backend: Backend = "auto", workspace_bytes: int | None = None) -> TRLHead:
    """TRL's DPO, KTO, GRPO, RLOO or SFT trainer with log-probabilities and statistics from this library's head.

    Nothing else of the trainer changes: losses, metrics and settings are TRL's. What the model does to its head's
    result is measured, where TRL reads it from names in the configuration; the policy and a separate reference model
    both change, and a PeftModel's base.

    Args:
        trainer: made already, and not trained yet: ``trainer.train()`` may wrap the models.
        backend, workspace_bytes: as `clha_fast.attach`.

    Returns:
        `TRLHead`: ``.detach()`` undoes it, as leaving a ``with`` block does.

    Raises:
        ImportError: TRL is missing, or older than 1.15.
        ValueError: another trainer; ``cast_lm_head_to_fp32`` (the head is computed in the model's own dtype, with sums
            in float32); SFT with a ``compute_loss_func`` or ``label_smoothing_factor``, whose loss is made of logits;
            prompt tuning; outputs of a TRL that this file does not know; a trainer that has been given the head
            already.
        RuntimeError: in training, before its first step, where a subclass makes its loss of logits.
        UnsupportedHeadError, BackendError: as `clha_fast.attach`.

    Example::

        trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=pairs)
        clha_fast.integrations.trl.use_clha(trainer)
        trainer.train()
    """
    trl = import_trl()
    check_name(backend)
    models: list[Any] = [getattr(trainer, name, None) for name in ("model", "ref_model")]
    if not isinstance(trainer, tuple(getattr(trl, name) for name in TRAINERS)):
        raise ValueError(
            f"trainer: expected one of TRL's {', '.join(TRAINERS)}, got {type(trainer).__name__}; CPOTrainer and "
            "ORPOTrainer take FusedHeadMixin"
        )
    if isinstance(trainer, trl.SFTTrainer):
        _check_loss(trainer)
    models = [unwrap(model) for model in models if model is not None]
    asked = [_settings(model) for model in models]
    heads: list[_Head] = []
    try:
        for model, settings in zip(models, asked, strict=True):
            heads.append(_Head(model, settings, backend, workspace_bytes))
    except BaseException:
        for head in heads:
            head.take_off()
        raise
    return TRLHead(trainer, heads)


def _check_loss(trainer: Any) -> None:
    """ValueError where an SFTTrainer makes its loss of logits, and asks a fused head for what it logs alone."""
    smoothing = trainer.args.label_smoothing_factor if trainer.args.loss_type == "nll" else 0
    settings = (("compute_loss_func", trainer.compute_loss_func, None), ("label_smoothing_factor", smoothing, 0))
    for name, value, none in settings:
        if value:
            raise ValueError(
                f"{name}: expected {none}, got {value} (SFTTrainer then makes its loss of the logits); leave it out, "
                "or leave TRL's own head"
            )


def _settings(model: nn.Module) -> _Asked:
    if virtual_tokens(model):
        raise ValueError(
            "trainer: expected adapters in the model, or none, got prompt tuning, which gives embeddings in the "
            "tokens' place; leave TRL's own head"
        )
    asked = _asked(model)
    if asked is None:
        raise ValueError(
            f"trainer: expected TRL's fused head on {type(model).__name__}, got another forward, or another TRL than "
            "this was written for; detach what stands there, or leave TRL's own head"
        )
    if asked.cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32: expected False, got True (the head is computed in the model's own dtype, with sums "
            "in float32); leave it out, or leave TRL's own head"
        )
    unknown = [name for name in asked.outputs if name != "log_probs" and name not in _STATISTICS]
    if unknown:
        raise ValueError(f"trainer: expected the outputs {', '.join(_STATISTICS)} of a head, got {', '.join(unknown)}")
    return asked


class FusedHeadMixin:
    """TRL's `CPOTrainer` (SimPO is its ``loss_type="simpo"``) and `ORPOTrainer` without [B, T, V] logits.

    ::

        class FusedCPOTrainer(FusedHeadMixin, CPOTrainer): ...

    Losses and metrics are TRL's, but for ``logits/chosen`` and ``logits/rejected``: means over the tokens that are
    scored, not over prompts and padding too, for which no logits are made.

    Args:
        head_backend, head_workspace_bytes: `backend` and `workspace_bytes` of `clha_fast.attach`, beside TRL's own.

    Raises:
        TypeError: it stands behind the trainer, or beside another one.
        ImportError, ValueError, UnsupportedHeadError, BackendError: as `use_clha`; ValueError for an encoder-decoder.
    """

    _head: LogpForward

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        for name in MIXED:
            if name in order[: order.index(FusedHeadMixin.__name__)]:
                raise TypeError(
                    f"{cls.__name__}: expected FusedHeadMixin before {name}, got it behind, where it is idle"
                )

    def __init__(
        self, *args: Any, head_backend: Backend = "auto", head_workspace_bytes: int | None = None, **kwargs: Any
    ) -> None:
        if not {base.__name__ for base in type(self).__mro__} & set(MIXED):
            raise TypeError(
                f"{type(self).__name__}: expected FusedHeadMixin before {' or '.join(MIXED)}, got another trainer; "
                "use_clha is for TRL's others"
            )
        import_trl()
        check_name(head_backend)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        model = unwrap(trainer.model)
        info = measure_head(model, head_backend)
        settings = info.options(ignore_index=_IGNORED, workspace_bytes=head_workspace_bytes)
        self._head = LogpForward(model, info, settings, head_backend)

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """As TRL's, which see."""
        trainer: Any = self
        orpo = not hasattr(trainer, "cpo_alpha")
        padding = trainer.padding_value if orpo else trainer.pad_token_id
        device = trainer.accelerator.device
        rows = trainer.concatenated_inputs(batch, is_encoder_decoder=False, padding_value=padding, device=device)
        ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        labels = rows["concatenated_labels"]
        chosen = batch["chosen_labels"].shape[0]
        wanted = labels.clone()
        if orpo:  # its likelihood of the chosen is that of the prompt too
            wanted[:chosen] = torch.where(mask == 1, ids, _IGNORED)[:chosen]
        targets = F.pad(wanted, (0, 1), value=_IGNORED)[:, 1:]
        others = {"output_router_logits": True} if trainer.aux_loss_enabled else None
        inputs = {"input_ids": ids, "attention_mask": mask}
        (logps, means), scored, output = score_grid(
            self._head, model, inputs, targets, statistics=("mean_logit",), others=others
        )
        nll = -logps[:chosen].sum() / scored[:chosen].sum()
        if not orpo and trainer.cpo_alpha == 0:
            nll = torch.tensor(0.0, device=device)
        of_answer = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:].to(logps.device) != _IGNORED
        sums = torch.where(of_answer, logps, 0.0).sum(-1)
        if orpo or trainer.loss_type in ("ipo", "simpo"):
            sums = sums / of_answer.sum(-1)
        sides = (slice(chosen), slice(chosen, None))
        found = (*(sums[side] for side in sides), *(means[side][scored[side]] for side in sides), nll)
        return (*found, output.aux_loss) if trainer.aux_loss_enabled else found
