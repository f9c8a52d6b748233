"""Triton's interpreter without the search that it makes at every step, and took more time than the kernels.

It puts functions of its own in the place of `triton.language`'s builtins at each launch, and again at each call of a
jitted function within one, each `tl.sum` among them: it walks every member of five modules and classes. What there is
to replace is the same each time, and a launch needs it once.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# Before the first launch: what it replaces is no builtin any more, and in a launch's own calls that stays so.
_NAMES = {
    package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
}


def mend() -> None:
    """Replaces the interpreter's search by one over the names that it would find, once a launch and module."""
    launch, patch, find = interpreter.GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype
    patched: set[int] = set()
    types: dict[str, Any] = {}

    def patch_builtin(package: Any, *others: Any) -> None:
        for name in _NAMES[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *others)

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
