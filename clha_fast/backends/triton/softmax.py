"""Launches of the kernels that pass over a workspace of logits: statistics, and the gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.backends.triton.combine import combine
from clha_fast.backends.triton.head import Head, round_up, tiles
from csrc_triton import softmax

# Programs that keep a GPU's memory busy; where there are fewer tokens, their rows are cut into parts.
_PROGRAMS = 1024


def padded_width(vocabulary: int) -> int:
    """Elements from one row of the workspace to the next: rows start on 128 bytes for any vocabulary."""
    return round_up(vocabulary, 64)


def _splits(num_tokens: int, width: int, block: int) -> int:
    """Parts of a row, a power of two: few different ones, for each is compiled."""
    most = min(tiles(_PROGRAMS, max(1, num_tokens)), tiles(width, block))
    return 1 << (most.bit_length() - 1)


def statistics(z: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(logps [n] float32, lse [n] float64) of raw logits in the workspace z [n, width]; targets [n].

    0 for an ignored token, NaN for a target outside [0, V) that is not `ignore_index`.
    """
    count, width = z.shape
    config = head.config("statistics")
    splits = _splits(count, width, config["BLOCK_K"] * config["BLOCK_V"])
    block_peak, block_sum = (torch.empty(splits, count, dtype=torch.float32, device=z.device) for _ in range(2))
    target_logit = torch.empty(count, dtype=torch.float32, device=z.device)
    softmax.statistics_kernel[(count * splits,)](
        z,
        targets,
        block_peak,
        block_sum,
        target_logit,
        count,
        head.weight.shape[0],
        width,
        z.stride(0),
        head.ignore_index,
        head.pre_scale,
        head.post_scale,
        HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
        SPLITS=splits,
        **config,
    )
    return combine(block_peak, block_sum, target_logit, targets, head)


def gradient(z: Tensor, targets: Tensor, lse: Tensor, coefficients: Tensor, head: Head) -> None:
    """Turns raw logits z [n, width] into coefficient_t * d logp_t / d (raw logits) / (pre * post scale), in place."""
    count, width = z.shape
    config = head.config("gradient")
    splits = _splits(count, width, config["BLOCK_V"])
    softmax.gradient_kernel[(count * splits,)](
        z,
        targets,
        lse,
        coefficients,
        head.weight.shape[0],
        width,
        z.stride(0),
        head.pre_scale,
        head.post_scale,
        HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
        SPLITS=splits,
        **config,
    )
