"""The dense backward where operands can come by tensor descriptors (TMA): the same walk, its three GEMMs persistent."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clha_fast.backends.triton.backward import Backward
from clha_fast.backends.triton.head import programs, round_up
from csrc_triton import persistent_backward


class PersistentBackward(Backward):
    """`Backward` for a head that `Head.is_persistent` says yes to."""

    prefix = "persistent_"

    def new_rows(self, padded: int) -> Tensor:
        # TMA wants rows that start on 16 bytes.
        return self.hidden.new_empty(padded, round_up(self.width, 8))[:, : self.width]

    def run(self) -> None:
        if self.partial is not None:
            self.config["weight_grad"] = self.head.config("persistent_weight_grad_partial")
        super().run()

    def _kernel(self, name: str) -> Any:
        return getattr(persistent_backward, f"persistent_{name}_kernel")

    def _grid(self, most: int) -> tuple[int]:
        return (min(programs(self.hidden.device), most),)

    def _operand(self, matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])

    def _by_pointers(self, config: dict[str, int], reads_weight: bool, **more: int) -> dict[str, Any]:
        return {}
