"""Forward of the head: per token and vocabulary block a log-sum-exp, and the target's logit. No [N, V] tensor.

The log-sum-exp is kept as the block's largest logit and the sum of exp(logit - largest): one float32 would round both
away together, where logits are large. log_softmax, which this replaces, does not.
"""

import triton
import triton.language as tl

from csrc_triton.tiles import LOG2_E, mask_words, moments, power, raw_logits, scaled_logits, tile_of, word_is


@triton.jit
def write_statistics(
    z,
    tile_n,
    tile_v,
    has_row,
    bias_ptr,
    targets_ptr,
    block_peak_ptr,
    block_sum_ptr,
    target_logit_ptr,
    N,
    V,
    ignore_index,
    pre_scale,
    post_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATISTIC: tl.constexpr,
    temperature_ptr,
    block_moments_ptr,
    HAS_TEMPERATURE: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """What is kept of one tile of raw logits z [BLOCK_N, BLOCK_V]; words past V may hold anything."""
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = n < N
    first = tile_v.to(tl.int64) * BLOCK_V
    word = tl.arange(0, BLOCK_V)
    words = tl.minimum(V - first, BLOCK_V).to(tl.int32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + first + word, mask=word < words, other=0.0).to(tl.float32)[None, :]
    z, _, factor = scaled_logits(z, pre_scale, post_scale, HAS_SOFTCAP, POSITIVE)
    if HAS_TEMPERATURE:
        factor = factor / tl.load(temperature_ptr + n, mask=is_token, other=1.0)
    if MOMENTS:
        whole = tl.sum(tl.where((word < words)[None, :], z, 0.0), axis=1) * factor
    z = mask_words(z, words, BLOCK_V)

    # Loaded behind the loop, whose registers they would take.
    target = tl.load(targets_ptr + n, mask=is_token, other=ignore_index)
    is_valid = (target != ignore_index) & has_row & (target >= 0) & (target < V)
    if tile_v == 0:  # whose target is in no block
        nothing = tl.where(target == ignore_index, 0.0, float("nan"))
        tl.store(target_logit_ptr + n, nothing, mask=is_token & (is_valid == 0))
    is_here = is_valid & (target >= first) & (target < first + BLOCK_V)
    if tl.max(is_here.to(tl.int32), axis=0) > 0:  # about one tile in four at 128256 words
        column = tl.where(is_here, target - first, -1).to(tl.int32)
        logit = tl.sum(tl.where(word_is(column, BLOCK_V), z, 0.0), axis=1)
        tl.store(target_logit_ptr + n, logit * factor, mask=is_here)

    # Last, for the exponentials take the logits' registers. A block of -inf alone has sum 0, not the NaN of
    # (-inf) - (-inf); NaN and +inf logits turn the sum into NaN, whatever the maximum made of them.
    if STATISTIC == BLOCK_V:
        peak = tl.max(z, axis=1)
        block = tile_v.to(tl.int64) * N + n
        if HAS_TEMPERATURE or MOMENTS:
            total, weighted, squares = moments(z, peak, tl.zeros((BLOCK_N,), tl.float32) + factor, PTX)
        else:
            total = sum_of_powers(z, peak, factor, 1, PTX)
        if MOMENTS:
            size = tl.cdiv(V, BLOCK_V).to(tl.int64) * N
            tl.store(block_moments_ptr + block, weighted, mask=is_token)
            tl.store(block_moments_ptr + size + block, squares, mask=is_token)
            tl.store(block_moments_ptr + 2 * size + block, whole, mask=is_token)
        tl.store(block_peak_ptr + block, peak * factor, mask=is_token)
        tl.store(block_sum_ptr + block, total, mask=is_token)
    else:
        parts: tl.constexpr = BLOCK_V // STATISTIC
        z = tl.reshape(z, (BLOCK_N, parts, STATISTIC))
        peak = tl.max(z, axis=2)
        total = sum_of_powers(z, peak, factor, 2, PTX)
        part = tile_v.to(tl.int64) * parts + tl.arange(0, parts)
        block = part[None, :] * N + n[:, None]
        inside = is_token[:, None] & (part * STATISTIC < V)[None, :]
        tl.store(block_peak_ptr + block, peak * factor, mask=inside)
        tl.store(block_sum_ptr + block, total, mask=inside)


@triton.jit
def sum_of_powers(z, peak, factor, AXIS: tl.constexpr, PTX: tl.constexpr):
    """The sum along the last axis of exp(factor * (z - peak)); 0 where all is -inf."""
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    unit = factor * LOG2_E
    if PTX:
        shift = anchor * unit
        # What the shift's rounding adds to all powers of a row: to 2^-24 of the largest logit, and exactly known.
        return tl.sum(power(z, unit, tl.expand_dims(shift, AXIS), PTX), axis=AXIS) * power(anchor, -unit, -shift, PTX)
    else:
        return tl.sum(power(z, unit, tl.expand_dims(anchor, AXIS), PTX), axis=AXIS)


@triton.jit(do_not_specialize=["M", "N"])
def head_forward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    row_index_ptr,
    block_peak_ptr,
    block_sum_ptr,
    target_logit_ptr,
    temperature_ptr,
    block_moments_ptr,
    M,
    N,
    V,
    H,
    stride_hidden_n,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    ignore_index,
    pre_scale,
    post_scale,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    STATISTIC: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes block_peak and block_sum [cdiv(V, STATISTIC), N] and target_logit [N], all float32, each element once.

    hidden [M, H], weight [V, H] of any strides; bias [V], targets [N], row_index [N] contiguous. WIDE: a tile of
    weight may span 2^31 elements or more. STATISTIC divides BLOCK_V.
    target_logit is 0 for an ignored token, NaN for a target outside [0, V) or a row outside [0, M).
    HAS_TEMPERATURE: logits are divided by temperature [N], too. MOMENTS: writes block_moments [3, cdiv(V, BLOCK_V), N],
    of z' = logit - block_peak the sums of exp(z') z' and exp(z')^2, and the sum of the logits; STATISTIC is BLOCK_V.
    """
    tile_n, tile_v = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n
    if HAS_ROW_INDEX:
        rows = tl.load(row_index_ptr + n, mask=n < N, other=0)
    has_row = (rows >= 0) & (rows < M)
    first = tile_v.to(tl.int64) * BLOCK_V
    # Rows and words past the end repeat an existing one instead of being masked in the inner loop.
    word = tl.minimum(tl.arange(0, BLOCK_V), (V - 1 - first).to(tl.int32)).to(tl.int64 if WIDE else tl.int32)
    z = raw_logits(
        hidden_ptr,
        weight_ptr + first * stride_weight_v,
        tl.where(has_row, rows, 0) * stride_hidden_n,
        word * stride_weight_v,
        H,
        stride_hidden_h,
        stride_weight_h,
        EVEN_H,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
    )
    write_statistics(
        z,
        tile_n,
        tile_v,
        has_row,
        bias_ptr,
        targets_ptr,
        block_peak_ptr,
        block_sum_ptr,
        target_logit_ptr,
        N,
        V,
        ignore_index,
        pre_scale,
        post_scale,
        HAS_BIAS,
        HAS_SOFTCAP,
        POSITIVE,
        PTX,
        BLOCK_N,
        BLOCK_V,
        STATISTIC,
        temperature_ptr,
        block_moments_ptr,
        HAS_TEMPERATURE,
        MOMENTS,
    )


@triton.jit(do_not_specialize=["chunk_tokens", "N"])
def persistent_forward_kernel(
    rows_desc,
    weight_desc,
    bias_ptr,
    targets_ptr,
    block_peak_ptr,
    block_sum_ptr,
    target_logit_ptr,
    temperature_ptr,
    block_moments_ptr,
    first_token,
    chunk_tokens,
    N,
    V,
    H,
    ignore_index,
    pre_scale,
    post_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    PTX: tl.constexpr,
    STATISTIC: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    MOMENTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`head_forward_kernel` with operands by tensor descriptors (TMA) and a grid of as many programs as fit the device.

    rows [chunk_tokens, H] holds the hidden states of tokens first_token and after, in blocks of [BLOCK_N, BLOCK_H];
    weight [V, H] in blocks of [BLOCK_V, BLOCK_H]. first_token is a multiple of BLOCK_N. What lies outside a descriptor
    is read as 0: neither H nor the last tile needs a mask. A row outside the hidden states is NaN already in `rows`.
    """
    # Else a flattened loop needs the epilogue once more, for products of nothing.
    tl.assume(H > 0)
    tiles_n = tl.cdiv(chunk_tokens, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(
        tl.program_id(0),
        tiles_n * tiles_v,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        tile_n, tile_v = tile_of(tile, tiles_n, tiles_v, GROUP)
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, H, BLOCK_H):
            x = rows_desc.load([tile_n * BLOCK_N, start])
            w = weight_desc.load([tile_v * BLOCK_V, start])
            z = tl.dot(x, w.T, z)
        write_statistics(
            z,
            tile_n + first_token // BLOCK_N,
            tile_v,
            tl.full((BLOCK_N,), 1, tl.int1),
            bias_ptr,
            targets_ptr,
            block_peak_ptr,
            block_sum_ptr,
            target_logit_ptr,
            N,
            V,
            ignore_index,
            pre_scale,
            post_scale,
            HAS_BIAS,
            HAS_SOFTCAP,
            POSITIVE,
            PTX,
            BLOCK_N,
            BLOCK_V,
            STATISTIC,
            temperature_ptr,
            block_moments_ptr,
            HAS_TEMPERATURE,
            MOMENTS,
        )
