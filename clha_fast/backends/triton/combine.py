"""The launch that turns block statistics into log-probabilities, whatever the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.backends.triton.clha import CLHARanking
from clha_fast.backends.triton.head import Head, tiles
from clha_fast.types import STATISTICS
from csrc_triton import clha
from csrc_triton import combine as kernels

# No counting beside it.
_NO_RANKING = {
    "HAS_REWARDS": False,
    "NOISE": clha.NOISE_NONE,
    "REDUCE": clha.REDUCE_SUM,
    "COUNT_PAIRS": False,
}


def combine(
    block_peak: Tensor,
    block_sum: Tensor,
    target_logit: Tensor,
    targets: Tensor,
    head: Head,
    ranked: CLHARanking | None = None,
) -> tuple[Tensor, Tensor]:
    """(logps [N] float32, lse [N] float64) of block statistics [blocks, N]; the same launch does `ranked.count()`."""
    logps, lse = torch.empty_like(target_logit), torch.empty_like(target_logit, dtype=torch.float64)
    num_tokens = logps.shape[0]
    config = head.config("combine")
    programs = tiles(num_tokens, config["BLOCK_N"]) + (0 if ranked is None else ranked.num_prompts)
    if programs:
        kernels.combine_kernel[(programs,)](
            block_peak,
            block_sum,
            target_logit,
            targets,
            logps,
            lse,
            None if ranked is None else ranked.token_ends,
            None if ranked is None else ranked.prompt_ends,
            None if ranked is None else ranked.rewards,
            None if ranked is None else ranked.lengths,
            None if ranked is None else ranked.pair_counts,
            num_tokens,
            0 if ranked is None else ranked.num_candidates,
            block_peak.shape[0],
            head.ignore_index,
            0.0 if ranked is None else float(ranked.options.reward_margin),
            HAS_PROMPTS=ranked is not None,
            **(_NO_RANKING if ranked is None else ranked.count_flags),
            **config,
        )
    return logps, lse


def token_statistics(
    blocks: tuple[Tensor, Tensor, Tensor, Tensor | None], lse: Tensor, targets: Tensor, head: Head
) -> dict[str, Tensor]:
    """`STATISTICS` [N] float32 of block peaks, sums [blocks, N], target logits [N] and moments [3, blocks, N]."""
    block_peak, block_sum, target_logit, moments = blocks
    num_tokens = target_logit.shape[0]
    values = torch.empty(len(STATISTICS), num_tokens, dtype=torch.float32, device=lse.device)
    config = head.config("token_statistics")
    if num_tokens:
        kernels.token_statistics_kernel[(tiles(num_tokens, config["BLOCK_N"]),)](
            block_peak,
            block_sum,
            moments,
            target_logit,
            targets,
            lse,
            values,
            num_tokens,
            head.weight.shape[0],
            block_peak.shape[0],
            head.ignore_index,
            **config,
        )
    return dict(zip(STATISTICS, values, strict=True))
