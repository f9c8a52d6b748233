"""What a driver knows of a GPU, told where there is none: for tensors that only say that they are on one."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

# Places in torch's table of device guards.
_CUDA, _META = 1, 14


def _set_device_guard() -> None:
    """A build without CUDA has no guard for its devices; the one for meta tensors does nothing, as is right here."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[_CUDA] is None:
        guards[_CUDA] = guards[_META]


def refuse_wide_product(dtype: torch.dtype) -> None:
    """Says of a product of 16 bits with a float32 result what torch's ATen/cuda/CUDABlas.cpp says of it."""
    if torch.version.hip is not None:
        return
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
        raise RuntimeError(
            "gemm input type at::BFloat16 and output type float is only supported for CUDA devices with compute "
            "capability 8.0 or higher"
        )
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        raise RuntimeError(
            "gemm input type at::Half and output type float is not supported with allowFP16AccumulationCuBLAS"
        )


def refuse_nondeterministic(func: Any, args: Any, kwargs: Any) -> None:
    """Says of an operator on a GPU what torch says under `torch.use_deterministic_algorithms(True)`.

    Of its documented list those that losses might take; a sum of whole numbers is the same in any order.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    name = func.overloadpacket.__name__.removesuffix("_")
    kernel = {"kthvalue": "kthvalue CUDA", "histc": "_histc_cuda", "put": "put_"}.get(name)
    if name == "cumsum":
        out = kwargs.get("out")
        made = kwargs.get("dtype") or (args[0] if out is None else out).dtype
        kernel = "cumsum_cuda_kernel" if made.is_floating_point or made.is_complex else None
    elif name == "bincount" and ((len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None):
        kernel = "_bincount_cuda"
    if kernel is not None:
        raise RuntimeError(
            f"{kernel} does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'"
        )


@contextlib.contextmanager
def told(capability: int, multiprocessors: int, memory: int = 80 * 2**30) -> Iterator[None]:
    """Inside, torch.cuda answers for one device of that compute capability (75, 80, 90, 100), or AMD's gfx942 (942)."""
    _set_device_guard()
    known = {"multi_processor_count": multiprocessors, "total_memory": memory}
    is_amd = capability == 942
    name = "gfx942" if is_amd else f"sm_{capability}"
    properties = SimpleNamespace(name=f"{name}, not there", gcnArchName=name, **known)
    facts = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: divmod(94 if is_amd else capability, 10),
        "get_device_properties": lambda device=None: properties,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, fact in facts.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fact))
        stack.enter_context(mock.patch.object(torch.version, "hip", "6.4" if is_amd else None))
        yield
