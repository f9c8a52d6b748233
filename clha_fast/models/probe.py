"""What a model does to its head's result, read from known values before and after; and whether a head is linear."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LARGE = 1.0e4  # far in every softcap's flat part, and still a float16
_SMALL = 1.0e-3  # far in its linear part


class UnsupportedTransform(ValueError):
    """None of the known transforms gives the values seen."""


@dataclass(frozen=True)
class Transform:
    """softcap * tanh(scale * z / softcap), or scale * z, or z plus a bias; on the first `vocab_size` logits."""

    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    bias_name: str | None = None


def probe_values(rows: int, positions: int = 2) -> Tensor:
    """float32 [1, positions, rows]: all different, in [-8, 8] but for a few tiny and a few large ones in front."""
    # Multiples of the golden ratio modulo 1 spread evenly without a random state.
    steps = torch.arange(positions * rows, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    values = (16 * (steps - steps.floor()) - 8).reshape(1, positions, rows)
    special = torch.tensor([_LARGE, -_LARGE, _SMALL, -_SMALL], dtype=torch.float64)[:rows]
    values[:, :, : len(special)] = special
    return values.to(torch.float32)


def fit_transform(
    raw: Tensor, seen: Tensor, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Transform:
    """The transform that turned `raw` [1, 2, rows] of `probe_values` into `seen` [1, 2, V].

    Args:
        seen: if it needs a gradient, a parameter acts behind the head; it must be a bias.
        parameters, buffers: where an added bias is looked for.

    Raises:
        UnsupportedTransform: with what was seen.
    """
    size = seen.shape[-1]
    if size > raw.shape[-1] or size < 4:
        raise UnsupportedTransform(f"the model returns {size} logits for a head of {raw.shape[-1]} rows")
    trained = _trained_behind(seen, parameters)
    x, y = raw[0, :, :size].double(), seen.detach()[0].double().cpu()
    if not bool(torch.isfinite(y).all()):
        raise UnsupportedTransform("finite values of the head come out of the model as NaN or infinity")
    if not trained:
        if torch.equal(x, y):
            return Transform(size)
        fitted = _fit_scale(x, y) or _fit_softcap(x, y)
        if fitted is not None:
            return Transform(size, *fitted)
    name = _find_bias(x, y, trained, {**parameters, **buffers})
    if name is not None:
        return Transform(size, bias_name=name)
    pairs = ", ".join(f"{x[0, k]:.4g} -> {y[0, k]:.6g}" for k in range(0, size, max(1, size // 4)))
    behind = f" (trained behind it: {', '.join(trained)})" if trained else ""
    raise UnsupportedTransform(
        f"the model turns its result into something that is no scale, softcap or added bias: {pairs}{behind}"
    )


def is_linear(head: nn.Module) -> bool:
    """Whether `head`, whatever its class, computes hidden . weight^T + bias from parameters of these names alone.

    It is tried on random hidden states, in evaluation and in training mode, with its parameters in float32: values and
    all gradients must be those of `torch.nn.functional.linear` to 1e-5 of their norm. A module with anything inside it
    but these parameters is refused without a trial: a fresh LoRA adapter, for one, adds nothing yet.
    """
    parameters = dict(head.named_parameters())
    inside = next(head.children(), None) is not None or next(head.buffers(), None) is not None
    if inside or not {"weight"} <= parameters.keys() <= {"weight", "bias"}:
        return False
    # A subclass of Parameter may hold a quantised weight behind a floating face.
    if any(type(p) is not nn.Parameter or not p.is_floating_point() for p in parameters.values()):
        return False
    if parameters["weight"].dim() != 2:
        return False
    # In bfloat16 a factor of 1.01 would be lost in the rounding.
    tensors = {name: p.detach().float().requires_grad_() for name, p in parameters.items()}
    weight = tensors["weight"]
    hidden = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    inputs = [hidden.requires_grad_(), *tensors.values()]
    expected = _values_and_gradients(lambda: nn.functional.linear(hidden, **tensors), inputs)
    training = head.training
    try:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            for mode in (False, True):
                head.training = mode
                got = _values_and_gradients(lambda: torch.func.functional_call(head, tensors, (hidden,)), inputs)
                if not all(bool((g - e).norm() <= 1e-5 * e.norm()) for g, e in zip(got, expected, strict=True)):
                    return False
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # it asks for more than hidden states, returns another shape, or has no gradient
    finally:
        head.training = training
    return True


def mixes_tokens(x: Tensor, logits: Tensor) -> bool | None:
    """Whether a token's logits have a gradient for another token, of its row or of another.

    It is zero to the last bit where tokens are apart, quantised or not, unless a range of all has a gradient, too. What
    is not finite tells nothing.

    Args:
        x: [B, T, H], a leaf. logits: [B, T, V], what a head made of it, plain or a DTensor.

    Returns:
        None where `x` has no gradient at all.
    """
    if not isinstance(logits, Tensor) or logits.shape[:2] != x.shape[:2] or not logits.requires_grad:
        return None
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    # Not ones: what mixes by shares that add up to one would cancel.
    upstream = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    for place in ((0, 0), (-1, -1)):
        try:
            (grad,) = torch.autograd.grad(logits[place].float() @ upstream, x, retain_graph=True, allow_unused=True)
        except (RuntimeError, NotImplementedError):
            return None if place == (0, 0) else False  # there is one, which runs once
        if grad is None:
            return None
        grad[place] = 0
        if bool((grad.isfinite() & (grad != 0)).any()):
            return True
    return False


@contextlib.contextmanager
def zeros_filled(module: nn.Module) -> Iterator[bool]:
    """Inside, parameters that are all zero have other values (True for any): a fresh adapter's hide what it reads."""
    zeros = [
        p
        for p in module.parameters()
        if type(p) is nn.Parameter and p.is_floating_point() and p.itemsize > 1 and not (p.is_meta or bool(p.any()))
    ]
    own = [p.data for p in zeros]
    try:
        for p in zeros:
            draw = torch.Generator(p.device).manual_seed(0)
            p.data = torch.empty_like(p.data).uniform_(-0.1, 0.1, generator=draw)
        yield bool(zeros)
    finally:
        for p, data in zip(zeros, own, strict=True):
            p.data = data


def _values_and_gradients(linear: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        logits = linear()
        # Not ones: the rows of the weight's gradient would all be alike.
        upstream = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device)
        grads = torch.autograd.grad(logits, inputs, upstream.view_as(logits))
    return [logits.detach(), *grads]


def _trained_behind(seen: Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that the logits depend on once the head's result is a constant."""
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not seen.requires_grad or not trainable:
        return []
    grads = torch.autograd.grad(seen.sum(), list(trainable.values()), allow_unused=True)
    return [name for name, grad in zip(trainable, grads, strict=True) if grad is not None]


def _close(x: Tensor, y: Tensor, relative: float) -> bool:
    return bool(((x - y).abs() <= relative * y.abs() + 1e-7).all())


def _tidy(value: float, relative: float) -> float:
    """The shortest decimal, or inverse of one, within `relative` of `value`: what a configuration file said."""
    for digits in range(1, 8):
        for short in (float(f"{value:.{digits}g}"), 1 / float(f"{1 / value:.{digits}g}")):
            if abs(short - value) <= relative * abs(value):
                return short
    return value


def _fit_scale(x: Tensor, y: Tensor) -> tuple[float, float | None] | None:
    scale = float(y[0, 0] / x[0, 0])
    if scale == 0 or not _close(scale * x, y, 1e-6):
        return None
    return _tidy(scale, 2e-7), None


def _fit_softcap(x: Tensor, y: Tensor) -> tuple[float, float | None] | None:
    cap = float(y[0, 0])
    if not 0 < cap < _LARGE:
        return None
    # The slope is read where the curve bends least of all values that still carry all of float32's digits.
    middle = (y[0] - 0.3 * cap).abs()
    at = int(middle.argmin())
    ratio = float(y[0, at]) / cap
    if not 0 < ratio < 1:
        return None
    scale = _tidy(math.atanh(ratio) * cap / float(x[0, at]), 3e-6)
    cap = _tidy(cap, 2e-7)
    return (scale, cap) if _close(cap * torch.tanh(scale * x / cap), y, 1e-5) else None


def _find_bias(x: Tensor, y: Tensor, trained: list[str], tensors: Mapping[str, Tensor]) -> str | None:
    added = y - x
    # Adding to a large number rounds the small one away: each element is held to its own last digits.
    tolerance = 1e-6 * (x.abs() + y.abs()) + 1e-7
    for name in trained or list(tensors):
        tensor = tensors[name]
        if len(trained) > 1 or tensor.shape != (x.shape[-1],):
            continue
        if bool(((tensor.detach().double().cpu() - added).abs() <= tolerance).all()):
            return name
    return None
