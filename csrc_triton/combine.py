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


@triton.jit(do_not_specialize=["N", "num_blocks"])
def token_statistics_kernel(
    block_peak_ptr,
    block_sum_ptr,
    block_moments_ptr,
    target_logit_ptr,
    targets_ptr,
    lse_ptr,
    values_ptr,
    N,
    V,
    num_blocks,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """values [4, N] float32: entropy, sum of p^2, mean logit, whether no logit is above the target's; 0 if ignored.

    With d = block_peak - lse of a block and moments (a, q, s) of it, its share of the entropy is
    -exp(d) (a + d block_sum), and of the sum of p^2 exp(2 d) q. NaN where the log-probability is.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = n < N
    lse = tl.load(lse_ptr + n, mask=is_token, other=0.0)
    highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float64)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    sums = tl.zeros((BLOCK_N,), tl.float64)
    size = num_blocks.to(tl.int64) * N
    for b0 in range(0, num_blocks, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        inside = (b < num_blocks)[:, None] & is_token[None, :]
        block = b.to(tl.int64)[:, None] * N + n[None, :]
        peak = tl.load(block_peak_ptr + block, mask=inside, other=float("-inf"))
        total = tl.load(block_sum_ptr + block, mask=inside, other=0.0).to(tl.float64)
        weighted = tl.load(block_moments_ptr + block, mask=inside, other=0.0).to(tl.float64)
        squared = tl.load(block_moments_ptr + size + block, mask=inside, other=0.0).to(tl.float64)
        logits = tl.load(block_moments_ptr + 2 * size + block, mask=inside, other=0.0).to(tl.float64)
        highest = tl.maximum(highest, tl.max(peak, axis=0))
        is_empty = peak == float("-inf")
        lead = peak.to(tl.float64) - lse[None, :]
        share = tl.exp(lead)
        entropy -= tl.sum(tl.where(is_empty, 0.0, share * (weighted + lead * total)), axis=0)
        squares += tl.sum(tl.where(is_empty, 0.0, share * share * squared), axis=0)
        sums += tl.sum(logits, axis=0)
    target = tl.load(targets_ptr + n, mask=is_token, other=ignore_index)
    logit = tl.load(target_logit_ptr + n, mask=is_token, other=0.0)
    # lse - lse is not 0 for what is not finite.
    wrong = tl.where((logit == logit) & (lse - lse == 0), 0.0, float("nan"))
    is_scored = target != ignore_index
    values = values_ptr + n
    entropy = tl.maximum(entropy, 0.0).to(tl.float32) + wrong
    tl.store(values, tl.where(is_scored, entropy, 0.0), mask=is_token)
    tl.store(values + N, tl.where(is_scored, squares.to(tl.float32) + wrong, 0.0), mask=is_token)
    unknown = tl.where(logit == logit, 0.0, float("nan"))
    tl.store(values + 2 * N, tl.where(is_scored, (sums / V).to(tl.float32) + unknown, 0.0), mask=is_token)
    tl.store(values + 3 * N, tl.where(is_scored, (logit >= highest).to(tl.float32) + wrong, 0.0), mask=is_token)
