"""The launch that turns block statistics into log-probabilities, whatever the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.backends.triton.clha import CLHARanking
from clha_fast.backends.triton.head import Head, tiles
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
