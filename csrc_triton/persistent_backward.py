"""The backward's three GEMMs with operands by tensor descriptors (TMA) and grids of as many programs as fit the device.

Same buffers and meaning as their namesakes in `backward`; what lies outside a descriptor is read as 0. The number of
active tokens is known on the device alone: it bounds the loop over tiles, so that skipped tokens cost no program.
"""

import triton
import triton.language as tl

from csrc_triton.tiles import logit_gradient, tile_of


@triton.jit
def persistent_logit_grad_kernel(
    rows_desc,
    weight_desc,
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
    pre_scale,
    post_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    PTX: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dlogits [chunk_tokens, chunk_words], as `logit_grad_kernel` writes it; rows [padded, H] are sorted tokens'."""
    tl.assume(H > 0)  # as in `forward.persistent_forward_kernel`
    count = tl.load(count_ptr)
    tiles_n = tl.cdiv(tl.maximum(tl.minimum(count - first_token, chunk_tokens), 0), BLOCK_N)
    tiles_v = chunk_words // BLOCK_V
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
            x = rows_desc.load([first_token + tile_n * BLOCK_N, start])
            w = weight_desc.load([first_word + tile_v * BLOCK_V, start])
            z = tl.dot(x, w.T, z)
        local_k, local_word = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
        first_v = first_word + tile_v.to(tl.int64) * BLOCK_V
        if HAS_BIAS:
            is_word = local_word < tl.minimum(V - first_v, BLOCK_V).to(tl.int32)
            z += tl.load(bias_ptr + first_v + local_word, mask=is_word, other=0.0).to(tl.float32)[None, :]
        position = first_token + tile_n * BLOCK_N + local_k
        g = logit_gradient(
            z,
            position,
            position < count,
            first_token + (tile_n + 1) * BLOCK_N <= count,
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
            True,  # a padding word has logit 0: exp(-lse) may be infinite, and meets a 0 of the weight
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


@triton.jit
def persistent_hidden_grad_kernel(
    dlogits_desc,
    weight_desc,
    drows_ptr,
    count_ptr,
    first_token,
    first_word,
    chunk_tokens,
    chunk_words,
    part_words,
    padded,
    H,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """drows [parts, padded N, H] float32 += dlogits . weight[chunk], a part's words into its own rows.

    chunk_words is a multiple of part_words. One program adds to a row's tile of H, once a launch: sums have one order.
    """
    active = tl.minimum(tl.load(count_ptr) - first_token, chunk_tokens)
    tiles_n = tl.cdiv(tl.maximum(active, 0), BLOCK_N)
    tiles_h = tl.cdiv(H, BLOCK_H)
    tiles = tiles_n * tiles_h
    for index in tl.range(
        tl.program_id(0),
        tiles * (chunk_words // part_words),
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        part = index // tiles
        tile_n, tile_h = tile_of(index % tiles, tiles_n, tiles_h, GROUP)
        part_word = part * part_words
        h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = (h < H)[None, :]
        out = drows_ptr + (part.to(tl.int64) * padded + first_token + tile_n * BLOCK_N) * H
        out += tl.arange(0, BLOCK_N)[:, None] * H + h[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for start in range(0, part_words, BLOCK_V):
            g = dlogits_desc.load([tile_n * BLOCK_N, part_word + start])
            w = weight_desc.load([first_word + part_word + start, tile_h * BLOCK_H])
            acc = tl.dot(g, w, acc)
        # L2 adds. A sum that were read, before the loop or behind it, would take registers beside this one.
        tl.atomic_add(out, acc, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["num_words"])
def persistent_weight_grad_kernel(
    dlogits_desc,
    rows_desc,
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
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dweight[chunk] = peak * factor * dlogits^T . rows, or partial (+)= dlogits^T . rows, as `weight_grad_kernel`."""
    active = tl.minimum(tl.load(count_ptr) - first_token, chunk_tokens)
    tiles_v = chunk_words // BLOCK_V
    tiles_h = tl.cdiv(H, BLOCK_H)
    for tile in tl.range(
        tl.program_id(0),
        tiles_v * tiles_h,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        tile_v, tile_h = tile_of(tile, tiles_v, tiles_h, GROUP)
        word = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = (word < num_words)[:, None] & (h < H)[None, :]
        local = tile_v.to(tl.int64) * BLOCK_V * H + (tl.arange(0, BLOCK_V)[:, None] * H + h[None, :])
        acc = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        for start in range(0, active, BLOCK_N):
            g = dlogits_desc.load([start, tile_v * BLOCK_V])
            x = rows_desc.load([first_token + start, tile_h * BLOCK_H])
            acc = tl.dot(g.T, x, acc)
        if HAS_PARTIAL:
            # As in dhidden: L2 adds, and no sum of earlier tokens takes registers beside this one.
            if first_token > 0:
                tl.atomic_add(partial_ptr + local, acc, mask=inside, sem="relaxed")
            else:
                tl.store(partial_ptr + local, acc, mask=inside)
        else:
            acc = acc * (tl.load(peak_ptr) * factor)
            out = dweight_ptr + tl.cast(first_word, tl.int64) * H + local
            tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=inside)
