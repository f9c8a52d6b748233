"""Tensors with values that say they are on a GPU: the CUDA branches of the host code compute, on a CPU.

Operators run on the CPU, a matrix product with a wide result in that result's precision. Triton's kernels run in the
interpreter, with the tiles of the GPU's row of the table. Custom operators run their real functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from clha_fast import ops
from tests.support.no_gpu import refuse_nondeterministic, refuse_wide_product, told
from tests.support.powers import powers

GPU = torch.device("cuda", 0)
# What brings values to the host, or makes a shape of them.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "bincount")


class OnGPU(Tensor):
    """A tensor on device "cuda" whose numbers are those of `value`, on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnGPU:
        made = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=GPU,
        )
        made.value = value.detach()
        return made

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:
        raise AssertionError("outside of the GPU")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.value})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a GPU outside of it")


def _value(argument: Any) -> Any:
    if isinstance(argument, TensorDescriptor):
        return dataclasses.replace(argument, base=_value(argument.base))
    return argument.value if isinstance(argument, OnGPU) else argument


class ValueGPU(TorchDispatchMode):
    """Inside, device "cuda" computes; `reads` are the operators by which the host waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        # Whether the kernels take the path that a GPU takes; otherwise the interpreter's, as with TRITON_INTERPRET=1.
        self.compiled = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return GPU
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func.namespace == "clha_fast":
            definition = next(d for d in ops.OPERATORS if d._opoverload is func)
            with self:
                return definition._init_fn(*args, **kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        place, name = kwargs.get("device"), func.overloadpacket.__name__
        given = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        here = any(isinstance(a, OnGPU) for a in given)
        strangers = [a for a in given if not isinstance(a, OnGPU) and a.dim()]
        if place is not None:
            # "meta" is the device guard's answer to "cuda" without an index.
            to_gpu = torch.device(place).type in ("cuda", "meta")
            kwargs["device"] = torch.device("cpu")
        else:
            to_gpu = here
            assert not (here and strangers) or name in ("copy_", "index"), f"{func} mixes devices"
        masked = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if here and (name in READS or masked or not to_gpu):
            self.reads.append(name)
        if here:
            refuse_nondeterministic(func, args, kwargs)
        result = self._compute(func, *tree_map(_value, (args, kwargs)))
        if not to_gpu:
            return result
        own = {id(a.value): a for a in given if isinstance(a, OnGPU)}

        def wrap(r: Any) -> Any:
            if not isinstance(r, Tensor):
                return r
            return own[id(r)] if id(r) in own else OnGPU(r)

        return tree_map(wrap, result)

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm") and "dtype" in func._overloadname:
            *tensors, wide = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
            refuse_wide_product(tensors[-1].dtype)
            product = torch.mm if len(tensors) == 2 else torch.addmm
            assert all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors[-2:])
            return product(*(t.to(wide) for t in tensors), **kwargs)
        return func(*args, **kwargs)

    def _tensor(self, make: Any, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """`torch.tensor` and `torch.as_tensor`, which copy below the dispatcher."""
        if isinstance(data, OnGPU):
            return data.to(device)
        made: Tensor = make(data, **kwargs)
        if device is None or torch.device(device).type == "cpu":
            return made
        self.reads.append(make.__name__)
        return OnGPU(made)

    def _tolist(self, tensor: OnGPU) -> Any:
        self.reads.append("tolist")
        return tensor.value.tolist()

    @contextlib.contextmanager
    def here(self, capability: int = 90) -> Iterator[ValueGPU]:
        """The device exists inside; three programs of a persistent kernel run at once, so that they loop."""
        launch = interpreter.GridExecutor.__call__

        def interpret(executor: Any, *args: Any, **kwargs: Any) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                launch(executor, *map(_value, args), **{name: _value(value) for name, value in kwargs.items()})

        with told(capability, 3), contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", interpret))
            if self.compiled:
                stack.enter_context(mock.patch.object(interpreter.InterpreterBuilder, "create_inline_asm", powers))
                stack.enter_context(mock.patch("clha_fast.backends.triton.head.is_interpreted", return_value=False))
            for make in (torch.tensor, torch.as_tensor):
                made = functools.partial(self._tensor, make)
                stack.enter_context(mock.patch.object(torch, make.__name__, made))
            stack.enter_context(mock.patch.object(OnGPU, "tolist", lambda tensor: self._tolist(tensor)))
            # Eager tensors, not those of a compiler's trace.
            stack.enter_context(mock.patch("clha_fast.ops.loss.Tensor", OnGPU))
            yield stack.enter_context(self)
