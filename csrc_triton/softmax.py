"""Passes over a workspace of logits that a GEMM library wrote: statistics, then the gradient in place.

Two launches with the ranking between them, because the gradient is rounded to the workspace's 16 bits with its
coefficient already inside. A coefficient multiplied into the hidden states instead would be a second rounding: in an
emulation of bfloat16 and float16 it made dweight's error up to 1.43 times the eager path's (1.00 this way). The price
is one more read of the logits, 0.47 ps each at 4.3 TB/s beside 31 ps of matrix work at H = 4096.

A row may be cut into SPLITS parts, a program each, where there are few tokens. A row of the workspace has `width`
elements, V logits and padding up to a multiple of 16 that means nothing: loads and stores stay whole vectors for any V.
"""

import triton
import triton.language as tl

from csrc_triton.tiles import activation


@triton.jit
def row_part(width, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(row, part, first word, word behind the last) of this program; parts are whole blocks but for the last."""
    pid = tl.program_id(0)
    row = pid // SPLITS
    part = pid % SPLITS
    words = tl.cdiv(tl.cdiv(width, BLOCK), SPLITS) * BLOCK
    first = part * words
    return row.to(tl.int64), part, first, tl.minimum(first + words, width)


@triton.jit(do_not_specialize=["N"])
def statistics_kernel(
    z_ptr,
    targets_ptr,
    block_peak_ptr,
    block_sum_ptr,
    target_logit_ptr,
    temperature_ptr,
    block_moments_ptr,
    N,
    V,
    width,
    stride_z,
    ignore_index,
    pre_scale,
    post_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    MOMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """block_peak and block_sum [SPLITS, N], target_logit [N], float32, of raw logits z [N, V]: one read.

    As `forward.head_forward_kernel` writes them: 0 for an ignored token, NaN for a target outside [0, V). So are
    block_moments [3, SPLITS, N].
    """
    row, part, first, last = row_part(width, SPLITS, BLOCK_K * BLOCK_V)
    z_ptr += row * stride_z
    # Each lane keeps its own maximum and sum over BLOCK_K words at a time: nothing crosses threads inside the loop,
    # and a word costs 1 + 1 / BLOCK_K exponentials. (-inf) - (-inf) would be NaN: the start is the lowest finite
    # number, which nothing but -inf lies below.
    peak = tl.full((BLOCK_V,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    if MOMENTS:
        weighted = tl.zeros((BLOCK_V,), tl.float32)
        squares = tl.zeros((BLOCK_V,), tl.float32)
        sums = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    word = tl.arange(0, BLOCK_K)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    for start in range(first, last, BLOCK_K * BLOCK_V):
        is_word = (start + word < V) & (start + word < last)
        z = tl.load(z_ptr + start + word, mask=start + word < last, other=0.0).to(tl.float32)
        z, _ = activation(z, pre_scale, post_scale, HAS_SOFTCAP)
        if HAS_TEMPERATURE:
            z = z / temperature
        if MOMENTS:
            sums += tl.sum(tl.where(is_word, z, 0.0), axis=0)
        z = tl.where(is_word, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=0))
        if MOMENTS:
            rise = peak - higher
            share = tl.exp(rise)
            below = z - higher[None, :]
            p = tl.exp(below)
            weighted = (weighted + total * rise) * share + tl.sum(tl.where(p == 0, 0.0, p * below), axis=0)
            squares = squares * share * share + tl.sum(p * p, axis=0)
            total = total * share + tl.sum(p, axis=0)
        else:
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[None, :]), axis=0)
        peak = higher
    highest = tl.max(peak, axis=0)
    # NaN and +inf logits turn the sum into NaN, whatever the maximum made of them; nothing but -inf is a sum of 0.
    whole = tl.sum(total * tl.exp(peak - highest), axis=0)
    if MOMENTS:
        rise = peak - highest
        share = tl.exp(rise)
        out = block_moments_ptr + part * N + row
        size = tl.cast(SPLITS, tl.int64) * N
        tl.store(out, tl.sum((weighted + total * rise) * share, axis=0))
        tl.store(out + size, tl.sum(squares * share * share, axis=0))
        tl.store(out + 2 * size, tl.sum(sums, axis=0))
    tl.store(block_peak_ptr + part * N + row, tl.where(whole == 0, float("-inf"), highest))
    tl.store(block_sum_ptr + part * N + row, whole)

    target = tl.load(targets_ptr + row)
    is_valid = (target >= 0) & (target < V)
    is_here = is_valid & (target >= first) & (target < last)
    column = tl.where(is_here, target, 0)
    logit = tl.load(z_ptr + column).to(tl.float32)
    logit, _ = activation(logit, pre_scale, post_scale, HAS_SOFTCAP)
    if HAS_TEMPERATURE:
        logit = logit / temperature
    logit = tl.where(is_here, logit, tl.where(target == ignore_index, 0.0, float("nan")))
    tl.store(target_logit_ptr + row, logit, mask=is_here | ((part == 0) & (is_valid == 0)))


@triton.jit
def gradient_kernel(
    z_ptr,
    targets_ptr,
    lse_ptr,
    coefficients_ptr,
    temperature_ptr,
    entropy_grad_ptr,
    entropy_ptr,
    V,
    width,
    stride_z,
    pre_scale,
    post_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """z [N, V] = coefficient * (onehot - softmax) * f'(z) / f'(0), in place: one read and one write.

    A coefficient of 0 writes zeros and reads nothing: what has no gradient cannot spoil one. lse [N] is float64.
    HAS_ENTROPY: less entropy_grad * softmax * (log softmax + entropy) * f'(z) / f'(0). HAS_TEMPERATURE: both
    coefficients come divided by temperature [N], as the logits are here.
    """
    row, _, first, last = row_part(width, SPLITS, BLOCK_V)
    z_ptr += row * stride_z
    word = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    coefficient = tl.load(coefficients_ptr + row)
    size = tl.abs(coefficient)
    if HAS_ENTROPY:
        share = tl.load(entropy_grad_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        size = size + tl.abs(share)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    if size == 0:
        for start in range(first, last, BLOCK_V):
            zero = tl.zeros((BLOCK_V,), z_ptr.dtype.element_ty)
            tl.store(z_ptr + start + word, zero, mask=start + word < last)
    else:
        # float64 in two float32 parts: beside logits of 1e4 one float32 has no digits left for the probabilities.
        lse = tl.load(lse_ptr + row)
        lse_high = lse.to(tl.float32)
        lse_low = (lse - lse_high).to(tl.float32)
        coefficient = tl.where((target >= 0) & (target < V), coefficient, float("nan"))
        for start in range(first, last, BLOCK_V):
            inside = start + word < last
            z = tl.load(z_ptr + start + word, mask=inside, other=0.0).to(tl.float32)
            z, slope = activation(z, pre_scale, post_scale, HAS_SOFTCAP)
            if HAS_TEMPERATURE:
                z = z / temperature
            log_p = (z - lse_high) - lse_low
            p = tl.exp(log_p)
            # 1 - p is formed in float32, where the target's probability is close to 1.
            g = coefficient * (tl.where(start + word == target, 1.0, 0.0) - p)
            if HAS_ENTROPY:
                g -= tl.where(p == 0, 0.0, p * (log_p + entropy)) * share
            g = g * slope
            tl.store(z_ptr + start + word, g.to(z_ptr.dtype.element_ty), mask=inside)
