"""The forward that stands on an attached model's head: the loss of the call that a thread is in, else the head's own.

It is put there once. Which loss runs is no attribute that calls overwrite, so that several threads can call one model;
and torch.compile, which cannot trace an attribute that comes and goes, nor a ContextVar, traces a thread's own value.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn


class _Running(threading.local):
    """Both are there from the start, in every thread: a compiled graph asks whether they are."""

    def __init__(self) -> None:
        self.head: nn.Module | None = None
        self.forward: Callable[..., Any] | None = None


_running = _Running()


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The head's own by way of the class as it is now: FSDP2 changes it."""
    run = _running.forward
    if run is None or _running.head is not self:
        return type(self).forward(self, *args, **kwargs)
    return run(*args, **kwargs)


def install(head: nn.Module) -> None:
    """Puts the switch on a head whose forward is its class's; any other (a tensor-parallel one) stays."""
    own = vars(head).get("forward")
    if own is None or getattr(own, "__func__", None) in (forward, type(head).forward):
        head.forward = MethodType(forward, head)


def installed(head: nn.Module) -> bool:
    return getattr(vars(head).get("forward"), "__func__", None) is forward


def remove(head: nn.Module) -> None:
    if installed(head):
        del head.forward


@contextlib.contextmanager
def switched(head: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Inside, and in this thread alone, `run` is called in the forward's place of a head with a switch."""
    before = _running.head, _running.forward
    _running.head, _running.forward = head, run
    try:
        yield
    finally:
        _running.head, _running.forward = before
