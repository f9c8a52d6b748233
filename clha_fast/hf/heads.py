"""A model's output embedding, and the loss computed in its place.

The head's own forward is intercepted, so whatever comes before it (norm, division) has run and whatever gathers its
weight (wrappers' hooks) has gathered it. What the model does to the head's result is measured once, not read from
configuration names.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clha_fast.hf.probe import Transform, UnsupportedTransform, fit_transform, is_linear, probe_values
from clha_fast.options import HeadOptions

# (hidden [B * T, H], weight [V, H], bias [V] or None) -> a tensor, or a tuple that begins with one.
HeadCompute = Callable[[Tensor, Tensor, "Tensor | None"], Any]


class UnsupportedHeadError(ValueError):
    """The model's output embedding, or what the model does to its result, is not understood; it is never guessed."""


@dataclass(frozen=True)
class HeadInfo:
    """What `inspect_head` found.

    Attributes:
        module: the output embedding.
        vocab_size: V, the logits the model returns (fewer than the weight has rows where the model slices them).
        scale, softcap: logits = softcap * tanh(scale * z / softcap), or scale * z without a softcap.
        bias_name: a parameter or buffer [V] that the model adds to the head's result, None for none.
        stream: k where the head is called with [B, K, T, H] and the logits come from [:, k] (ProphetNet's n-gram
            streams); None where it is called with [B, T, H].
    """

    module: nn.Module
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    bias_name: str | None = None
    stream: int | None = None

    def options(
        self, temperature: float = 1.0, ignore_index: int = -100, workspace_bytes: int | None = None
    ) -> HeadOptions:
        """The loss's settings for this head."""
        return HeadOptions(
            scale=self.scale,
            softcap=self.softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            workspace_bytes=workspace_bytes,
        )


def _refuse(model: nn.Module, head: nn.Module | None, seen: str) -> UnsupportedHeadError:
    name = "no output embedding" if head is None else f"output embedding {type(head).__name__}"
    return UnsupportedHeadError(
        f"model: expected a head that can be fused, got {type(model).__name__} with {name}: {seen}"
    )


def _is_dtensor(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _output_embedding(model: nn.Module) -> nn.Module:
    """The head as a plain linear layer, or UnsupportedHeadError."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _refuse(model, None, "it is an encoder-decoder; a causal language model is needed")
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise _refuse(model, None, "it returns no logits over a vocabulary")
    if isinstance(head, (nn.ModuleList, nn.ModuleDict)):
        raise _refuse(model, head, f"it holds {len(head)} heads, each with a vocabulary of its own")
    if "forward" in vars(head):
        raise _refuse(model, head, "its forward has been replaced on the instance")
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise _refuse(model, head, "its weight is not a floating tensor [V, H]")
    # A quantised weight can be a tensor class of its own that looks like a floating tensor.
    if type(weight) not in (Tensor, nn.Parameter) and not _is_dtensor(weight):
        raise _refuse(model, head, f"its weight is a {type(weight).__name__} (quantised weights are not read)")
    # A wrapper around the weight (LoRA, quantisation) has a forward of its own: its `.weight` is not what it computes.
    if type(head).forward is not nn.Linear.forward and not is_linear(head):
        raise _refuse(
            model,
            head,
            "its forward is not that of torch.nn.Linear, nor does it compute the same "
            "(LoRA and quantised heads are not read)",
        )
    return head


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module.forward` is `forward` inside; hooks still run. On the instance only, and always undone."""
    present = "forward" in vars(module)
    before: Any = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if present:
            module.forward = before
        else:
            del module.forward


@contextlib.contextmanager
def _quiet(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; every module's training flag and the random state are put back."""
    flags = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=True):
            model.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training


def cache_flags(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` where the forward takes it: a cache is memory, and changes packed attention."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or takes_any else {}


def inspect_head(model: nn.Module) -> HeadInfo:
    """Find the output embedding and measure what the model does to its result.

    A forward over two tokens runs once with the head's result replaced by known float32 values. Understood are:
    nothing, a scale, a softcap c * tanh(z / c), both, a bias added, a sliced vocabulary, and logits from one of several
    streams. A head of any class will do if it computes, and differentiates, what `torch.nn.functional.linear` does.

    Args:
        model: a transformers causal language model, not yet wrapped for data parallelism.

    Raises:
        UnsupportedHeadError: no output embedding, several, one that is not linear in its own weight (LoRA, quantised),
            a model that does not run on token ids alone, or a transform that is none of these; the message names the
            model, the head and what was seen.
    """
    head = _output_embedding(model)
    weight: Tensor = head.weight  # type: ignore[assignment]
    rows, width = weight.shape
    shapes: list[tuple[int, ...]] = []
    values: list[Tensor] = []

    def known(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape))
        values.append(probe_values(rows, hidden.shape[:-1].numel()).reshape(*hidden.shape[:-1], rows))
        return values[-1].to(hidden.device)

    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    device = embedding.device
    ids = torch.arange(2, device=device).clamp(max=embedding.shape[0] - 1).unsqueeze(0)
    with _quiet(model, device), _replaced_forward(head, known), torch.enable_grad():
        # With gradients, though none is taken: logits that need one show a parameter that acts behind the head.
        try:
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **cache_flags(model))
        except (TypeError, ValueError, NotImplementedError) as error:
            why = " ".join(str(error).split())
            raise _refuse(model, head, f"its forward does not run on token ids alone ({why})") from error
    if not shapes:
        raise _refuse(model, head, "the model's forward never calls it")
    shape = shapes[0]
    if len(shapes) > 1 or len(shape) not in (3, 4) or (shape[0], *shape[-2:]) != (1, 2, width):
        raise _refuse(model, head, f"it was called with hidden states of shape {shapes}, not once with [1, 2, H]")
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, 2):
        raise _refuse(model, head, "the model returns no logits of shape [1, 2, V]")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    seen = None
    for stream, raw in enumerate(values[0].reshape(-1, 1, 2, rows)):
        try:
            transform = fit_transform(raw, logits, parameters, buffers)
        except UnsupportedTransform as error:
            seen = seen or error
        else:
            return _info(head, transform, stream if len(shape) == 4 else None)
    raise _refuse(model, head, str(seen))


def _info(head: nn.Module, transform: Transform, stream: int | None) -> HeadInfo:
    return HeadInfo(
        module=head,
        vocab_size=transform.vocab_size,
        scale=transform.scale,
        softcap=transform.softcap,
        bias_name=transform.bias_name,
        stream=stream,
    )


class FusedHead:
    """The head of one forward, with `compute` in its place; made by `fused_head`.

    Attributes:
        result: what `compute` returned, once the model has run.
    """

    def __init__(self, model: nn.Module, info: HeadInfo, compute: HeadCompute) -> None:
        self._model, self._info, self._compute = model, info, compute
        self._model_forward = model.forward
        self.called = False
        self.result: Any = None

    def _tensors(self) -> tuple[Tensor, Tensor | None]:
        info = self._info
        weight: Tensor = info.module.weight  # type: ignore[assignment]
        bias: Tensor | None = info.module.bias  # type: ignore[assignment]
        if info.vocab_size < weight.shape[0]:
            weight = weight[: info.vocab_size]
            bias = None if bias is None else bias[: info.vocab_size]
        if info.bias_name is not None:
            owner, _, name = info.bias_name.rpartition(".")
            added: Tensor = getattr(self._model.get_submodule(owner), name)
            bias = added if bias is None else bias + added
        return weight, bias

    def head_forward(self, hidden: Tensor) -> Tensor:
        if self.called:
            raise _refuse(self._model, self._info.module, "the model's forward calls it more than once")
        self.called = True
        stream = self._info.stream
        scored = hidden if stream is None else hidden[:, stream]
        if scored.dim() != 3:
            shape = tuple(hidden.shape)
            raise _refuse(self._model, self._info.module, f"it was called with hidden states of another shape, {shape}")
        self.result = self._compute(scored.reshape(-1, scored.shape[-1]), *self._tensors())
        # What the model still does to "its logits" touches one number a token, and is thrown away.
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    def model_forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._model_forward(*args, **kwargs)
        if not self.called:
            raise _refuse(self._model, self._info.module, "the model's forward never calls it")
        # Wrappers hang their backward hooks on what the model returns, so the result must be in it.
        output.logits = self.result[0] if isinstance(self.result, tuple) else self.result
        return output


@contextlib.contextmanager
def fused_head(model: nn.Module, compute: HeadCompute, info: HeadInfo | None = None) -> Iterator[FusedHead]:
    """Inside, a forward of `model` (or of a wrapper around it) computes `compute` instead of logits.

    ``output.logits`` is then the tensor that `compute` returned (the first of a tuple); use that one for the
    backward, and `FusedHead.result` for the rest. Labels must not be passed to the model.

    Args:
        model: the unwrapped model.
        compute: called in the head's place as ``compute(hidden [B * T, H], weight [V, H], bias [V] or None)``.
        info: from `inspect_head`; None inspects now.

    Raises:
        UnsupportedHeadError: as `inspect_head`; also when a forward calls the head never or more than once.

    Example::

        def compute(hidden, weight, bias):
            return token_logps(hidden, weight, targets, bias=bias, row_index=rows, head=info.options())

        info = inspect_head(model)
        with fused_head(model, compute, info):
            logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    """
    info = inspect_head(model) if info is None else info
    fused = FusedHead(model, info, compute)
    with _replaced_forward(info.module, fused.head_forward), _replaced_forward(model, fused.model_forward):
        yield fused
