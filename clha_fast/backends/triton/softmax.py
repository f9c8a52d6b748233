"""Launches of the kernels that pass over a workspace of logits: statistics, and the gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.backends.triton.combine import combine, token_statistics
from clha_fast.backends.triton.head import Head, tiles
from clha_fast.types import EntropySlopes
from csrc_triton import softmax

# Programs that keep a GPU's memory busy; where there are fewer tokens, their rows are cut into parts.
_PROGRAMS = 1024


def _splits(num_tokens: int, width: int, block: int) -> int:
    """Parts of a row, a power of two: few different ones, for each is compiled."""
    most = min(tiles(_PROGRAMS, max(1, num_tokens)), tiles(width, block))
    return 1 << (most.bit_length() - 1)


def statistics(
    z: Tensor, targets: Tensor, head: Head, temperature: Tensor | None = None, names: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logps [n] float32, lse [n] float64, statistics) of raw logits in the workspace z [n, width]; targets [n].

    `names` are of `types.STATISTICS`; temperature [n] or None. 0 for an ignored token, NaN for a target outside
    [0, V) that is not `ignore_index`.
    """
    count, width = z.shape
    config = head.config("statistics")
    splits = _splits(count, width, config["BLOCK_K"] * config["BLOCK_V"])
    block_peak, block_sum = (torch.empty(splits, count, dtype=torch.float32, device=z.device) for _ in range(2))
    target_logit = torch.empty(count, dtype=torch.float32, device=z.device)
    moments = torch.empty(3, splits, count, dtype=torch.float32, device=z.device) if names else None
    softmax.statistics_kernel[(count * splits,)](
        z,
        targets,
        block_peak,
        block_sum,
        target_logit,
        temperature,
        moments,
        count,
        head.weight.shape[0],
        width,
        z.stride(0),
        head.ignore_index,
        head.pre_scale,
        head.post_scale,
        HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
        HAS_TEMPERATURE=temperature is not None,
        MOMENTS=moments is not None,
        SPLITS=splits,
        **config,
    )
    logps, lse = combine(block_peak, block_sum, target_logit, targets, head)
    if moments is None:
        return logps, lse, {}
    values = token_statistics((block_peak, block_sum, target_logit, moments), lse, targets, head)
    return logps, lse, {name: values[name] for name in names}


def gradient(
    z: Tensor,
    targets: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    head: Head,
    temperature: Tensor | None = None,
    slopes: EntropySlopes | None = None,
) -> None:
    """Turns raw logits z [n, width] into coefficient_t * d logp_t / d (raw logits) / (pre * post scale), in place.

    Beside it the same of the entropies. Both coefficients [n] come divided by temperature [n].
    """
    count, width = z.shape
    config = head.config("gradient")
    splits = _splits(count, width, config["BLOCK_V"])
    softmax.gradient_kernel[(count * splits,)](
        z,
        targets,
        lse,
        coefficients,
        temperature,
        None if slopes is None else slopes.grad,
        None if slopes is None else slopes.entropy,
        head.weight.shape[0],
        width,
        z.stride(0),
        head.pre_scale,
        head.post_scale,
        HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
        HAS_TEMPERATURE=temperature is not None,
        HAS_ENTROPY=slopes is not None,
        SPLITS=splits,
        **config,
    )
