"""Which (token, vocabulary block) pairs a routed backward keeps, and each block's list of tokens.

A block is ROUTE_WORDS words. Its exact softmax mass comes from the forward's block statistics, without another GEMM.
Lists are built by counting and prefix sums alone: no atomics, so that the same inputs give the same order.
"""

import triton
import triton.language as tl


@triton.jit
def mass_bits(route_ptr, block, n, own, inside, N):
    """Masses [BLOCK_B, BLOCK_N] as ordered integers; the target's own block, and what is outside, as the largest."""
    mass = tl.load(route_ptr + block.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=float("inf"))
    is_own = block[:, None] == own[None, :]
    return mass, tl.where(is_own, float("inf"), mass).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["N"])
def route_kernel(
    block_peak_ptr,
    block_sum_ptr,
    lse_ptr,
    targets_ptr,
    route_ptr,
    kept_ptr,
    dropped_ptr,
    N,
    V,
    num_statistics,
    num_blocks,
    ignore_index,
    max_dropped_mass,
    RATIO: tl.constexpr,
    ROUTE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """route [num_blocks, N]: the softmax mass of every pair that counts, minus it for one that is left out; float32.

    Per token the lightest blocks are left out as long as their masses sum to at most max_dropped_mass: all whose mass
    is at most a threshold, the largest that keeps the bound, found by bisection over the bits of a float32. Equal
    masses go together. The target's own block always counts, as do all blocks of a token with a mass that is not
    finite. Ignored tokens have none: zeros. kept and dropped [N] float32: pairs that count, and the mass left out.
    RATIO statistics make one block.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = n < N
    target = tl.load(targets_ptr + n, mask=is_token, other=ignore_index)
    is_scored = target != ignore_index
    own = tl.where((target >= 0) & (target < V), target // ROUTE_WORDS, -1).to(tl.int32)
    lse = tl.load(lse_ptr + n, mask=is_token, other=0.0)
    lse_high = lse.to(tl.float32)
    lse_low = (lse - lse_high).to(tl.float32)
    has_bad = tl.zeros((BLOCK_N,), tl.int32)
    for b0 in range(0, num_blocks, BLOCK_B):
        block = b0 + tl.arange(0, BLOCK_B)
        inside = (block < num_blocks)[:, None] & is_token[None, :]
        mass = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        for part in range(0, RATIO):
            statistic = block * RATIO + part
            there = inside & (statistic < num_statistics)[:, None]
            at = statistic.to(tl.int64)[:, None] * N + n[None, :]
            peak = tl.load(block_peak_ptr + at, mask=there, other=float("-inf"))
            total = tl.load(block_sum_ptr + at, mask=there, other=0.0)
            mass += tl.where(there, total * tl.exp((peak - lse_high[None, :]) - lse_low[None, :]), 0.0)
        # Compared this way round, a NaN is bad.
        has_bad = tl.maximum(has_bad, tl.max(((mass < float("inf")) == 0).to(tl.int32), axis=0))
        tl.store(route_ptr + block.to(tl.int64)[:, None] * N + n[None, :], mass, mask=inside)
    tl.debug_barrier()

    # Non-negative floats are ordered as their bits are. The sum over all masses up to `low` keeps the bound, the sum
    # up to `high` does not (or `high` is above every mass).
    low = tl.full((BLOCK_N,), -1, tl.int32)
    high = tl.full((BLOCK_N,), 0x7F800000, tl.int32)
    for _ in range(0, 31):
        middle = low + (high - low) // 2
        total = tl.zeros((BLOCK_N,), tl.float32)
        for b0 in range(0, num_blocks, BLOCK_B):
            block = b0 + tl.arange(0, BLOCK_B)
            inside = (block < num_blocks)[:, None] & is_token[None, :]
            mass, bits = mass_bits(route_ptr, block, n, own, inside, N)
            total += tl.sum(tl.where(bits <= middle[None, :], mass, 0.0), axis=0)
        fits = total <= max_dropped_mass
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)

    kept = tl.zeros((BLOCK_N,), tl.float32)
    dropped = tl.zeros((BLOCK_N,), tl.float32)
    for b0 in range(0, num_blocks, BLOCK_B):
        block = b0 + tl.arange(0, BLOCK_B)
        inside = (block < num_blocks)[:, None] & is_token[None, :]
        mass, bits = mass_bits(route_ptr, block, n, own, inside, N)
        is_kept = inside & is_scored[None, :] & ((bits > low[None, :]) | (has_bad > 0)[None, :])
        kept += tl.sum(is_kept.to(tl.float32), axis=0)
        dropped += tl.sum(tl.where(inside & (is_kept == 0), mass, 0.0), axis=0)
        # A mass of 0 that counts must not read as one left out.
        mass = tl.where(is_kept, tl.where(mass == 0, 2e-38, mass), tl.where(is_scored[None, :], -mass, 0.0))
        tl.store(route_ptr + block.to(tl.int64)[:, None] * N + n[None, :], mass, mask=inside)
    tl.store(kept_ptr + n, kept, mask=is_token)
    tl.store(dropped_ptr + n, tl.where(is_scored, dropped, 0.0), mask=is_token)


@triton.jit
def keeps(route_ptr, order_ptr, count_ptr, block, k, N):
    """Which of the sorted positions k [BLOCK_K] the blocks [BLOCK_B] keep, [BLOCK_B, BLOCK_K]."""
    is_active = k < tl.load(count_ptr)
    token = tl.load(order_ptr + k, mask=is_active, other=0)
    inside = (block >= 0)[:, None] & is_active[None, :]
    mass = tl.load(route_ptr + block.to(tl.int64)[:, None] * N + token[None, :], mask=inside, other=0.0)
    # Compared this way round, a NaN is kept.
    return inside & ((mass <= 0) == 0)


@triton.jit(do_not_specialize=["N", "num_segments"])
def route_count_kernel(
    route_ptr,
    order_ptr,
    count_ptr,
    counts_ptr,
    N,
    num_blocks,
    num_segments,
    SEGMENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """counts [num_blocks, num_segments] int32: pairs of each block with each SEGMENT of the sorted active tokens."""
    pid = tl.program_id(0)
    segment = pid % num_segments
    block = (pid // num_segments) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = block < num_blocks
    k = segment * SEGMENT + tl.arange(0, SEGMENT)
    kept = keeps(route_ptr, order_ptr, count_ptr, tl.where(inside, block, -1), k, N)
    tl.store(counts_ptr + block * num_segments + segment, tl.sum(kept.to(tl.int32), axis=1), mask=inside)


@triton.jit(do_not_specialize=["num_blocks", "num_segments", "num_chunks", "rows", "most_blocks"])
def route_chunks_kernel(
    ends_ptr,
    firsts_ptr,
    used_ptr,
    first_row_ptr,
    num_blocks,
    num_segments,
    num_chunks,
    rows,
    most_blocks,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Which blocks are worked on together: as many as have their pairs, in whole tiles, in the workspace's `rows`.

    Chunk c has blocks firsts[c] to firsts[c + 1] - 1, at most `most_blocks`, and used[c] rows, block b's from
    first_row[b] on; all int32. Chunks behind the last block are empty. One program, BLOCK_B >= num_blocks.
    """
    block = tl.arange(0, BLOCK_B)
    is_block = block < num_blocks
    last = block.to(tl.int64) * num_segments + num_segments - 1
    total = tl.load(ends_ptr + last, mask=is_block, other=0)
    size = (tl.cdiv(total, TILE) * TILE).to(tl.int64)
    end = tl.cumsum(size, axis=0)
    first = tl.cast(0, tl.int32)
    base = tl.cast(0, tl.int64)
    tl.store(firsts_ptr, 0)
    for chunk in range(0, num_chunks):
        fits = is_block & (end <= base + rows)
        after = tl.minimum(tl.sum(fits.to(tl.int32), axis=0), first + most_blocks)
        is_here = (block >= first) & (block < after)
        tl.store(first_row_ptr + block, (end - size - base).to(tl.int32), mask=is_here)
        here = tl.sum(tl.where(is_here, size, 0), axis=0)
        tl.store(firsts_ptr + chunk + 1, after)
        tl.store(used_ptr + chunk, here.to(tl.int32))
        first = after
        base += here


@triton.jit(do_not_specialize=["chunk", "N", "num_segments"])
def route_list_kernel(
    route_ptr,
    order_ptr,
    count_ptr,
    ends_ptr,
    firsts_ptr,
    first_row_ptr,
    list_ptr,
    owner_ptr,
    chunk,
    N,
    num_segments,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """list [rows] int32: the sorted positions of the tokens of the chunk's blocks, ascending within each.

    owner [rows / TILE] int32: whose a tile of rows is. ends [num_blocks, num_segments]: prefix sums of
    `route_count_kernel`'s counts within each block.
    """
    pid = tl.program_id(0)
    segment = pid % num_segments
    block = tl.load(firsts_ptr + chunk) + pid // num_segments
    if block >= tl.load(firsts_ptr + chunk + 1):
        return
    ends = ends_ptr + block.to(tl.int64) * num_segments
    end = tl.load(ends + segment)
    row = tl.load(first_row_ptr + block)
    k = segment * SEGMENT + tl.arange(0, SEGMENT)
    kept = keeps(route_ptr, order_ptr, count_ptr, block + tl.zeros((1,), tl.int32), k, N)
    kept = tl.reshape(kept, (SEGMENT,)).to(tl.int32)
    # From the segment's end backwards: the prefix sum includes the element itself.
    place = end - tl.sum(kept, axis=0) + tl.cumsum(kept, axis=0) - 1
    tl.store(list_ptr + row + place, k, mask=kept > 0)
    if segment == 0:
        tile = tl.arange(0, 16)
        tiles = tl.cdiv(tl.load(ends + num_segments - 1), TILE)
        for first in range(0, tiles, 16):
            tl.store(owner_ptr + row // TILE + first + tile, block + tl.zeros_like(tile), mask=first + tile < tiles)


@triton.jit(do_not_specialize=["first_position", "num_rows", "N"])
def dropped_mass_kernel(
    route_ptr,
    order_ptr,
    count_ptr,
    lse_ptr,
    mass_ptr,
    first_position,
    num_rows,
    N,
    V,
    num_blocks,
    num_columns,
    post_scale,
    factor,
    HAS_SOFTCAP: tl.constexpr,
    ROUTE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """mass [num_rows, num_columns] = factor * what the sorted tokens first_position and after leave out of each block.

    0 for pairs that are kept, for tokens without a gradient and behind the last block. With a softcap times its slope
    at lse + log(mass / |block|), the logit whose exponential is the block's mean one.
    """
    tiles_b = tl.cdiv(num_columns, BLOCK_B)
    pid = tl.program_id(0)
    row = (pid // tiles_b) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = (pid % tiles_b) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_active = (row < num_rows) & (first_position + row < tl.load(count_ptr))
    token = tl.load(order_ptr + first_position + row, mask=is_active, other=0)
    inside = (block < num_blocks)[:, None] & is_active[None, :]
    # Read as it lies in memory, tokens along the rows, and turned for the store.
    mass = tl.load(route_ptr + block.to(tl.int64)[:, None] * N + token[None, :], mask=inside, other=0.0)
    mass = tl.where(mass < 0, -mass, 0.0)
    if HAS_SOFTCAP:
        lse = tl.load(lse_ptr + token, mask=is_active, other=0.0).to(tl.float32)
        words = tl.maximum(tl.minimum(V - block * ROUTE_WORDS, ROUTE_WORDS), 1).to(tl.float32)
        tanh = (lse[None, :] + tl.log(tl.maximum(mass, 2e-38) / words[:, None])) / post_scale
        mass *= 1.0 - tl.minimum(tanh * tanh, 1.0)
    out = mass_ptr + row.to(tl.int64)[:, None] * num_columns + block[None, :]
    whole = (row < num_rows)[:, None] & (block < num_columns)[None, :]
    tl.store(out, tl.trans(mass * factor).to(mass_ptr.dtype.element_ty), mask=whole)
