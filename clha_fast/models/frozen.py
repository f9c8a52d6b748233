"""A frozen model's log-probabilities of the batches that another one trains on, by the same way through a head."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from clha_fast.batching.batch import CandidateBatch
from clha_fast.models.adapters import base_model, without_adapter
from clha_fast.models.embedding import UnsupportedHeadError
from clha_fast.models.forward import LogpForward
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.measure import measure_head
from clha_fast.models.sequence_parallel import SequenceParallel
from clha_fast.ops.dispatch import Backend


class FrozenModel:
    """A model that says what log-probabilities a batch's tokens have, forward alone, and never trains.

    Args:
        model: a causal language model, which is put into evaluation mode; with `adapter_off` a PeftModel that trains:
            it is run without its adapter, and is afterwards as it was.
        backend, temperature, workspace_bytes: as the loss has them.
        sequence: the processes over which the tokens of rows are spread, or None.

    Attributes:
        layouts: what its batches may be; padded rows, until it has settled something else.

    Raises:
        UnsupportedHeadError, BackendError: as `measure.measure_head`.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend = "auto",
        temperature: float = 1.0,
        workspace_bytes: int | None = None,
        adapter_off: bool = False,
        sequence: SequenceParallel | None = None,
    ) -> None:
        self.model, self._adapter_off = model, adapter_off
        if not adapter_off:
            model.eval()
        with self._as_it_runs() as inner:
            try:
                info = measure_head(inner, backend)
            except UnsupportedHeadError as error:
                raise UnsupportedHeadError(f"reference: {error}") from error
            head = info.options(temperature, workspace_bytes=workspace_bytes)
            self._forward = LogpForward(inner, info, head, backend, sequence)
        self.layouts = RowLayouts(inner, self._forward, inner, self._as_it_runs)

    def _as_it_runs(self) -> contextlib.AbstractContextManager[nn.Module]:
        return without_adapter(self.model) if self._adapter_off else contextlib.nullcontext(base_model(self.model))

    def __call__(self, batch: CandidateBatch) -> Tensor:
        """[N] nats, float32 or better, of the batch's scored tokens; errors as `forward.LogpForward`."""
        if not batch.targets.numel():
            return torch.zeros(0, dtype=torch.float32, device=batch.targets.device)
        batch = self.layouts.taken(batch)
        with self._as_it_runs() as inner:
            run = inner if self._adapter_off else self.model
            return self._forward(run, batch.model_inputs(), batch.targets, batch.row_index)
