"""The routed backward's grouped GEMMs: each vocabulary block with the tokens that keep it, as tokens go to experts.

`list` [rows] names the tokens of a chunk of blocks by their position in the sorted order, block b's from row
`first_row`[b] on; `ends` [blocks, segments] counts a block's tokens segment by segment of that order: the last entry is
its total. A chunk is blocks `firsts`[chunk] to `firsts`[chunk + 1] - 1. Grids are those of the worst case, and programs
without work leave at once: nothing here is known to the host. dlogits [rows, ROUTE_WORDS] holds one row a pair, and
zeros to the end of each tile of tokens.
"""

import triton
import triton.language as tl

from csrc_triton.tiles import add_product, logit_gradient, nothing, raw_logits, tile_of


@triton.jit(do_not_specialize=["chunk", "num_segments"])
def routed_logit_grad_kernel(
    rows_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    lse_ptr,
    grad_ptr,
    order_ptr,
    peak_ptr,
    list_ptr,
    owner_ptr,
    used_ptr,
    first_row_ptr,
    ends_ptr,
    dlogits_ptr,
    chunk,
    num_segments,
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
    EVEN_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUTE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dlogits of the chunk's pairs, as `logit_grad_kernel` has them: logits of (a block's tokens) x (its words)."""
    parts: tl.constexpr = ROUTE_WORDS // BLOCK_V
    used = tl.load(used_ptr + chunk)
    if tl.program_id(0) >= used // BLOCK_N * parts:
        return
    tile, part = tile_of(tl.program_id(0), used // BLOCK_N, parts, GROUP)
    block = tl.load(owner_ptr + tile)
    first_v = block.to(tl.int64) * ROUTE_WORDS + part * BLOCK_V
    total = tl.load(ends_ptr + block.to(tl.int64) * num_segments + num_segments - 1)
    first = tile * BLOCK_N - tl.load(first_row_ptr + block)
    place = first + tl.arange(0, BLOCK_N)
    is_pair = place < total
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.load(list_ptr + slot, mask=is_pair, other=0)
    word = tl.arange(0, BLOCK_V)
    # Words behind the last repeat it, in tiles of their own as well: dhidden reads all of a block, times 0.
    inner = tl.minimum(word, (V - 1 - first_v).to(tl.int32)).to(tl.int64 if WIDE else tl.int32)
    z = raw_logits(
        rows_ptr,
        weight_ptr + first_v * stride_weight_v,
        k.to(tl.int64) * H,
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
        k,
        is_pair,
        first + BLOCK_N <= total,
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
    )
    out = dlogits_ptr + (slot.to(tl.int64) * ROUTE_WORDS + part * BLOCK_V)[:, None] + word[None, :]
    tl.store(out, g.to(dlogits_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["chunk", "num_segments"])
def routed_weight_grad_kernel(
    dlogits_ptr,
    rows_ptr,
    dweight_ptr,
    peak_ptr,
    list_ptr,
    firsts_ptr,
    first_row_ptr,
    ends_ptr,
    chunk,
    num_segments,
    V,
    H,
    factor,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUTE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dweight[block] = peak * factor * dlogits^T . rows[its tokens], in the weight's dtype; 0 where nobody keeps it.

    One program sums over all tokens of its tile of words: in one order, without partial sums.
    """
    parts: tl.constexpr = ROUTE_WORDS // BLOCK_V
    first_block = tl.load(firsts_ptr + chunk)
    tiles_v = (tl.load(firsts_ptr + chunk + 1) - first_block) * parts
    if tl.program_id(0) >= tiles_v * tl.cdiv(H, BLOCK_H):
        return
    tile_v, tile_h = tile_of(tl.program_id(0), tiles_v, tl.cdiv(H, BLOCK_H), GROUP)
    block = first_block + tile_v // parts
    first_v = block.to(tl.int64) * ROUTE_WORDS + (tile_v % parts) * BLOCK_V
    total = tl.load(ends_ptr + block.to(tl.int64) * num_segments + num_segments - 1)
    row = tl.load(first_row_ptr + block).to(tl.int64)
    word, n = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
    list_ptr += row
    dlogits_ptr += row * ROUTE_WORDS + (tile_v % parts) * BLOCK_V
    dlogits_offsets = n[:, None] * ROUTE_WORDS + word[None, :]
    acc = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    zero = nothing(total, BLOCK_V, BLOCK_H)
    for start in range(0, total, BLOCK_N):
        is_pair = start + n < total
        k = tl.load(list_ptr + start + n, mask=is_pair, other=0)
        g = tl.load(dlogits_ptr + dlogits_offsets)
        # The rows behind the last pair have zeros for g, but 0 * inf is NaN.
        inside = is_pair[:, None]
        if not EVEN_H:
            inside = inside & (h < H)[None, :]
        x = tl.load(rows_ptr + (k.to(tl.int64) * H)[:, None] + h[None, :], mask=inside, other=0.0)
        acc = add_product(tl.trans(g), x, acc, zero, PRECISION)
        dlogits_ptr += BLOCK_N * ROUTE_WORDS
    inside = (word < V - first_v)[:, None]
    if not EVEN_H:
        inside = inside & (h < H)[None, :]
    acc = acc * (tl.load(peak_ptr) * factor)
    out = dweight_ptr + (first_v + word)[:, None] * H + h[None, :]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["chunk", "num_segments", "span"])
def routed_hidden_grad_kernel(
    dlogits_ptr,
    weight_ptr,
    drows_ptr,
    list_ptr,
    firsts_ptr,
    first_row_ptr,
    ends_ptr,
    chunk,
    num_segments,
    span,
    V,
    H,
    stride_weight_v,
    stride_weight_h,
    EVEN_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    AMD: tl.constexpr,
    ROUTE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """drows [padded N, H] float32 += dlogits . weight[block], for the chunk's blocks one after another.

    A program owns `span` segments of tokens and one tile of H: nobody else adds to them, and every token's sum runs
    over its blocks in ascending order, whatever the span. drows comes with what every sum starts from.
    """
    tiles_h = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    first_segment = (pid // tiles_h) * span
    last_segment = tl.minimum(first_segment + span, num_segments) - 1
    first_h = (pid % tiles_h) * BLOCK_H
    unit, word, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    h = first_h + unit
    is_unit = (h < H)[None, :]
    # Offsets within the tile are int32 unless WIDE; what leads to the tile is added to the pointer.
    weight_ptr += first_h.to(tl.int64) * stride_weight_h
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    offsets = (word.to(kind) * stride_weight_v)[:, None] + (unit.to(kind) * stride_weight_h)[None, :]
    for block in range(tl.load(firsts_ptr + chunk), tl.load(firsts_ptr + chunk + 1)):
        ends = ends_ptr + tl.cast(block, tl.int64) * num_segments
        end = tl.load(ends + last_segment)
        start = tl.load(ends + first_segment - 1, mask=first_segment > 0, other=0)
        if start < end:
            first_v = tl.cast(block, tl.int64) * ROUTE_WORDS
            row = tl.load(first_row_ptr + block).to(tl.int64)
            words = tl.minimum(V - first_v, ROUTE_WORDS).to(tl.int32)
            if BLOCK_V == ROUTE_WORDS:
                # Once a block, for all its pairs.
                is_word = (first_v + word < V)[:, None]
                if not EVEN_H:
                    is_word = is_word & is_unit
                whole = tl.load(weight_ptr + first_v * stride_weight_v + offsets, mask=is_word, other=0.0)
            for place in range(start, end, BLOCK_N):
                is_pair = place + n < end
                slot = row + place + n
                k = tl.load(list_ptr + slot, mask=is_pair, other=0)
                pairs = dlogits_ptr + (slot * ROUTE_WORDS)[:, None] + word[None, :]
                acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
                if BLOCK_V == ROUTE_WORDS:
                    g = tl.load(pairs, mask=is_pair[:, None], other=0.0)
                    acc = tl.dot(g, whole, acc, input_precision=PRECISION)
                else:
                    # To a bound that the compiler does not know: unrolled as a whole it would spill.
                    for first in range(0, words, BLOCK_V):
                        v = first_v + first
                        is_word = (v + word < V)[:, None]
                        if not EVEN_H:
                            is_word = is_word & is_unit
                        w = tl.load(weight_ptr + v * stride_weight_v + offsets, mask=is_word, other=0.0)
                        g = tl.load(pairs + first, mask=is_pair[:, None], other=0.0)
                        acc = tl.dot(g, w, acc, input_precision=PRECISION)
                inside = is_pair[:, None]
                if not EVEN_H:
                    inside = inside & is_unit
                # The store adds: L2 does, and no thread waits for the sum so far. Nobody else adds to it meanwhile.
                tl.atomic_add(drows_ptr + (k.to(tl.int64) * H)[:, None] + h[None, :], acc, mask=inside, sem="relaxed")
            # The next block may hold the same tokens in other threads' rows, and adds to them after this one.
            if AMD:
                # Its barrier waits for shared memory alone: first, until L2 has what this thread added.
                tl.inline_asm_elementwise(
                    "s_waitcnt vmcnt(0)\ns_mov_b32 $0, $1", "=s,s", [block], dtype=tl.int32, is_pure=False, pack=1
                )
            tl.debug_barrier()


@triton.jit(do_not_specialize=["chunk", "num_segments"])
def routed_bias_grad_kernel(
    dlogits_ptr,
    dbias_ptr,
    peak_ptr,
    firsts_ptr,
    first_row_ptr,
    ends_ptr,
    chunk,
    num_segments,
    V,
    factor,
    ROUTE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dbias [V] float32 = peak * factor * column sums of dlogits."""
    parts: tl.constexpr = ROUTE_WORDS // BLOCK_V
    pid = tl.program_id(0)
    block = tl.load(firsts_ptr + chunk) + pid // parts
    if block >= tl.load(firsts_ptr + chunk + 1):
        return
    n = tl.arange(0, BLOCK_N)
    column = (pid % parts) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.load(ends_ptr + block.to(tl.int64) * num_segments + num_segments - 1)
    dlogits_ptr += tl.load(first_row_ptr + block).to(tl.int64) * ROUTE_WORDS
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, total, BLOCK_N):
        inside = (start + n < total)[:, None]
        place = (start + n).to(tl.int64)[:, None] * ROUTE_WORDS + column[None, :]
        acc += tl.load(dlogits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    v = block.to(tl.int64) * ROUTE_WORDS + column
    tl.store(dbias_ptr + v, tl.sum(acc, axis=0) * (tl.load(peak_ptr) * factor), mask=v < V)
