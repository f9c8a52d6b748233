"""Triton's interpreter without the work that it does again at every step, and took more time than the kernels.

It puts functions of its own in the place of `triton.language`'s builtins at each launch, and again at each call of a
jitted function within one, each `tl.sum` among them: it walks every member of five modules and classes. What there is
to replace is the same each time, and a launch needs it once. Every value that a kernel makes is a tensor with a type,
whose shape the language checks, copies and wraps: what a shape comes to is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Before the first launch: what it replaces is no builtin any more, and in a launch's own calls that stays so.
_NAMES = {
    package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
}
# What is no constant expression and holds none.
_PLAIN = {int, float, bool, str, type(None), tl.dtype, tl.block_type, tl.pointer_type, tl.tensor}
# Types that operators compute in where both operands have them, in a division as well; and their numbers.
_FLOATS = {tl.float32.name, tl.float64.name}
_RANGES = {kind.name: range(kind.get_int_min_value(), kind.get_int_max_value() + 1) for kind in (tl.int32, tl.int64)}
_OWN = {*_FLOATS, *_RANGES, tl.int1.name}


def mend() -> None:
    """Replaces the interpreter's search by one over the names that it would find, once a launch and module."""
    launch, patch, find = interpreter.GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype
    patched: set[int] = set()
    types: dict[str, Any] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in _NAMES[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                scope.set_attr(package, name, _called(member))

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)
        return None

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    def numpy_type(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in types:
            types[scalar.name] = find(scalar)
        return types[scalar.name]

    # It works out whether an int overflows and then, unless it is to debug, drops the answer.
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._get_np_dtype = numpy_type
    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    _keep_shapes()
    _keep_types()
    _keep_widths()


def _called(member: Any) -> Callable[..., Any]:
    """A builtin as the interpreter calls it, by way of nothing that only asks whether it is called by a kernel."""
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    return call


def _keep_shapes() -> None:
    """Of a block's type its checked shape, its size and its name; of a tensor its shape of constant expressions."""
    unwrap, begin, begin_block = tl.core._unwrap_if_constexpr, tl.tensor.__init__, tl.block_type.__init__
    blocks: dict[Any, Any] = {}
    tensors: dict[Any, Any] = {}

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in _PLAIN else unwrap(value)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        # By their types as well: True and 1.0 are no sizes, and equal one.
        sizes = [unwrapped(size) for size in shape]
        key = (element_ty.name, *sizes, *map(type, sizes))
        if key not in blocks:
            begin_block(self, element_ty, shape)
            blocks[key] = (self.shape, self.numel, self.name)
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        shape = (*kind.shape.values,) if kind.is_block() else ()
        if shape not in tensors:
            begin(self, handle, kind)
            tensors[shape] = (self.numel, self.shape)
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = tensors[shape]

    tl.core._unwrap_if_constexpr = unwrapped
    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor


def _keep_types() -> None:
    """Of two scalar types the one that an operator of both computes in; operands of one type are only called as large.

    numpy makes them so where it computes: of two, one has what the other lacks.
    """
    find, equal = TritonSemantic.computation_type_impl, tl.dtype.__eq__
    check = TritonSemantic.binary_op_type_checking_impl
    found: dict[Any, Any] = {}
    together: dict[Any, Any] = {}

    def computed(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
        if key not in found:
            found[key] = find(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return found[key]

    def number(value: Any, beside: Any) -> Any:
        """`value` as an operand beside a tensor that keeps its type, or None."""
        if type(beside) is not tl.tensor:
            return None
        name, kind = beside.dtype.name, type(value)
        is_real = name in _FLOATS and kind in (int, float)
        if not is_real and (kind is not int or value not in _RANGES.get(name, ())):
            return None
        data = np.array([value or 0], interpreter._get_np_dtype(beside.dtype))  # -0.0 is 0 there, too
        return tl.tensor(interpreter.TensorHandle(data, beside.dtype), beside.type)

    def operands(self: Any, a: Any, b: Any, *settings: Any, **named: Any) -> Any:
        if type(a) is not tl.tensor:
            made = number(a, b)
            return check(self, a, b, *settings, **named) if made is None else (made, b)
        if type(b) is not tl.tensor:
            made = number(b, a)
            return check(self, a, b, *settings, **named) if made is None else (a, made)
        if a.dtype.name != b.dtype.name or a.dtype.name not in _OWN:
            moves = settings[:1] == (True,) and a.dtype.is_ptr() and b.dtype.name in _RANGES
            if not moves:  # a pointer
                return check(self, a, b, *settings, **named)
        if a.shape is b.shape:  # which `_keep_shapes` has one of
            return a, b
        if not a.type.is_block():
            return tl.tensor(a.handle, b.type.with_element_ty(a.dtype)), b
        if not b.type.is_block():
            return a, tl.tensor(b.handle, a.type.with_element_ty(b.dtype))
        sizes = (a.handle.data.shape, b.handle.data.shape)
        if sizes not in together:
            together[sizes] = self.broadcast_impl_value(a, b)[0].type.shape
        both = together[sizes]
        return tuple(tl.tensor(one.handle, tl.block_type(one.dtype, both)) for one in (a, b))

    def equals(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    TritonSemantic.computation_type_impl = computed
    TritonSemantic.binary_op_type_checking_impl = operands
    tl.dtype.__eq__ = equals


def _keep_widths() -> None:
    """The largest number of bytes that an element of a type may have."""
    check = interpreter.TensorHandle.__post_init__
    widths: dict[str, float] = {}

    def checked(self: Any) -> None:
        name = self.dtype.name
        if name not in widths:
            is_pointer = isinstance(self.dtype, tl.pointer_type)
            widths[name] = float("inf") if is_pointer else max(8, self.dtype.primitive_bitwidth) / 8
        if self.data.itemsize > widths[name]:
            check(self)

    interpreter.TensorHandle.__post_init__ = checked
