"""Errors of the library that are not plain ValueErrors."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def out_of_memory(error: BaseException) -> bool:
    """Of a device, of torch on the CPU (which has no class of its own for it), or of Python."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
