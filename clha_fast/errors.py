"""Errors of the library that are not plain ValueErrors."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""
