"""Device functions that several kernels share: program order, activation, one tile of logits and of their gradient."""

import triton
import triton.language as tl


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
def logit_gradient(
    z,
    position,
    is_active,
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
    BLOCK_V: tl.constexpr,
):
    """grad / peak * f'(z) / f'(0) * (softmax - onehot) of raw logits z [BLOCK_N, BLOCK_V], words first_v and after.

    Row i belongs to the token that stands at `position` [BLOCK_N] of the sorted order; what is not active is 0.
    """
    # Loaded behind the loop, whose registers they would take.
    word = tl.arange(0, BLOCK_V)
    token = tl.load(order_ptr + position, mask=is_active, other=0)
    target = tl.load(targets_ptr + token, mask=is_active, other=0)
    # float64 in two float32 parts: a float32 log-sum-exp of 1e4 would be off by 5e-4, and every probability with it.
    lse = tl.load(lse_ptr + token, mask=is_active, other=0.0)
    lse_high = lse.to(tl.float32)
    lse_low = (lse - lse_high).to(tl.float32)
    grad = tl.load(grad_ptr + token, mask=is_active, other=0.0) / tl.load(peak_ptr)
    grad = tl.where((target >= 0) & (target < V), grad, float("nan"))
    column = (target - first_v).to(tl.int32)

    z, slope = activation(z, pre_scale, post_scale, HAS_SOFTCAP)
    # softmax - 1 is formed in float32, where the target's probability is close to 1.
    g = tl.exp((z - lse_high[:, None]) - lse_low[:, None]) - tl.where(word[None, :] == column[:, None], 1.0, 0.0)
    g = -grad[:, None] * g * slope
    # Padding tokens must be zeros: 0 * inf is NaN. Padding words need a finite gradient, by the logits they come with.
    return tl.where(is_active[:, None], g, 0.0)
