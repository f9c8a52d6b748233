"""Backward of the head by recomputation: logits of a chunk again, then one GEMM for dhidden and one for dweight.

The host walks chunks of vocabulary x tokens over one bounded workspace of dL/dlogits. Tokens come sorted so that those
with a nonzero coefficient stand first, `count` of them (a device scalar: the host never waits for it); everything
behind them is skipped. Buffers are padded to whole tiles, and padding is written as zeros, so that the GEMMs' inner
loops need no masks on the token side.
"""

import triton
import triton.language as tl

from csrc_triton.tiles import add_product, logit_gradient, nothing, raw_logits, tile_of


@triton.jit(do_not_specialize=["M", "N", "padded"])
def gather_kernel(
    hidden_ptr,
    row_index_ptr,
    order_ptr,
    count_ptr,
    rows_ptr,
    first_token,
    M,
    N,
    padded,
    H,
    stride_hidden_n,
    stride_hidden_h,
    stride_rows_n,
    HAS_ROW_INDEX: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """rows [padded, H]: the hidden states of tokens first_token and after, zeros behind the last.

    HAS_ORDER: of the active tokens in sorted order (`order`, `count` of them) instead of all N in their own.
    One pass over [N, H] saves an indirection in the inner loop of every GEMM after it. A row outside [0, M) is NaN.
    """
    tiles_h = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    k = (pid // tiles_h).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = (pid % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    token = first_token + k
    if HAS_ORDER:
        is_active = token < tl.load(count_ptr)
        token = tl.load(order_ptr + token, mask=is_active, other=0)
    else:
        is_active = token < N
    row = token
    if HAS_ROW_INDEX:
        row = tl.load(row_index_ptr + token, mask=is_active, other=0)
    has_row = (row >= 0) & (row < M)
    inside = (h < H)[None, :]
    source = tl.where(has_row, row, 0)[:, None] * stride_hidden_n + h.to(tl.int64)[None, :] * stride_hidden_h
    x = tl.load(hidden_ptr + source, mask=inside & (is_active & has_row)[:, None], other=0.0)
    x = tl.where((is_active & (has_row == 0))[:, None], float("nan"), x)
    tl.store(rows_ptr + k[:, None] * stride_rows_n + h[None, :], x, mask=inside & (k < padded)[:, None])


@triton.jit
def logit_grad_kernel(
    rows_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    lse_ptr,
    grad_ptr,
    order_ptr,
    count_ptr,
    peak_ptr,
    temperature_ptr,
    entropy_grad_ptr,
    entropy_ptr,
    dlogits_ptr,
    first_token,
    first_word,
    chunk_tokens,
    chunk_words,
    V,
    H,
    stride_weight_v,
    stride_weight_h,
    pre_scale,
    post_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    PTX: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    EVEN_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dlogits [chunk_tokens, chunk_words] = what `tiles.logit_gradient` says, in the input dtype.

    Dividing by the power of two of the call's largest |grad| (`peak`) keeps float16 from underflowing, at no rounding.
    """
    tile_n, tile_v = tile_of(tl.program_id(0), chunk_tokens // BLOCK_N, chunk_words // BLOCK_V, GROUP)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(count_ptr) - first_token
    if tile_n * BLOCK_N >= count:
        return

    # Offsets within the tile are int32 unless WIDE; what leads to the tile is added to the pointers.
    local_k, local_word = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    first_v = first_word.to(tl.int64) + tile_v * BLOCK_V
    inner = tl.minimum(local_word, (V - 1 - first_v).to(tl.int32)).to(tl.int64 if WIDE else tl.int32)
    z = raw_logits(
        rows_ptr + (first_token.to(tl.int64) + tile_n * BLOCK_N) * H,
        weight_ptr + first_v * stride_weight_v,
        local_k * H,
        inner * stride_weight_v,
        H,
        1,
        stride_weight_h,
        EVEN_H,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
    )
    if HAS_BIAS:
        z += tl.load(bias_ptr + first_v + inner).to(tl.float32)[None, :]
    g = logit_gradient(
        z,
        first_token + k,
        k < count,
        (tile_n + 1) * BLOCK_N <= count,
        first_v,
        order_ptr,
        targets_ptr,
        lse_ptr,
        grad_ptr,
        peak_ptr,
        V,
        pre_scale,
        post_scale,
        HAS_SOFTCAP,
        POSITIVE,
        False,
        PTX,
        BLOCK_V,
        temperature_ptr,
        entropy_grad_ptr,
        entropy_ptr,
        HAS_TEMPERATURE,
        HAS_ENTROPY,
    )
    out = dlogits_ptr + tile_n.to(tl.int64) * BLOCK_N * chunk_words + tile_v * BLOCK_V
    tl.store(out + (local_k[:, None] * chunk_words + local_word[None, :]), g.to(dlogits_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_words"])
def bias_grad_kernel(
    dlogits_ptr,
    dbias_ptr,
    count_ptr,
    first_token,
    first_word,
    num_words,
    chunk_tokens,
    chunk_words,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dbias [V] float32 += column sums of dlogits. A pass of its own: in `logit_grad_kernel` it spills registers."""
    word = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_N)
    active = tl.minimum(tl.load(count_ptr) - first_token, chunk_tokens)
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, active, BLOCK_N):
        row = (start + k).to(tl.int64)[:, None] * chunk_words
        # Whole vectors: words behind the last are there, up to a whole tile, and nobody stores their sums.
        acc += tl.load(dlogits_ptr + row + word[None, :], mask=(start + k < active)[:, None], other=0.0).to(tl.float32)
    out = dbias_ptr + first_word.to(tl.int64) + word
    total = tl.load(out, mask=word < num_words, other=0.0) + tl.sum(acc, axis=0)
    tl.store(out, total, mask=word < num_words)


@triton.jit(do_not_specialize=["num_words"])
def hidden_grad_kernel(
    dlogits_ptr,
    weight_ptr,
    drows_ptr,
    count_ptr,
    first_token,
    first_word,
    chunk_tokens,
    chunk_words,
    num_words,
    H,
    stride_weight_v,
    stride_weight_h,
    EVEN_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """drows [padded N, H] float32 (+)= dlogits . weight[chunk]: the first vocabulary chunk writes, the others add."""
    tile_n, tile_h = tile_of(tl.program_id(0), chunk_tokens // BLOCK_N, tl.cdiv(H, BLOCK_H), GROUP)
    count = tl.load(count_ptr) - first_token
    if tile_n * BLOCK_N >= count:
        return
    h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
    local_k, word = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    first_h = tile_h.to(tl.int64) * BLOCK_H
    inner = tl.arange(0, BLOCK_H).to(tl.int64 if WIDE else tl.int32)
    dlogits_ptr += tile_n.to(tl.int64) * BLOCK_N * chunk_words
    dlogits_offsets = local_k[:, None] * chunk_words + word[None, :]
    weight_ptr += first_word.to(tl.int64) * stride_weight_v + first_h * stride_weight_h
    weight_offsets = word.to(inner.dtype)[:, None] * stride_weight_v + inner[None, :] * stride_weight_h
    drows_ptr += (first_token.to(tl.int64) + tile_n * BLOCK_N) * H + first_h
    out = drows_ptr + (local_k[:, None] * H + tl.arange(0, BLOCK_H)[None, :])
    # Loaded before the loop: behind it, two tiles would need registers at once. Rows behind the active ones are
    # padding that nobody reads: no mask.
    has_sum = tl.full((1, BLOCK_H), 1, tl.int1) & (first_word > 0)
    if not EVEN_H:
        has_sum = has_sum & (h < H)[None, :]
    acc = tl.load(out, mask=has_sum, other=0.0)
    zero = nothing(first_word, BLOCK_N, BLOCK_H)
    for start in range(0, chunk_words, BLOCK_V):
        g = tl.load(dlogits_ptr + dlogits_offsets)
        is_word = (start + word < num_words)[:, None]
        if not EVEN_H:
            is_word = is_word & (h < H)[None, :]
        w = tl.load(weight_ptr + weight_offsets, mask=is_word, other=0.0)
        acc = add_product(g, w, acc, zero, PRECISION)
        dlogits_ptr += BLOCK_V
        weight_ptr += tl.cast(BLOCK_V, tl.int64) * stride_weight_v
    if EVEN_H:
        tl.store(out, acc)
    else:
        tl.store(out, acc, mask=(h < H)[None, :])


@triton.jit
def weight_grad_kernel(
    dlogits_ptr,
    rows_ptr,
    partial_ptr,
    dweight_ptr,
    count_ptr,
    peak_ptr,
    first_token,
    first_word,
    num_words,
    chunk_tokens,
    chunk_words,
    H,
    factor,
    HAS_PARTIAL: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dweight[chunk] = peak * factor * dlogits^T . rows, in the weight's dtype.

    With several token chunks (HAS_PARTIAL) the sum stays in partial [chunk_words, H] float32, without the factors.
    """
    tile_v, tile_h = tile_of(tl.program_id(0), chunk_words // BLOCK_V, tl.cdiv(H, BLOCK_H), GROUP)
    word = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
    local_word, local_h, k = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    first_h = tile_h.to(tl.int64) * BLOCK_H
    active = tl.minimum(tl.load(count_ptr) - first_token, chunk_tokens)
    dlogits_ptr += tile_v.to(tl.int64) * BLOCK_V
    dlogits_offsets = k[:, None] * chunk_words + local_word[None, :]
    rows_ptr += first_token.to(tl.int64) * H + first_h
    rows_offsets = k[:, None] * H + local_h[None, :]
    inside = (word < num_words)[:, None]
    if not EVEN_H:
        inside = inside & (h < H)[None, :]
    local = local_word[:, None] * H + local_h[None, :]
    partial = tile_v.to(tl.int64) * BLOCK_V * H + first_h
    acc = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    if HAS_PARTIAL:
        # Compared as a block: a scalar condition widened by `&` is no boolean to the interpreter.
        is_later = first_token + tl.zeros((BLOCK_V, 1), tl.int32) > 0
        acc = tl.load(partial_ptr + partial + local, mask=inside & is_later, other=0.0)
    zero = nothing(first_word, BLOCK_V, BLOCK_H)
    for _ in range(0, active, BLOCK_N):
        g = tl.load(dlogits_ptr + dlogits_offsets)
        if EVEN_H:
            x = tl.load(rows_ptr + rows_offsets)
        else:
            x = tl.load(rows_ptr + rows_offsets, mask=(h < H)[None, :], other=0.0)
        acc = add_product(tl.trans(g), x, acc, zero, PRECISION)
        dlogits_ptr += tl.cast(BLOCK_N, tl.int64) * chunk_words
        rows_ptr += tl.cast(BLOCK_N, tl.int64) * H
    if HAS_PARTIAL:
        tl.store(partial_ptr + partial + local, acc, mask=inside)
    else:
        out = dweight_ptr + first_word.to(tl.int64) * H + partial
        acc = acc * (tl.load(peak_ptr) * factor)
        tl.store(out + local, acc.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(values_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out [size] = factor * values, float32 and rounded as it is stored."""
    factor = tl.load(factor_ptr)
    # Up to a multiple of 16, which the compiler sees: masked by any other number, loads would be one by one.
    whole = size // 16 * 16
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + at, mask=at < whole, other=0.0)
    tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < whole)
    if tl.program_id(0) == 0:
        rest = whole + tl.arange(0, 16)
        few = tl.load(values_ptr + rest, mask=rest < size, other=0.0)
        tl.store(out_ptr + rest, (few * factor).to(out_ptr.dtype.element_ty), mask=rest < size)


@triton.jit(do_not_specialize=["M"])
def row_sum_kernel(
    drows_ptr,
    row_ends_ptr,
    peak_ptr,
    dhidden_ptr,
    M,
    H,
    factor,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dhidden[m] = peak * factor * sum of drows over the tokens that read row m, which stand together: no atomics."""
    tiles_h = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    m = (pid // tiles_h).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = (pid % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    end = tl.load(row_ends_ptr + m, mask=m < M, other=0)
    start = tl.load(row_ends_ptr + m - 1, mask=(m < M) & (m > 0), other=0)
    inside = (h < H)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for step in range(0, tl.max(end - start, axis=0)):
        k = start + step
        acc += tl.load(drows_ptr + k[:, None] * H + h[None, :], mask=inside & (k < end)[:, None], other=0.0)
    acc = acc * (tl.load(peak_ptr) * factor)
    out = dhidden_ptr + m[:, None] * H + h[None, :]
    tl.store(out, acc.to(dhidden_ptr.dtype.element_ty), mask=inside & (m < M)[:, None])
