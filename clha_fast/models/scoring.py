"""Log-probabilities that any causal language model gives tokens, without its logits: `score` once, a `Scorer` often."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clha_fast.models import switch
from clha_fast.models.forward import LogpForward
from clha_fast.models.heads import HeadInfo
from clha_fast.models.measure import measure_head
from clha_fast.models.wrapped import check_whole, unwrap
from clha_fast.ops import checks
from clha_fast.ops.dispatch import Backend, check_name

# Measuring puts the whole model into evaluation mode for a moment: one thread at a time.
_MEASURING = threading.RLock()
_REFUSED = {
    "use_cache": "a cache is never used",
    "logits_to_keep": "labels say which tokens are scored",
    "inputs_embeds": "input_ids are needed",
}


class TokenScores(NamedTuple):
    """What `score` says of every token, each [B, T] on the device of the model's head and 0 where `scored` is False.

    Attributes:
        logps: log-probabilities, nats, float32 or better.
        scored: bool, the tokens that have one.
        entropy, sum_sq_probs, mean_logit, is_top1: the `statistics` that were asked for, as `clha_fast.token_logps` has
            them, in the dtype of `logps`; else None.
    """

    logps: Tensor
    scored: Tensor
    entropy: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None


class Scorer:
    """A model whose head has been measured once, to score many batches; a context manager that detaches at its end.

    Several threads may call it at a time, without `gradient`.

    Args:
        model: a causal language model of transformers, a PeftModel around one, or either in DDP, fully_shard,
            torch.compile or a DeepSpeed engine (all but ZeRO-3), attached or not. A head with an adapter on it, or a
            quantised one, is computed by its own forward in chunks of tokens. Under sharding all processes must call.
        temperature: divisor of the logits. ignore_index: label that is not scored.
        backend, workspace_bytes: as `clha_fast.attach`.

    Raises:
        ValueError: nn.DataParallel, or a setting out of range.
        UnsupportedHeadError: the head is not understood, with the reason; it is never guessed.
        BackendError: `backend` reads the head's weight, and the head is more than one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        backend: Backend = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        check_name(backend)
        inner = unwrap(model)
        check_whole(inner)
        self.model = model
        with _MEASURING:
            self.info: HeadInfo = measure_head(inner, backend)
        head = self.info.options(temperature, ignore_index, workspace_bytes)
        self._forward = LogpForward(inner, self.info, head, backend)
        self._switched = not switch.installed(self.info.module)
        switch.install(self.info.module)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Leaves the model as it was; a second call does nothing."""
        if self._switched:
            switch.remove(self.info.module)
            self._switched = False

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        temperature: Tensor | None = None,
        statistics: Sequence[str] = (),
        gradient: bool = False,
        **others: Any,
    ) -> TokenScores:
        """As `score`, which see."""
        if (labels is None) == (shift_labels is None):
            got = "neither" if labels is None else "both"
            raise ValueError(f"labels: expected labels or shift_labels (input_ids scores all tokens), got {got}")
        for name, why in _REFUSED.items():
            if name in others:
                raise ValueError(f"{name}: expected nothing of this name ({why}), got {others[name]!r}")
        _check_shapes(input_ids, labels=labels, shift_labels=shift_labels, position_ids=position_ids)
        targets = shift_labels
        if labels is not None:
            known = _known(input_ids, position_ids, attention_mask).to(labels.device)
            ignored = self._forward.head.ignore_index
            targets = F.pad(torch.where(known, labels, ignored), (0, 1), value=ignored)[:, 1:]
        assert targets is not None
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        names = checks.statistics(statistics, self._forward.head)
        settings: dict[str, Any] = {"statistics": names, "others": others, "wrapped": gradient}
        if temperature is not None:
            each = _each(temperature, targets)
            settings["temperature"] = each if labels is None else F.pad(each, (0, 1), value=1.0)[:, 1:]
        with torch.set_grad_enabled(gradient):
            values, scored, _ = score_grid(self._forward, self.model, present, targets, **settings)
        if labels is not None:
            values, scored = _behind(values), _behind(scored)
        return TokenScores(values[0], scored, **dict(zip(names, values[1:], strict=True)))


def score(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    statistics: Sequence[str] = (),
    gradient: bool = False,
    backend: Backend = "auto",
    workspace_bytes: int | None = None,
    **others: Any,
) -> TokenScores:
    """Log-probabilities of tokens under a causal language model, without its logits.

    Replaces, for a frozen reference, evaluation or importance ratios::

        with torch.no_grad():
            logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1].float()   # [B, T - 1, V]
        logps = (logits / temperature).log_softmax(-1).gather(2, labels[:, 1:, None])[..., 0]

    What the model does to its head's result (scale, softcap, bias, sliced vocabulary) is measured in a forward over two
    tokens. That is done anew in every call, one call at a time in a process; a `Scorer` measures once.

    Args:
        model: see `Scorer`. Its mode is left as it is: dropout draws in a model that trains.
        input_ids: [B, T] int64.
        labels: [B, T] int64, the tokens to score at their own places: `labels[b, t]`, read from the tokens before t,
            is scored at [b, t]. Not scored are ignored ones, padding, and a row's first token, which has nothing
            before it.
        shift_labels: [B, T] int64 in the place of `labels`, shifted by the caller: `shift_labels[b, t]` is the token
            behind t, read from tokens up to t, and is scored at [b, t].
        attention_mask: [B, T], 0 on padding on either side; None where there is none.
        position_ids: [B, T], restarting where sequences are packed into a row, which transformers keeps apart where
            `attention_mask` is None. Of `labels` the first of every sequence is not scored.
        temperature: divisor of the logits; a tensor [B] or [B, T] is one for each row, or for each place of a label.
        ignore_index: label that is not scored.
        statistics: of "entropy" (with a gradient), "sum_sq_probs", "mean_logit" and "is_top1", from the same pass.
        gradient: whether the result has a graph. It then needs the model's forward for itself: no other thread may
            call meanwhile.
        backend, workspace_bytes: as `clha_fast.attach`.
        others: further arguments of the model's forward, such as `pixel_values` or `token_type_ids`.

    Returns:
        `TokenScores`. No scored token gives zeros, with a graph if asked for.

    Raises:
        ValueError: shapes do not fit; packed rows with an attention mask, which lets them look at each other; on CPU
            tensors also tokens beyond the model's embeddings.
        UnsupportedHeadError, BackendError: as `Scorer`.

    Example::

        labels = input_ids.masked_fill(prompt_mask, -100)
        logps = score(reference, input_ids, labels, attention_mask=attention_mask).logps.sum(1)
    """
    each = temperature if isinstance(temperature, Tensor) else None
    settings: dict[str, Any] = {"temperature": 1.0 if isinstance(temperature, Tensor) else temperature}
    settings |= {"ignore_index": ignore_index, "backend": backend, "workspace_bytes": workspace_bytes}
    with _MEASURING, Scorer(model, **settings) as scorer:
        return scorer(
            input_ids,
            labels,
            shift_labels=shift_labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            temperature=each,
            statistics=statistics,
            gradient=gradient,
            **others,
        )


def score_grid(
    forward: LogpForward,
    run: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    targets: Tensor,
    *,
    temperature: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Any]:
    """(log-probabilities and statistics [1 + S, B, T], which count [B, T], the model's output).

    What is ignored costs the head nothing; on a GPU the number of scored tokens is waited for.

    Args:
        targets: [B, T], `targets[b, t]` read from tokens up to t. temperature: [B, T] or None. Others: as
            `LogpForward.scored`.
    """
    counts = targets != forward.head.ignore_index
    rows = counts.flatten().nonzero()[:, 0]
    each = None if temperature is None else temperature.flatten()[rows.to(temperature.device)]
    values, output = forward.scored(run, inputs, targets.flatten()[rows], rows, temperature=each, **settings)
    grid = values.new_zeros(values.shape[0], targets.numel()).index_copy(1, rows.to(values.device), values)
    return grid.reshape(values.shape[0], *targets.shape), counts.to(values.device), output


def _each(temperature: Tensor, targets: Tensor) -> Tensor:
    """[B, T] of a temperature for each row or each place."""
    wide = temperature[:, None] if temperature.dim() == 1 else temperature
    if wide.dim() != 2 or wide.shape[0] != targets.shape[0] or wide.shape[1] not in (1, targets.shape[1]):
        raise ValueError(
            f"temperature: expected a number, [B] or [B, T] with [B, T] = {list(targets.shape)}, got "
            f"{list(temperature.shape)}"
        )
    return wide.expand(targets.shape)


def _check_shapes(input_ids: Tensor, **given: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected a tensor [B, T], got {got}")
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name}: expected the shape of input_ids, {list(input_ids.shape)}, got {list(tensor.shape)}"
            )


def _known(input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """[B, T] bool, tokens with one of their own sequence before them; a packed row with a mask is refused."""
    known = torch.ones_like(input_ids, dtype=torch.bool)
    known[:, :1] = False
    real = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask.bool()
    if real is not None:
        known[:, 1:] &= real[:, 1:] & real[:, :-1]
    if position_ids is not None:
        goes_on = position_ids[:, 1:] - position_ids[:, :-1] == 1  # transformers' own rule
        if real is not None and (known[:, 1:] & ~goes_on).any():
            raise ValueError(
                "attention_mask: expected None beside position_ids that restart within a row (with a mask packed "
                "sequences look at each other), got a mask; leave it out, or give every sequence a row of its own"
            )
        known[:, 1:] &= goes_on
    return known


def _behind(values: Tensor) -> Tensor:
    """[..., T] at the places that predict to [..., T] at the places that are predicted."""
    return F.pad(values, (1, 0))[..., :-1]
