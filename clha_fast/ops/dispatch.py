"""Which backend runs: the one asked for, or, for "auto", what a table says, each row with the origin of its choice.

A row is replaced by what `python -m benchmarks.gpu` or `python -m benchmarks.cpu` measured best for its case. On a GPU
"workspace" is faster where gradients are wanted, 3 matrix products for 4, and pays with memory, at most two more [V, H]
in float32: it is taken by calls of so few tokens that this is a small share of the device's (`token_limit`).

The choice is a function of a call's shapes, its settings and the device: nothing is read back and no process asks
another. Processes whose calls lie on both sides of the limit run different backends: nothing in these communicates.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal, NamedTuple

import torch

from clha_fast.backends import ROUTING
from clha_fast.backends.memory import Workspace
from clha_fast.backends.products import why_not_wide
from clha_fast.errors import BackendError

Backend = Literal["auto", "triton", "workspace", "torch", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "workspace", "torch", "reference")

# What Triton's interpreter computes as a GPU does; its bfloat16 it does not.
INTERPRETED: tuple[torch.dtype, ...] = (torch.float32, torch.float16)

# Tokens of a call, where there is no limit.
ANY_NUMBER = 2**62

logger = logging.getLogger("clha_fast")


class Rule(NamedTuple):
    """One row: the first that fits a call is taken.

    Attributes:
        device: "cuda" (ROCm included), or "" for every other.
        kernels: whether the Triton kernels can run on the call's device and dtype.
        gradients: whether the call returns a loss whose gradients are wanted; None for either.
        room: whether the workspace backend's memory for its tokens is within `ROOM` of the device's; None for either.
        backend: what is chosen. why: said in the log. origin: where the choice comes from.
    """

    device: str
    kernels: bool
    gradients: bool | None
    room: bool | None
    backend: str
    why: str
    origin: str


# Share of a device's memory that the workspace backend may take for "auto" to choose it.
ROOM = 1 / 16
_MEASURED = (
    "benchmarks/results/gpu.json, NVIDIA H200: 1.12 to 1.29 times the bare products, triton 1.38 to 1.68; "
    "gpu-h100.json, NVIDIA H100: 1.00 to 1.24, triton 1.36 to 1.78"
)
_MODEL = "by operations and memory counted; benchmarks/results/gpu.json and gpu-h100.json have its times on Hopper GPUs"
RULES = (
    Rule("cuda", True, True, True, "workspace", "gradients are wanted and its memory is there", _MEASURED),
    Rule("cuda", True, None, None, "triton", "a GPU and triton are there", _MODEL),
    Rule("", False, None, None, "torch", "", "benchmarks/results/cpu.json: 1.00 to 1.07 times the bare products"),
)


def choose(device_type: str, kernels: bool, gradients: bool, room: bool) -> Rule:
    """The row for a call; `kernels` only matters on a GPU, for the interpreter is never chosen."""
    kernels = kernels and device_type == "cuda"
    for rule in RULES:
        fits = rule.device in (device_type, "") and rule.kernels == kernels
        if fits and rule.gradients in (None, gradients) and rule.room in (None, room):
            return rule
    raise AssertionError("the last rows take every call")


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot take such tensors, None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if _interpreting() and dtype not in INTERPRETED:
        if device.type == "cuda":
            return "Triton's interpreter, which TRITON_INTERPRET=1 asks for, computes bfloat16 wrongly"
        return "Triton's interpreter computes bfloat16 wrongly: it needs a GPU, or float32 or float16"
    if device.type != "cuda":
        if _interpreting():
            return None
        return f"the tensors are on {device.type!r}: it needs a CUDA or ROCm device (or TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if name == "gfx942" else f"of AMD's GPUs it knows the tiles of gfx942 alone, got {name}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"it needs compute capability 8.0 or newer, got {major}.{minor}" if major < 8 else None


def _why_not_workspace(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the workspace backend cannot take such tensors, None when it can."""
    reason = _why_not_kernels(device, dtype)
    # Products of the interpreter's tensors are a CPU's, and widen.
    if reason is None and device.type == "cuda" and dtype.itemsize == 2:
        return why_not_wide(device, dtype)
    return reason


def _limit(memory: int, workspace: Workspace) -> int:
    """The most tokens for which the workspace takes at most `ROOM` of a device's memory; `ANY_NUMBER` for all."""
    tokens = workspace.fitting(int(ROOM * memory))
    return ANY_NUMBER if tokens is None else tokens


def planned(memory: int, workspace: Workspace, tokens: int) -> tuple[str, int]:
    """What "auto" takes for so many tokens on an NVIDIA GPU of `memory` bytes, gradients wanted; and `token_limit`."""
    limit = _limit(memory, workspace)
    return choose("cuda", True, True, tokens <= limit).backend, limit


def token_limit(
    device: str,
    dtype: torch.dtype,
    vocabulary: int,
    width: int,
    trains: bool = True,
    workspace_bytes: int | None = None,
) -> int:
    """Up to how many tokens a call takes "workspace" under "auto", where its gradients are wanted.

    Of all the device's memory, for what is free now changes from call to call and from process to process.

    Args:
        device: the tensors'. dtype: hidden's. vocabulary, width: of the weight [V, H]. trains: its gradient is wanted.
        workspace_bytes: `HeadOptions.workspace_bytes`.

    Returns:
        0 where it is never taken, `ANY_NUMBER` where always.
    """
    place = torch.device(device)
    if place.type != "cuda" or torch.version.hip is not None or _why_not_workspace(place, dtype) is not None:
        return 0  # its wide products were not tried on ROCm
    memory = torch.cuda.get_device_properties(place).total_memory
    return _limit(memory, Workspace(vocabulary, width, dtype.itemsize, workspace_bytes, trains))


def limit_text(limit: int) -> str:
    """What "auto" takes where gradients are wanted and a `token_limit` above 0 is known."""
    return "workspace" if limit >= ANY_NUMBER else f"workspace up to {limit:,} tokens in a call, triton beyond"


@functools.lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    logger.info(message)


def check_name(backend: str) -> None:
    """ValueError for a name that is none of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def resolve(
    backend: str,
    device: str,
    dtype: torch.dtype,
    *,
    gradients: bool = False,
    routed: bool = False,
    limit: int = 0,
    fits: bool = False,
) -> str:
    """The name of the backend to run: "triton", "workspace", "torch" or "reference".

    Args:
        backend: a name of `BACKENDS`. device: the tensors', such as "cpu" or "cuda:1". dtype: hidden's.
        gradients: a loss whose gradients are wanted, which a sweep can return with it.
        routed: `HeadOptions.max_dropped_mass` is given.
        limit: `token_limit` of the call. fits: its tokens are no more than that.

    Raises:
        ValueError: the name is unknown.
        BackendError: the backend asked for cannot run. A named backend never falls back.
    """
    check_name(backend)
    place = torch.device(device)
    if backend == "auto":
        reason = _why_not_kernels(place, dtype) if place.type == "cuda" else f"the device is {place.type}"
        sweeps = gradients and not routed
        taken = choose(place.type, reason is None, sweeps, fits)
        # Said once, whatever the numbers of tokens: in the same words on both sides of the limit.
        said = choose(place.type, reason is None, sweeps, limit > 0)
        name = limit_text(limit) if sweeps and limit > 0 else said.backend
        _say_once(f"backend auto: {name} ({said.why or reason}; {said.origin})")
        return taken.backend
    if backend in ("triton", "workspace"):
        reason = (_why_not_kernels if backend == "triton" else _why_not_workspace)(place, dtype)
        if reason is not None:
            hint = "; backend 'torch' is that path without kernels" if backend == "workspace" else ""
            raise BackendError(f"backend {backend!r} cannot run: {reason}{hint}")
    if routed and backend not in ROUTING:
        raise BackendError(
            f"backend {backend!r} forms every gradient whole: expected max_dropped_mass None or one of the backends "
            f"{', '.join(ROUTING)}"
        )
    return backend


# The answer depends on nothing but its arguments and the installation: a compiled graph may bake it in. This is all
# that torch.compiler.assume_constant_result does, except that it imports torch._dynamo first: seconds, and triton.
for _constant in (resolve, token_limit):
    vars(_constant)["_dynamo_marked_constant"] = True
