"""What `backend="auto"` chooses: one table, each row with the origin of its choice.

A row is replaced by what `python -m benchmarks.gpu` or `python -m benchmarks.cpu` measured best for its case. On a GPU
"workspace" is predicted to be faster where gradients are wanted, for the memory of two more [V, H] in float32
(`python -m benchmarks.roofline`); it is not chosen before that has been measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One row: the first that fits a call is taken.

    Attributes:
        device: "cuda" (ROCm included), or "" for every other.
        kernels: whether the Triton kernels can run on the call's device and dtype.
        gradients: whether the call returns a loss whose gradients are wanted; None for either.
        backend: what is chosen. why: said in the log. origin: where the choice comes from.
    """

    device: str
    kernels: bool
    gradients: bool | None
    backend: str
    why: str
    origin: str


_MODEL = "the least memory; no path was measured on a GPU so far"
RULES = (
    Rule("cuda", True, None, "triton", "a GPU and triton are there", _MODEL),
    Rule("", False, None, "torch", "", "benchmarks/results/cpu.json: 1.08 to 1.12 times the bare matrix products"),
)


def choose(device_type: str, kernels: bool, gradients: bool) -> Rule:
    """The row for a call; `kernels` only matters on a GPU, for the interpreter is never chosen."""
    kernels = kernels and device_type == "cuda"
    for rule in RULES:
        fits = rule.device in (device_type, "") and rule.kernels == kernels
        if fits and rule.gradients in (None, gradients):
            return rule
    raise AssertionError("the last rows take every call")
