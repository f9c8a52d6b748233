"""What the Triton backend's forward and backward share: the device's row of the table, and the head's arguments."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clha_fast.errors import BackendError
from clha_fast.options import HeadOptions
from clha_fast.types import HeadInputs
from csrc_triton import backward, configs


def tiles(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def round_up(size: int, block: int) -> int:
    """The size of the blocks that cover `size`."""
    return tiles(size, block) * block


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on whatever device the tensors are."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(device: torch.device) -> str:
    """The row of the table that serves a device."""
    if device.type != "cuda":
        if is_interpreted():
            return "interpreter"
        raise BackendError(f"backend 'triton' needs a CUDA or ROCm device or TRITON_INTERPRET=1, got {device}")
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name != "gfx942":
            raise BackendError(f"backend 'triton' has tiles for gfx942 alone among AMD's GPUs, got {name}")
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BackendError(f"backend 'triton' needs compute capability 8.0 or newer, got {major}.{minor}")
    # Consumer Blackwell (12.x) has the shared memory and the tensor-core instructions of the 8.x family.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def matmul_precision(device: torch.device) -> str:
    """How tl.dot multiplies float32: as torch's own matmul is set to."""
    if device.type != "cuda" or torch.version.hip:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9, where reading the older flag may raise
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _is_aligned(matrix: Tensor) -> bool:
    """Whether rows are contiguous and start on 16 elements, as Triton's widest loads want them."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0


def programs(device: torch.device) -> int:
    """The grid of a persistent kernel: as many programs as run at once. The interpreter's few show that they loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def has_descriptor(matrix: Tensor) -> bool:
    """Whether TMA can address a matrix: 16-bit, contiguous rows that start on 16 bytes, apart, not empty."""
    return (
        matrix.itemsize == 2
        and matrix.shape[1] > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class Head:
    """The arguments that the kernels of forward and backward share, made ready for a launch."""

    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    row_index: Tensor | None
    temperature: Tensor | None
    ignore_index: int
    pre_scale: float
    post_scale: float
    arch: str
    tile_class: str
    is_wide: bool
    hidden_descriptor: bool
    weight_descriptor: bool
    flags: dict[str, Any]

    @classmethod
    def of(cls, inputs: HeadInputs, head: HeadOptions) -> Head:
        hidden, weight, bias, targets, row_index, temperature = inputs
        if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                "hidden: expected float32, float16 or bfloat16 for backend 'triton', "
                f"got {str(hidden.dtype).removeprefix('torch.')} (backend 'torch' takes it)"
            )
        # f(z) = post * tanh(pre * z), or post * (pre * z): two factors carry scale, softcap and temperature.
        if head.softcap is None:
            pre, post = head.scale / head.temperature, 1.0
        else:
            pre, post = head.scale / head.softcap, head.softcap / head.temperature
        # No tile is longer than 256: below this stride, offsets within one fit int32.
        is_wide = max(weight.stride()) >= 2**22
        fast = hidden.itemsize == 2 and hidden.shape[1] % 16 == 0 and not is_wide
        return cls(
            weight=weight,
            bias=None if bias is None else bias.contiguous(),
            targets=targets.contiguous(),
            row_index=None if row_index is None else row_index.contiguous(),
            temperature=None if temperature is None else temperature.contiguous(),
            ignore_index=head.ignore_index,
            pre_scale=pre,
            post_scale=post,
            arch=architecture(hidden.device),
            tile_class="16-bit" if fast and _is_aligned(hidden) and _is_aligned(weight) else "fp32",
            is_wide=is_wide,
            hidden_descriptor=row_index is None and has_descriptor(hidden),
            weight_descriptor=has_descriptor(weight),
            flags={
                "HAS_BIAS": bias is not None,
                "HAS_SOFTCAP": head.softcap is not None,
                "PRECISION": matmul_precision(hidden.device),
                "POSITIVE": head.scale > 0,
                "PTX": architecture(hidden.device).startswith("sm_") and not is_interpreted(),
            },
        )

    @property
    def is_persistent(self) -> bool:
        """Whether the persistent kernels run (not in the routed backward): TMA in hardware, a weight it can address.

        Hidden states that it cannot address, or that `row_index` scatters, are copied into rows that it can.
        """
        return self.weight_descriptor and self.arch in configs.PERSISTENT["persistent_forward"]

    @property
    def is_persistent_backward(self) -> bool:
        """Whether the persistent kernels run in the dense backward, too: rows of gradients start on 16 elements.

        Where they do not, every element is stored on its own, and the addresses push the sums out of the registers.
        """
        return self.is_persistent and self.weight.shape[1] % 16 == 0

    def config(self, kernel: str, statistics: bool = False) -> dict[str, int]:
        """Launch arguments of a kernel; those that form logits have an entry of their own for a softcap or a bias.

        And one for `statistics`, or a temperature for each token, whatever else there is.
        """
        if (
            statistics or self.temperature is not None
        ) and f"{kernel}_statistics" in configs.GEMMS | configs.PERSISTENT:
            return configs.select(f"{kernel}_statistics", self.arch, self.tile_class)
        extended = self.flags["HAS_SOFTCAP"] or self.flags["HAS_BIAS"]
        if extended and f"{kernel}_softcap" in configs.GEMMS | configs.PERSISTENT:
            kernel = f"{kernel}_softcap"
        return configs.select(kernel, self.arch, self.tile_class)


def scaled(values: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = factor * values, both contiguous and of one size, values in float32, rounded once; factor [].

    `torch.mul` of a tensor by a number on the device, into another dtype, took three times what its bytes need on an
    H200 (2.5 ms for 525 M numbers).
    """
    if values.numel():
        config = configs.select("scale", architecture(values.device), "16-bit")
        with on(values.device):
            backward.scale_kernel[(tiles(values.numel(), config["BLOCK"]),)](
                values, factor, out, values.numel(), **config
            )
    return out


def gather(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    first_token: int = 0,
    order: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """rows [K, H] = the hidden states of tokens first_token and after, zeros behind the last.

    With `order` [N] and `count` [] int32: of the first `count` tokens in that order instead.
    """
    config, (padded, width) = head.config("gather"), (rows.shape[0], hidden.shape[1])
    backward.gather_kernel[(tiles(padded, config["BLOCK_N"]) * tiles(width, config["BLOCK_H"]),)](
        hidden,
        head.row_index,
        order,
        count,
        rows,
        first_token,
        hidden.shape[0],
        head.targets.shape[0],
        padded,
        width,
        *hidden.stride(),
        rows.stride(0),
        HAS_ROW_INDEX=head.row_index is not None,
        HAS_ORDER=order is not None,
        **config,
    )
