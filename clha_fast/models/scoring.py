"""Log-probabilities that any causal language model gives tokens, without its logits: `score` once, a `Scorer` often."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clha_fast.batching.segments import SegmentGroup, Segments, TokenSegments, check_layout
from clha_fast.models import switch
from clha_fast.models.forward import LogpForward
from clha_fast.models.heads import HeadInfo
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.measure import measure_head
from clha_fast.models.unpacking import padded_rows_of
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
# Of these False means what is done anyway.
_NOT_RETURNED = ("output_hidden_states", "output_attentions")


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
        layout: of the rows that the model is probed for, and may then be given with `segments`: `packed`, `shared`, or
            `auto` (either). The first of them, and longer ones (`models.layouts`), are compared with rows alone.
        backend, workspace_bytes: as `clha_fast.attach`.

    Attributes:
        layout: `padded`, `packed`, `shared` or `auto`.

    Raises:
        ValueError: nn.DataParallel, or a setting out of range.
        UnsupportedLayoutError: the model does not compute rows of `layout` as it computes each candidate alone.
        UnsupportedHeadError: the head is not understood, with the reason; it is never guessed.
        BackendError: `backend` reads the head's weight, and the head is more than one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        layout: str = "padded",
        backend: Backend = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        check_name(backend)
        check_layout(layout, "auto")
        inner = unwrap(model)
        check_whole(inner)
        self.model = model
        with _MEASURING:
            self.info: HeadInfo = measure_head(inner, backend)
        head = self.info.options(temperature, ignore_index, workspace_bytes)
        self._forward = LogpForward(inner, self.info, head, backend)
        self._layouts = RowLayouts(inner, self._forward, inner)
        with _MEASURING:
            self._layouts.settle(layout)
        self._switched = not switch.installed(self.info.module)
        switch.install(self.info.module)

    @property
    def layout(self) -> str:
        return self._layouts.layout

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
        segments: Segments | None = None,
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
        for name in _NOT_RETURNED:
            if others.get(name):
                raise ValueError(
                    f"{name}: expected False (scores of tokens are all that is returned), got {others[name]!r}"
                )
        if others.get("return_dict") is False:
            raise ValueError("return_dict: expected True (the model's output is read by its names), got False")
        if gradient and torch.is_inference_mode_enabled():
            raise ValueError("gradient: expected False under torch.inference_mode, which has no graphs, got True")
        _check_shapes(
            input_ids,
            labels=labels,
            shift_labels=shift_labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["position_ids"] = position_ids
        ignored = self._forward.head.ignore_index
        reads = None
        if segments is not None:
            segments = _checked(segments, input_ids, {**inputs, "shift_labels": shift_labels})
            assert labels is not None
            tokens = segments.tokens()
            reads, known = _read_from(segments, tokens.position_ids)
            targets = self._checked_labels("labels", torch.where(known.to(labels.device), labels, ignored))
            tokens = TokenSegments(*(part.to(input_ids.device) for part in tokens))
            there = (tokens.segment_ids >= 0).to(input_ids.dtype)
            inputs = {"input_ids": input_ids, "attention_mask": there, "segments": segments, **tokens._asdict()}
            with _MEASURING:
                taken = self._layouts.takes(inputs, others)
            if not taken:
                padded, reads = padded_rows_of(input_ids, segments)
                inputs = {**padded}
        elif labels is not None:
            known = _known(input_ids, position_ids, attention_mask).to(labels.device)
            own = self._checked_labels("labels", torch.where(known, labels, ignored))
            targets = F.pad(own, (0, 1), value=ignored)[:, 1:]
        else:
            assert shift_labels is not None
            targets = self._checked_labels("shift_labels", shift_labels)
        moved = labels is not None and segments is None
        present = {name: given for name, given in inputs.items() if given is not None}
        names = checks.statistics(statistics, self._forward.head)
        settings: dict[str, Any] = {"statistics": names, "others": others, "wrapped": gradient, "reads": reads}
        if temperature is not None:
            each = _each(temperature, targets)
            settings["temperature"] = F.pad(each, (0, 1), value=1.0)[:, 1:] if moved else each
        with torch.set_grad_enabled(gradient):
            values, scored, _ = score_grid(self._forward, self.model, present, targets, **settings)
            if moved:
                values, scored = _behind(values), _behind(scored)
            return TokenScores(values[0], scored, **dict(zip(names, values[1:], strict=True)))

    def _checked_labels(self, name: str, targets: Tensor) -> Tensor:
        """`targets`; looked at on CPU tensors, for a GPU would have to be waited for."""
        rows = self.info.vocab_size
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ((targets < 0) | (targets >= rows)) & (targets != self._forward.head.ignore_index)
            if wrong.any():
                place = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"{name}: expected tokens below the {rows} rows of the model's output embedding, or "
                    f"{self._forward.head.ignore_index} where nothing is scored, got {int(targets[tuple(place)])} at "
                    f"{place}; is the tokenizer larger than the model? (model.resize_token_embeddings(len(tokenizer)))"
                )
        return targets


def score(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segments: Segments | None = None,
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
    tokens, and rows of several candidates are probed. That is done anew in every call, one call at a time in a process;
    a `Scorer` does it once.

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
        segments: where prompts and candidates stand in rows that hold several of them (`CandidateBatch.segments`), in
            the place of `attention_mask` and `position_ids`; with `labels`. Every candidate is scored as if it stood
            alone behind its prompt, its first token read from the prompt's last.
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
        ValueError: shapes or dtypes do not fit; packed rows with an attention mask, which lets them look at each other;
            `gradient` in inference mode; an output of the model's asked for; on CPU tensors also tokens beyond the
            model's embeddings.
        UnsupportedLayoutError: with `segments`, as `Scorer`; or images and embeddings beside them.
        UnsupportedHeadError, BackendError: as `Scorer`.

    Example::

        labels = input_ids.masked_fill(prompt_mask, -100)
        logps = score(reference, input_ids, labels, attention_mask=attention_mask).logps.sum(1)

        batch = RankedCollator(tokenizer, layout="shared")(records)  # the candidates of a prompt behind it, in one row
        labels = batch["input_ids"].masked_fill(batch["segment_ids"] < 1, -100)
        logps = score(reference, batch["input_ids"], labels, segments=batch["segments"]).logps
    """
    each = temperature if isinstance(temperature, Tensor) else None
    settings: dict[str, Any] = {"temperature": 1.0 if isinstance(temperature, Tensor) else temperature}
    settings |= {"ignore_index": ignore_index, "backend": backend, "workspace_bytes": workspace_bytes}
    if isinstance(segments, Segments):
        settings["layout"] = segments.layout
    with _MEASURING, Scorer(model, **settings) as scorer:
        return scorer(
            input_ids,
            labels,
            shift_labels=shift_labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segments=segments,
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
    reads: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Any]:
    """(log-probabilities and statistics [1 + S, B, T], which count [B, T], the model's output).

    What is ignored costs the head nothing; on a GPU the number of scored tokens is waited for.

    Args:
        targets: [B, T], `targets[b, t]` read from tokens up to t. temperature: [B, T] or None.
        reads: [B, T], of B * T places the one whose hidden state a target is read from; None is its own.
        settings: as `LogpForward.scored`.
    """
    counts = targets != forward.head.ignore_index
    places = counts.flatten().nonzero()[:, 0]
    rows = places if reads is None else reads.flatten().to(places.device)[places]
    each = None if temperature is None else temperature.flatten()[places.to(temperature.device)]
    values, output = forward.scored(run, inputs, targets.flatten()[places], rows, temperature=each, **settings)
    grid = values.new_zeros(values.shape[0], targets.numel()).index_copy(1, places.to(values.device), values)
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
        # Beside shift_labels a mask is the model's matter alone, which may take a dict of them.
        array = isinstance(tensor, (Tensor, list)) or hasattr(tensor, "__array__")
        if tensor is None or (name == "attention_mask" and given.get("labels") is None and not array):
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name}: expected a tensor [B, T], got {type(tensor).__name__}; torch.as_tensor makes one"
            )
        # A mask may be the model's own, of four dimensions.
        if tensor.shape != input_ids.shape and (name != "attention_mask" or tensor.dim() == 2):
            raise ValueError(
                f"{name}: expected the shape of input_ids, {list(input_ids.shape)}, got {list(tensor.shape)}"
            )
        if name.endswith("labels") and tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64, got {tensor.dtype}; {name}.long() makes it")


def _checked(segments: Segments, input_ids: Tensor, others: Mapping[str, Tensor | None]) -> Segments:
    """`segments` without candidates that have no tokens, which nothing is read from."""
    if not isinstance(segments, Segments):
        raise ValueError(f"segments: expected Segments, as CandidateBatch.segments, got {type(segments).__name__}")
    if (segments.rows, segments.width) != tuple(input_ids.shape):
        raise ValueError(
            f"segments: expected those of input_ids, {list(input_ids.shape)}, got {segments.rows} rows of "
            f"{segments.width} tokens"
        )
    for name in ("attention_mask", "position_ids", "shift_labels"):
        if others[name] is not None:
            way = "give labels, at the tokens' own places" if name == "shift_labels" else "leave it out"
            raise ValueError(
                f"{name}: expected none beside segments, which say what a token sees and is read from, got one; {way}"
            )
    ends = [0] * segments.rows
    groups = []
    for row, prompt, candidates in segments.groups:
        for start, size in (prompt, *candidates):
            if start != ends[row] or not prompt[1]:
                raise ValueError(
                    "segments: expected prompts of a token or more, each with its candidates behind it and without a "
                    f"gap, got {size} tokens at {start} of row {row} behind {ends[row]} others"
                )
            ends[row] += size
        groups.append(SegmentGroup(row, prompt, tuple(span for span in candidates if span[1])))
    if max(ends) > segments.width:
        raise ValueError(f"segments: expected at most {segments.width} tokens in a row, got {max(ends)}")
    return replace(segments, groups=tuple(groups))


def _read_from(segments: Segments, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """([B, T] places that predict each token; bool, which tokens have one), on the CPU."""
    before = torch.arange(segments.rows * segments.width).reshape(position_ids.shape) - 1
    for row, (start, length), candidates in segments.groups:
        for begin, _ in candidates:
            before[row, begin] = row * segments.width + start + length - 1
    return before, position_ids > 0


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
