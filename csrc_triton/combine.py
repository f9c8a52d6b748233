"""From block statistics to log-probabilities: a token's needs all of its vocabulary blocks, hence a launch of its own.

What an objective's kernels count without a logit is done by further programs of the same launch.
"""

import triton
import triton.language as tl

from csrc_triton.clha import count_prompt


@triton.jit(do_not_specialize=["N", "C", "num_blocks"])
def combine_kernel(
    block_peak_ptr,
    block_sum_ptr,
    target_logit_ptr,
    targets_ptr,
    logps_ptr,
    lse_ptr,
    token_ends_ptr,
    prompt_ends_ptr,
    rewards_ptr,
    lengths_ptr,
    pair_counts_ptr,
    N,
    C,
    num_blocks,
    ignore_index,
    reward_margin,
    HAS_PROMPTS: tl.constexpr,
    HAS_REWARDS: tl.constexpr,
    NOISE: tl.constexpr,
    REDUCE: tl.constexpr,
    COUNT_PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Programs [0, cdiv(N, BLOCK_N)): lse [N] float64 and logps [N]. The programs after them: one prompt's counts each.

    lengths [C] int32 is written; pair_counts is added to and must come zeroed: [D] int32, or [1] for the pair mean.
    """
    pid = tl.program_id(0)
    token_tiles = tl.cdiv(N, BLOCK_N)
    if pid < token_tiles:
        n = pid.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_token = n < N
        peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float64)
        for b0 in range(0, num_blocks, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            inside = (b < num_blocks)[:, None] & is_token[None, :]
            block = b.to(tl.int64)[:, None] * N + n[None, :]
            block_peak = tl.load(block_peak_ptr + block, mask=inside, other=float("-inf"))
            block_sum = tl.load(block_sum_ptr + block, mask=inside, other=0.0)
            higher = tl.maximum(peak, tl.max(block_peak, axis=0))
            # As in the forward kernel: nothing but -inf so far is a sum of 0, not NaN.
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            share = block_sum * tl.exp(block_peak - anchor[None, :])
            total = total * tl.exp(peak - anchor).to(tl.float64) + tl.sum(share.to(tl.float64), axis=0)
            peak = higher
        log_total = tl.log(total)
        target = tl.load(targets_ptr + n, mask=is_token, other=0)
        logit = tl.load(target_logit_ptr + n, mask=is_token, other=0.0)
        logp = (logit.to(tl.float64) - peak) - log_total
        tl.store(lse_ptr + n, peak.to(tl.float64) + log_total, mask=is_token)
        tl.store(logps_ptr + n, tl.where(target == ignore_index, 0.0, logp.to(tl.float32)), mask=is_token)
    else:
        if HAS_PROMPTS:
            count_prompt(
                pid - token_tiles,
                targets_ptr,
                token_ends_ptr,
                prompt_ends_ptr,
                rewards_ptr,
                lengths_ptr,
                pair_counts_ptr,
                N,
                C,
                ignore_index,
                reward_margin,
                HAS_REWARDS,
                NOISE,
                REDUCE,
                COUNT_PAIRS,
                BLOCK_C,
                BLOCK_T,
            )
