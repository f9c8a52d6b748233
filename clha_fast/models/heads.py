"""A model's output embedding, and the loss computed in its place.

The head's own forward is intercepted, so whatever comes before it (norm, division) has run and whatever gathers its
weight (wrappers' hooks) has gathered it. What the model does to the head's result is measured once, not read from
configuration names. A head that is more than one weight (an adapter on it, quantised) is never read: its own forward
is called where the caller asks for that, and it is refused elsewhere.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clha_fast.models import switch
from clha_fast.models.adapters import virtual_tokens
from clha_fast.models.embedding import (
    UnsupportedHeadError,
    check_backward_hooks,
    forward_slot,
    head_name,
    head_of,
    input_embedding_weight,
    is_dtensor,
    refuse,
    tensor_of,
    why_not_linear,
)
from clha_fast.models.probe import (
    Transform,
    UnsupportedTransform,
    fit_transform,
    mixes_tokens,
    probe_values,
    zeros_filled,
)
from clha_fast.options import HeadOptions

# (hidden [B * T, H], weight [V, H] (or a HeadForward, where `inspect_head` was asked for one), bias [V] or None) -> a
# tensor, or a tuple that begins with one.
HeadCompute = Callable[[Tensor, Any, "Tensor | None"], Any]
# On a module whose forward something of ours stands in for.
_TAKEN = "_clha_taken"
# What a head raises whose parameters have values that it was not made for.
_FILLED_FAILS = (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True)
class HeadForward:
    """A head that is no linear map of its own weight, as a function.

    Attributes:
        module: the output embedding. reason: why it is not read as a weight.
        vocab_size: V, the logits that count. differentiable: whether it has a gradient for its input.
    """

    module: nn.Module
    reason: str
    vocab_size: int = 0
    differentiable: bool = False

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, H] hidden states to their raw logits [n, V], with a graph."""
        # By way of the class: on the instance stands what has replaced it.
        logits: Tensor = type(self.module).forward(self.module, rows.unsqueeze(0))
        if is_dtensor(logits):
            raise UnsupportedHeadError(
                f"model: expected a head with all of its logits on every process, got {head_name(self.module)} "
                "spread over a mesh (adapters on a tensor-parallel head are not computed)"
            )
        return logits[0, :, : self.vocab_size]


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
        own_forward: the head as a function where its weight is not what it computes with; None for a linear head.
        virtual_tokens: positions that prompt tuning puts in front of the tokens, and that are not scored.
        hooks: keys of the forward hooks on the head that are no wrapper's, whose effect was measured with it.
    """

    module: nn.Module
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    bias_name: str | None = None
    stream: int | None = None
    own_forward: HeadForward | None = None
    virtual_tokens: int = 0
    hooks: tuple[int, ...] = ()

    def options(
        self,
        temperature: float = 1.0,
        ignore_index: int = -100,
        workspace_bytes: int | None = None,
        max_dropped_mass: float | None = None,
    ) -> HeadOptions:
        """The loss's settings for this head."""
        return HeadOptions(
            scale=self.scale,
            softcap=self.softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            workspace_bytes=workspace_bytes,
            max_dropped_mass=max_dropped_mass,
        )


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any], slot: str = "forward") -> Iterator[None]:
    """`module.forward` (or `slot`) is `forward` inside; hooks still run. On the instance only, and always undone.

    Where a switch stands, this thread alone is switched, and nobody else sees a change; elsewhere one at a time.
    """
    if switch.installed(module):
        with switch.switched(module, forward):
            yield
        return
    eager = not torch.compiler.is_compiling()
    if eager and vars(module).setdefault(_TAKEN, forward) is not forward:
        raise RuntimeError(
            "model: expected one call at a time where its forward or its head's is replaced (CLHATrainer, fused_head, "
            "a tensor-parallel head), got a second one within it; call it from one thread, or attach a copy in each"
        )
    present = slot in vars(module)
    before: Any = vars(module).get(slot)
    setattr(module, slot, forward)
    try:
        yield
    finally:
        if eager:
            del vars(module)[_TAKEN]
        if present:
            setattr(module, slot, before)
        else:
            delattr(module, slot)


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


def inspect_head(model: nn.Module, *, own_forward: bool = False) -> HeadInfo:
    """Find the output embedding and measure what the model does to its result.

    A forward over two tokens runs once with the head's result replaced by known float32 values. Understood are:
    nothing, a scale, a softcap c * tanh(z / c), both, a bias added, a sliced vocabulary, and logits from one of several
    streams. A head of any class will do if it computes, and differentiates, what `torch.nn.functional.linear` does.

    Args:
        model: a transformers causal language model, or a PeftModel around one, not yet wrapped for data parallelism.
        own_forward: take a head that is not linear in its own weight (LoRA, DoRA, quantised) as a `HeadForward`, which
            `compute` then gets in the weight's place. False refuses it.

    Raises:
        UnsupportedHeadError: no output embedding, several, one that is not linear in its own weight, a model that does
            not run on token ids alone, or a transform that is none of these; the message names the model, the head and
            what was seen.
    """
    head = head_of(model)
    reason = why_not_linear(head)
    if reason is not None and not own_forward:
        raise refuse(model, head, reason)
    probe = _Probe(model, head, reason, own_forward)
    shape, raw, logits = probe.run()
    virtual, reason = probe.virtual, probe.reason
    logits = logits[:, virtual:]
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    seen = None
    for stream, values in enumerate(raw[..., virtual:, :].reshape(-1, 1, 2, raw.shape[-1])):
        try:
            transform = fit_transform(values, logits, parameters, buffers)
        except UnsupportedTransform as error:
            seen = seen or error
        else:
            own = None
            if reason is not None:
                own = HeadForward(head, reason, transform.vocab_size, probe.differentiable)
            return _info(head, transform, stream if len(shape) == 4 else None, own, virtual)
    raise refuse(model, head, str(seen))


class _Probe:
    """One forward of a model over two tokens, its head's result replaced by known values.

    Attributes:
        virtual: positions in front of the two tokens. differentiable: whether the head has a gradient for its input
            (found out for a head that is not linear; a linear one has). reason: why the head's weight is not read; None
            where it is.
    """

    def __init__(self, model: nn.Module, head: nn.Module, reason: str | None, own_forward: bool) -> None:
        self._model, self._head, self.reason = model, head, reason
        # torch's own Linear takes no two dtypes; autocast casts them, for the loss as well.
        self._casts = own_forward and reason is None and type(head).forward is not nn.Linear.forward
        weight = tensor_of(head, "weight")
        self._rows: int | None = None
        self._width: int | None = None
        if weight is not None and reason is None:
            self._rows, self._width = weight.shape
        self._shapes: list[tuple[int, ...]] = []
        self._values: list[Tensor] = []
        self.virtual, self.differentiable = 0, reason is None

    def run(self) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """(shape of the hidden states, known values [..., T, rows], logits [1, T, V] that the model made of them)."""
        model, head = self._model, self._head
        embedding = input_embedding_weight(model)
        device = embedding.device
        ids = torch.arange(2, device=device).clamp(max=embedding.shape[0] - 1).unsqueeze(0)
        with _quiet(model, device), _replaced_forward(head, self._known, forward_slot(head)), torch.enable_grad():
            # With gradients, though none is taken: logits that need one show a parameter that acts behind the head.
            try:
                output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **cache_flags(model))
            except UnsupportedHeadError:
                raise
            except (TypeError, ValueError, NotImplementedError) as error:
                why = " ".join(str(error).split())
                raise refuse(model, head, f"its forward does not run on token ids alone ({why})") from error
        if not self._shapes:
            raise refuse(model, head, "the model's forward never calls it")
        shape = self._shapes[0]
        self.virtual = shape[-2] - 2 if len(shape) in (3, 4) else 0
        fits = self.virtual in (0, virtual_tokens(model)) and shape[-1] == self._width
        if len(self._shapes) > 1 or len(shape) not in (3, 4) or shape[0] != 1 or not fits:
            seen = f"it was called with hidden states of shape {self._shapes}, not once with [1, 2, H]"
            raise refuse(model, head, seen)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, shape[-2]):
            raise refuse(model, head, "the model returns no logits of shape [1, 2, V]")
        return shape, self._values[0], logits

    def _known(self, hidden: Tensor) -> Tensor:
        if not isinstance(hidden, Tensor):
            raise refuse(self._model, self._head, f"it is called with a {type(hidden).__name__}, no hidden states")
        self._shapes.append(tuple(hidden.shape))
        weight, autocast = tensor_of(self._head, "weight"), torch.is_autocast_enabled(hidden.device.type)
        if self._casts and weight is not None and weight.dtype != hidden.dtype and not autocast:
            self.reason = f"its forward takes hidden states in {hidden.dtype} to a weight in {weight.dtype}"
        if self.reason is not None:
            self._try(hidden)
        rows = self._rows
        assert rows is not None
        self._values.append(probe_values(rows, hidden.shape[:-1].numel()).reshape(*hidden.shape[:-1], rows))
        return self._values[-1].to(hidden.device)

    def _try(self, hidden: Tensor) -> None:
        """Calls a head that is not linear: its rows, whether tokens are apart in it, whether it has a gradient."""
        head = self._head
        # For the gradients of a head that is not itself of inference mode.
        kept = any(t.is_inference() for t in (*head.parameters(), *head.buffers()))
        try:
            with torch.inference_mode(kept and torch.is_inference_mode_enabled()):
                x = hidden.detach().reshape(1, -1, hidden.shape[-1])
                # Two rows of tokens, for what is mixed may be those of a batch.
                x = torch.cat([x, x.flip(1)]).requires_grad_()
                logits = type(head).forward(head, x)
                alone = type(head).forward(head, x[:1, -1:])
                mixes = [mixes_tokens(x, logits)]
                # A head that does not run so has other parameters than an adapter's zeros.
                with contextlib.suppress(*_FILLED_FAILS), zeros_filled(head) as filled:
                    if filled:
                        mixes.append(mixes_tokens(x, type(head).forward(head, x)))
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            why = " ".join(str(error).split())
            raise refuse(self._model, head, f"its forward does not run on hidden states alone ({why})") from error
        if not isinstance(logits, Tensor) or logits.shape[:2] != x.shape[:2] or logits.dim() != 3:
            raise refuse(self._model, head, "its forward returns no logits of shape [B, T, V]")
        whole = logits[:1, -1:].detach().double()
        # Quantised heads round a token by its neighbours, without a gradient.
        near = bool((alone.detach().double() - whole).norm() <= 0.05 * whole.norm())
        if not near or any(mixes):
            raise refuse(
                self._model,
                head,
                "its forward mixes tokens (the logits of one depend on others of the batch), and the scored tokens go "
                "through it a chunk at a time; train the head whole, or keep such an adapter off it",
            )
        self._rows, self._width, self.differentiable = logits.shape[-1], hidden.shape[-1], mixes[0] is not None


def _info(
    head: nn.Module, transform: Transform, stream: int | None, own_forward: HeadForward | None, virtual_tokens: int
) -> HeadInfo:
    return HeadInfo(
        module=head,
        vocab_size=transform.vocab_size,
        scale=transform.scale,
        softcap=transform.softcap,
        bias_name=transform.bias_name,
        stream=stream,
        own_forward=own_forward,
        virtual_tokens=virtual_tokens,
    )


class FusedHead:
    """The head of one forward, with `compute` in its place; made by `fused_head`.

    Attributes:
        result: what `compute` returned, once the model has run. in_output: whether the model's output carries it.
    """

    def __init__(self, model: nn.Module, info: HeadInfo, compute: HeadCompute) -> None:
        self._model, self._info, self._compute = model, info, compute
        self._model_forward, self._head_forward = model.forward, getattr(info.module, forward_slot(info.module))
        self._thread = None if torch.compiler.is_compiling() else threading.get_ident()
        self.called = self.in_output = False
        self.result: Any = None
        self._length: int | None = None

    def _tensors(self) -> tuple[Tensor | HeadForward, Tensor | None]:
        info = self._info
        added = None
        if info.bias_name is not None:
            owner, _, name = info.bias_name.rpartition(".")
            added = tensor_of(self._model.get_submodule(owner), name)
        if info.own_forward is not None:
            return info.own_forward, added
        weight, bias = tensor_of(info.module, "weight"), tensor_of(info.module, "bias")
        assert weight is not None
        if info.vocab_size < weight.shape[0]:
            weight = weight[: info.vocab_size]
            bias = None if bias is None else bias[: info.vocab_size]
        if added is not None:
            bias = added if bias is None else bias + added
        return weight, bias

    def _elsewhere(self) -> bool:
        """Whether this is a call of another thread, which is none of ours."""
        return not torch.compiler.is_compiling() and self._thread not in (None, threading.get_ident())

    def head_forward(self, hidden: Tensor, **others: Any) -> Tensor:
        if self._elsewhere():
            return self._head_forward(hidden, **others)
        if self.called:
            raise refuse(self._model, self._info.module, "the model's forward calls it more than once")
        if others:
            raise refuse(self._model, self._info.module, f"it was called with {', '.join(others)} as well")
        self.called = True
        if torch.is_grad_enabled():
            check_backward_hooks(self._model, self._info.module)
        stream = self._info.stream
        scored = hidden if stream is None else hidden[:, stream]
        if scored.dim() != 3:
            shape = tuple(hidden.shape)
            raise refuse(self._model, self._info.module, f"it was called with hidden states of another shape, {shape}")
        virtual = self._info.virtual_tokens
        if self._length is not None and scored.shape[1] != virtual + self._length:
            seen = f"it was called with {scored.shape[1]} positions for {self._length} tokens"
            more = f" and {virtual} virtual ones" if virtual else ""
            raise refuse(self._model, self._info.module, f"{seen}{more} (has the active adapter changed?)")
        if virtual:
            scored = scored[:, virtual:]
        weight, bias = self._tensors()
        if bias is not None and bias.device != scored.device:  # where a device_map has put what stands behind the head
            bias = bias.to(scored.device)
        self.result = self._compute(scored.reshape(-1, scored.shape[-1]), weight, bias)
        # What the model still does to "its logits" touches one number a token, and is thrown away.
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    def model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._elsewhere():
            return self._model_forward(*args, **kwargs)
        ids = kwargs.get("input_ids")
        self._length = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
        output = self._model_forward(*args, **kwargs)
        if not self.called:
            seen = "the model's forward never calls it (has the active adapter changed, or been disabled?)"
            raise refuse(self._model, self._info.module, seen)
        # Wrappers hang their backward hooks on what the model returns, so the result must be in it.
        output.logits = self.result[0] if isinstance(self.result, tuple) else self.result
        self.in_output = True
        return output


@contextlib.contextmanager
def fused_head(model: nn.Module, compute: HeadCompute, info: HeadInfo | None = None) -> Iterator[FusedHead]:
    """Inside, a forward of `model` (or of a wrapper around it) computes `compute` instead of logits.

    ``output.logits`` is then the tensor that `compute` returned (the first of a tuple); use that one for the
    backward, and `FusedHead.result` for the rest. Labels must not be passed to the model.

    Args:
        model: the unwrapped model.
        compute: called in the head's place as ``compute(hidden [B * T, H], weight [V, H], bias [V] or None)``; with
            ``inspect_head(own_forward=True)`` the weight is a `HeadForward` where the head is not linear.
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
    found = inspect_head(model) if info is None else info
    with replaced_head(model, compute, found) as fused, _replaced_forward(model, fused.model_forward):
        yield fused


@contextlib.contextmanager
def replaced_head(model: nn.Module, compute: HeadCompute, info: HeadInfo) -> Iterator[FusedHead]:
    """`fused_head` but for the model's output, which is left as it comes: for callers that read `FusedHead.result`."""
    fused = FusedHead(model, info, compute)
    with _replaced_forward(info.module, fused.head_forward, forward_slot(info.module)):
        yield fused
