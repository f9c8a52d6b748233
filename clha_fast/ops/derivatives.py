"""Which derivatives there are: one backward pass, alone or under torch.func. Others are refused; none is a silent 0.

Torch's custom operators drop the tangents of forward mode, and know no `torch.func.grad`. While such a transform is on,
an operator runs as an `autograd.Function` instead, which torch.func takes apart level by level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The custom operators of this library, as they were made.
OPERATORS: list[Any] = []
REFERENCE = "use backend='reference'"


def transforming() -> bool:
    """Whether a transform of torch.func (vmap included) is on."""
    return torch._C._are_functorch_transforms_active()


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def refuse_dropped_tangents(name: str) -> None:
    """In an operator's body: RuntimeError where forward mode is on and nothing below takes its tangents.

    An `autograd.Function` runs its forward with forward mode off, and refuses by itself; what is left are calls of
    ``torch.ops.clha_fast`` by name, whose tangents torch drops.
    """
    if _forward_mode() and torch._C._is_fwd_grad_enabled():
        refuse_forward(name)


# torch.compile asks while it traces, where the answer is that of the call it traces.
vars(transforming)["_dynamo_marked_constant"] = vars(_forward_mode)["_dynamo_marked_constant"] = True


def plain(grad: Tensor) -> bool:
    """Whether an eager upstream gradient is one tensor of numbers: no batch of them, and at no level of torch.func."""
    return not transforming() and not torch._C._functorch.is_legacy_batchedtensor(grad)


def reverse_mode_alone(name: str) -> None:
    """RuntimeError under any transform, for what takes part in collectives."""
    if transforming() or _forward_mode():
        raise RuntimeError(f"{name}: expected a plain call for a head sharded over processes, got one under torch.func")


def refuse_second(name: str, way_out: str = REFERENCE) -> NoReturn:
    raise RuntimeError(f"{name}: no second derivative (create_graph=True, or one transform in another); {way_out}")


def refuse_forward(name: str, way_out: str = REFERENCE) -> NoReturn:
    raise RuntimeError(
        f"{name}: expected reverse mode (backward, torch.func.grad, vjp, jacrev), got forward mode (jvp, jacfwd, "
        f"make_dual); {way_out}"
    )


def as_function(
    name: str,
    forward: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    way_out: str = REFERENCE,
) -> Any:
    """A subclass of autograd.Function that every transform of torch.func takes, forward mode with a refusal.

    Under vmap it runs once for every element: kernels and sweeps take one batch.
    """

    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward(name, way_out)

    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        parts = []
        for at in range(info.batch_size):
            one = (a if dim is None else a.select(dim, at) for a, dim in zip(arguments, dims, strict=True))
            parts.append(made.apply(*one))
        if isinstance(parts[0], Tensor):
            return torch.stack(parts), 0
        return tuple(torch.stack(same) for same in zip(*parts, strict=True)), (0,) * len(parts[0])

    functions = {"forward": forward, "setup_context": setup, "backward": backward, "jvp": jvp, "vmap": vmap}
    methods = {key: staticmethod(value) for key, value in functions.items()}
    made: Any = type(f"Function_{name}", (torch.autograd.Function,), methods)
    return made


def backward_operator(name: str, operator: Callable[..., Any], refused: str) -> Callable[..., Any]:
    """An operator that is itself a backward pass, as it is to be called: its own derivative is refused.

    Args:
        refused: the name of what its second derivative would be.
    """

    def nothing_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None: ...

    def second(ctx: Any, *grads: Any) -> NoReturn:
        refuse_second(refused)

    return differentiable(name, operator, nothing_saved, second)


def differentiable(
    name: str, operator: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator with its derivatives registered, as it is to be called."""
    OPERATORS.append(operator)
    operator.register_autograd(backward, setup_context=setup)  # type: ignore[attr-defined]
    function = as_function(name, operator, setup, backward)

    def call(*arguments: Any) -> Any:
        if transforming() or _forward_mode():
            if torch.compiler.is_compiling():
                # All runs eagerly after it; under fullgraph=True the compiler gives this reason.
                torch._dynamo.graph_break(msg="a transform of torch.func around the fused losses is not compiled")
            return function.apply(*arguments)
        return operator(*arguments)

    return call
