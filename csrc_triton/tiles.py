"""Device functions that several kernels share: program order, activation, one tile of logits and of their gradient."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of(pid, tiles_a, tiles_b, GROUP: tl.constexpr):
    """The (a, b) tile of a program in a one-dimensional grid.

    One-dimensional, because the other axes of a grid end at 65,535. `GROUP` tiles of a walk through all tiles of b
    together, a fastest: programs that run at the same time share their b tile, and the group's a tiles stay in L2.
    """
    in_group = GROUP * tiles_b
    first = (pid // in_group) * GROUP
    size = min(tiles_a - first, GROUP)
    return first + (pid % in_group) % size, (pid % in_group) // size


@triton.jit
def tanh(x):
    """(tanh(x), 1 - tanh(x)^2) to float32 rounding: the device library's tanh is not there in the interpreter."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    size = tl.abs(x)
    rest = 1.0 / (tl.exp(2.0 * size) + 1.0)
    far = 1.0 - 2.0 * rest
    far = tl.where(x < 0, -far, far)
    # Near 0 the far branch would cancel; a NaN takes it and stays one. The slope in terms of `rest` never cancels.
    return tl.where(size < 0.625, near, far), 4.0 * rest * (1.0 - rest)


@triton.jit
def activation(z, pre_scale, post_scale, HAS_SOFTCAP: tl.constexpr):
    """(f(z), f'(z) / (pre_scale * post_scale)): post_scale * tanh(pre_scale * z) with a softcap, else a factor."""
    z = z * pre_scale
    if HAS_SOFTCAP:
        z, slope = tanh(z)
        return z * post_scale, slope
    else:
        return z * post_scale, 1.0


@triton.jit
def raw_logits(
    hidden_ptr,
    weight_ptr,
    hidden_rows,
    weight_rows,
    H,
    stride_hidden_h,
    stride_weight_h,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """hidden . weight^T of one tile, [BLOCK_N, BLOCK_V] float32.

    `hidden_rows` and `weight_rows` are the offsets of the tile's rows from the pointers, int32 where a tile is sure to
    fit (it saves the registers of half the address), else int64. What leads to the tile is in the pointers.
    """
    h = tl.arange(0, BLOCK_H)
    hidden_offsets = hidden_rows[:, None] + h[None, :].to(hidden_rows.dtype) * stride_hidden_h
    weight_offsets = weight_rows[:, None] + h[None, :].to(weight_rows.dtype) * stride_weight_h
    hidden_step = tl.cast(BLOCK_H, tl.int64) * stride_hidden_h
    weight_step = tl.cast(BLOCK_H, tl.int64) * stride_weight_h
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(hidden_ptr + hidden_offsets)
            w = tl.load(weight_ptr + weight_offsets)
        else:
            inside = (start + h < H)[None, :]
            x = tl.load(hidden_ptr + hidden_offsets, mask=inside, other=0.0)
            w = tl.load(weight_ptr + weight_offsets, mask=inside, other=0.0)
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
        hidden_ptr += hidden_step
        weight_ptr += weight_step
    return z


@triton.jit
def nothing(count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros [ROWS, COLUMNS] float32 of a count that is never negative, which no compiler can know."""
    return tl.zeros((ROWS, COLUMNS), tl.float32) + tl.cast(count < 0, tl.float32)


@triton.jit
def add_product(a, b, acc, zero, PRECISION: tl.constexpr):
    """acc + a . b, the sum of a long product that comes in steps; `zero` is what `nothing` says.

    In float32 a step is summed up by itself: a token's target, or a word's, is most of its sum, and each addition after
    it rounds at that size. Added one product after another (as `tl.dot` does with a sum to add to, and with a zero
    that the compiler knows) dhidden was 3 times as far off as the eager path's on an H200. Tensor cores round once a
    step by themselves, and are slow with any sum but the one they hold.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return acc + tl.dot(a, b, zero, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def power(z, unit, shift, PTX: tl.constexpr):
    """2^(unit * z - shift), z [rows, columns] and the others [rows, 1]; with PTX rounded once before the power.

    One FFMA and one MUFU an element. Without PTX (AMD, the interpreter) shift comes divided by unit, and is taken off
    first: a product of its own would be rounded at the size of the logits.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
            "=f,f,f,f",
            [z, unit, -shift],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.exp2((z - shift) * unit)


@triton.jit
def power_near(z, unit, shift, low, PTX: tl.constexpr):
    """`power` times 2^low, the small rest [rows, 1] that a shift in float32 leaves."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; add.f32 t, t, $4; ex2.approx.ftz.f32 $0, t; }",
            "=f,f,f,f,f",
            [z, unit, -shift, low],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.exp2((z - shift) * unit + low)


@triton.jit
def scaled_logits(z, pre_scale, post_scale, HAS_SOFTCAP: tl.constexpr, POSITIVE: tl.constexpr):
    """(z', slope, factor): logits are factor * z', factor > 0. slope is `activation`'s, 1 without a softcap.

    Without a softcap the scale itself is the factor if POSITIVE, and costs no product a logit.
    """
    if HAS_SOFTCAP:
        z, slope = tanh(z * pre_scale)
        return z, slope, tl.cast(post_scale, tl.float32)
    elif POSITIVE:
        return z, 1.0, tl.cast(pre_scale * post_scale, tl.float32)
    else:
        return z * pre_scale, 1.0, tl.cast(post_scale, tl.float32)


@triton.jit
def moments(z, peak, factor, PTX: tl.constexpr):
    """(sum of e, of e d, of e^2) a row, with d = factor (z - peak) and e = exp(d); z [rows, words], the others [rows].

    A row of -inf alone has sums of 0, as has a word of -inf.
    """
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    unit = factor * LOG2_E
    shift = anchor
    near = tl.full(anchor.shape, 1.0, tl.float32)
    if PTX:
        shift = anchor * unit
        near = power(anchor, -unit, -shift, PTX)  # as in `forward.sum_of_powers`
    p = power(z, unit[:, None], shift[:, None], PTX)
    total = tl.sum(p, axis=1) * near
    weighted = tl.sum(tl.where(p == 0, 0.0, p * (z - anchor[:, None])), axis=1) * near * factor
    return total, weighted, tl.sum(p * p, axis=1) * near * near


@triton.jit
def word_is(column, BLOCK_V: tl.constexpr):
    """bool [rows, BLOCK_V]: the word at each row's `column` [rows] of a tile; -1 is none.

    Compared in eights, for that is how the accumulators of matrix units lie: which eight is a constant of the
    instruction then, and a thread compares it with two numbers a row. Whole column numbers depend on the thread, and
    the compiler would hold all of a thread's 64 in registers, for the length of the kernel.
    """
    eight, word = tl.arange(0, BLOCK_V // 8), tl.arange(0, 8)
    found = (column[:, None] - word[None, :])[:, None, :] == (eight * 8)[None, :, None]
    return tl.reshape(found, (column.shape[0], BLOCK_V))


@triton.jit
def mask_words(z, words, BLOCK_V: tl.constexpr):
    """z [rows, BLOCK_V], -inf from column `words` on: a pass over the tile that only the last one pays for."""
    if words < BLOCK_V:
        # In eights, as in `word_is`.
        eight, word = tl.arange(0, BLOCK_V // 8), tl.arange(0, 8)
        is_word = ((words - word)[None, :] > (eight * 8)[:, None])[None, :, :]
        is_word = tl.reshape(tl.broadcast_to(is_word, (z.shape[0], BLOCK_V // 8, 8)), z.shape)
        z = tl.where(is_word, z, float("-inf"))
    return z


@triton.jit
def logit_gradient(
    z,
    position,
    is_active,
    is_whole,
    first_v,
    order_ptr,
    targets_ptr,
    lse_ptr,
    grad_ptr,
    peak_ptr,
    V,
    pre_scale,
    post_scale,
    HAS_SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    MASKED: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    temperature_ptr=None,
    entropy_grad_ptr=None,
    entropy_ptr=None,
    HAS_TEMPERATURE: tl.constexpr = False,
    HAS_ENTROPY: tl.constexpr = False,
):
    """-grad / peak * f'(z) / f'(0) * (softmax - onehot) of raw logits z [BLOCK_N, BLOCK_V], words first_v and after.

    HAS_ENTROPY: less entropy_grad / peak * f'(z) / f'(0) * softmax * (log softmax + entropy). HAS_TEMPERATURE: logits
    are divided by each token's own, which the gradients come divided by. Row i belongs to the token that stands at
    `position` [BLOCK_N] of the sorted order; what is not active is 0. is_whole: all of them are. MASKED: words behind
    the last have no share, whatever their logits are.
    """
    # Loaded behind the loop, whose registers they would take.
    token = tl.load(order_ptr + position, mask=is_active, other=0)
    target = tl.load(targets_ptr + token, mask=is_active, other=0)
    lse = tl.load(lse_ptr + token, mask=is_active, other=0.0)
    grad = tl.load(grad_ptr + token, mask=is_active, other=0.0) / tl.load(peak_ptr)
    grad = -tl.where((target >= 0) & (target < V), grad, float("nan"))

    z, slope, factor = scaled_logits(z, pre_scale, post_scale, HAS_SOFTCAP, POSITIVE)
    if HAS_TEMPERATURE:
        factor = factor / tl.load(temperature_ptr + token, mask=is_active, other=1.0)
    unit = factor * LOG2_E
    # A float32 shift near the log-sum-exp, and what float64 says is missing: a float32 log-sum-exp of 1e4 would be off
    # by 5e-4, and every probability with it.
    anchor = lse.to(tl.float32) / factor
    exact = anchor.to(tl.float64) * factor.to(tl.float64) * LOG2_E - lse * LOG2_E
    shift = anchor
    rest = exact.to(tl.float32) / LOG2_E
    if PTX:
        shift = anchor * unit
        exact += shift.to(tl.float64) - anchor.to(tl.float64) * unit.to(tl.float64)
    low = exact.to(tl.float32)

    if MASKED:
        z = mask_words(z, tl.minimum(V - first_v, BLOCK_V).to(tl.int32), BLOCK_V)
    if HAS_TEMPERATURE:
        unit = unit[:, None]
        factor = factor[:, None]
    p = power_near(z, unit, shift[:, None], low[:, None], PTX)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + token, mask=is_active, other=0.0) + rest
        share = tl.load(entropy_grad_ptr + token, mask=is_active, other=0.0) / tl.load(peak_ptr)
        weight = grad[:, None] - ((z - anchor[:, None]) * factor + entropy[:, None]) * share[:, None]
        # Only what the branch changes outlives it: two tiles more would not fit the registers.
        p = tl.where(p == 0, 0.0, p * weight)
    # softmax - 1 is formed in float32, where the target's probability is close to 1.
    is_here = (target >= first_v) & (target < first_v + BLOCK_V)
    if tl.max(is_here.to(tl.int32), axis=0) > 0:
        taken = 1.0
        if HAS_ENTROPY:
            taken = grad[:, None]
        column = tl.where(is_here, target - first_v, -1).to(tl.int32)
        p = tl.where(word_is(column, BLOCK_V), p - taken, p)
    g = p
    if not HAS_ENTROPY:
        g = p * grad[:, None]
    if HAS_SOFTCAP:
        g = g * slope
    # Padding tokens must be zeros: 0 * inf is NaN. Padding words need a finite gradient, by the logits they come with.
    if is_whole == 0:
        g = tl.where(is_active[:, None], g, 0.0)
    return g
