"""The CLHA loss and its slope from log-probabilities: two launches, or a few for every chunk of whole prompts.

1. `combine.combine_kernel`, which makes the log-probabilities, also counts each candidate's scored tokens and the kept
   pairs of the batch (`count_prompt`), which depend on no logit. Where the prompts come in chunks, `count_kernel` has
   counted beforehand.
2. `prompts_kernel`: a pair's weight needs the finished counts of the whole batch, hence a launch of its own.
3. `finish_kernel`: adds the prompts' shares in a fixed order, so that the loss is bitwise repeatable.

Sums over tokens, pairs and prompts run in float64: they are a few thousand numbers, and a candidate may have 100,000
tokens. `tl.debug_barrier` makes what a program has stored visible to all of its own threads.
"""

import triton
import triton.language as tl

NOISE_NONE: tl.constexpr = tl.constexpr(0)
NOISE_ABS: tl.constexpr = tl.constexpr(1)
NOISE_SIGNED: tl.constexpr = tl.constexpr(2)

REDUCE_SUM: tl.constexpr = tl.constexpr(0)
REDUCE_DISTANCE_MEAN: tl.constexpr = tl.constexpr(1)
REDUCE_PAIR_MEAN: tl.constexpr = tl.constexpr(2)

METRICS: tl.constexpr = tl.constexpr(16)


@triton.jit
def span(ends_ptr, index, inside, limit):
    """[start, end) of segments in a packed array of `limit` elements, from the inclusive sums of their lengths."""
    end = tl.load(ends_ptr + index, mask=inside, other=0)
    start = tl.load(ends_ptr + index - 1, mask=inside & (index > 0), other=0)
    # Lengths that do not add up are the caller's mistake; they must not become an access out of bounds.
    end = tl.minimum(tl.maximum(end, 0), limit)
    start = tl.minimum(tl.maximum(start, 0), limit)
    return start, end


@triton.jit
def is_kept(reward_better, reward_worse, reward_margin, NOISE: tl.constexpr):
    """The noise rule on pairs whose first member is ranked better."""
    lead = reward_better - reward_worse
    if NOISE == NOISE_ABS:
        return tl.abs(lead) > reward_margin
    elif NOISE == NOISE_SIGNED:
        return lead > reward_margin
    else:
        return lead == lead


@triton.jit
def load_rewards(rewards_ptr, c, inside, HAS_REWARDS: tl.constexpr):
    if HAS_REWARDS:
        return tl.load(rewards_ptr + c, mask=inside, other=0.0)
    else:
        return tl.zeros(c.shape, tl.float32)


@triton.jit
def count_prompt(
    p,
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
    HAS_REWARDS: tl.constexpr,
    NOISE: tl.constexpr,
    REDUCE: tl.constexpr,
    COUNT_PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Scored tokens of every candidate of prompt p and, if asked, its kept pairs added to the batch's counts."""
    first, last = span(prompt_ends_ptr, p, p >= 0, C)
    for i0 in range(first, last, BLOCK_C):
        c = i0 + tl.arange(0, BLOCK_C)
        start, end = span(token_ends_ptr, c, c < last, N)
        length = tl.zeros((BLOCK_C,), tl.int32)
        for t0 in range(0, tl.max(end - start, axis=0), BLOCK_T):
            t = (start + t0)[:, None] + tl.arange(0, BLOCK_T)[None, :]
            inside = t < end[:, None]
            target = tl.load(targets_ptr + t, mask=inside, other=0)
            length += tl.sum((inside & (target != ignore_index)).to(tl.int32), axis=1)
        tl.store(lengths_ptr + c, length, mask=c < last)
    if COUNT_PAIRS:
        tl.debug_barrier()
        for i0 in range(first, last, BLOCK_C):
            i = i0 + tl.arange(0, BLOCK_C)
            has_i = tl.load(lengths_ptr + i, mask=i < last, other=0) > 0
            reward_i = load_rewards(rewards_ptr, i, i < last, HAS_REWARDS)
            for j0 in range(i0, last, BLOCK_C):
                j = j0 + tl.arange(0, BLOCK_C)
                has_j = tl.load(lengths_ptr + j, mask=j < last, other=0) > 0
                reward_j = load_rewards(rewards_ptr, j, j < last, HAS_REWARDS)
                distance = j[None, :] - i[:, None]
                kept = has_i[:, None] & has_j[None, :] & (distance > 0)
                kept = kept & is_kept(reward_i[:, None], reward_j[None, :], reward_margin, NOISE)
                # Integers: the order of the additions cannot be seen in the result.
                if REDUCE == REDUCE_PAIR_MEAN:
                    tl.atomic_add(pair_counts_ptr, tl.sum(kept.to(tl.int32)), sem="relaxed")
                else:
                    ones = tl.full((BLOCK_C, BLOCK_C), 1, tl.int32)
                    tl.atomic_add(pair_counts_ptr + distance - 1, ones, mask=kept, sem="relaxed")


@triton.jit(do_not_specialize=["N", "C"])
def count_kernel(
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
    HAS_REWARDS: tl.constexpr,
    NOISE: tl.constexpr,
    REDUCE: tl.constexpr,
    COUNT_PAIRS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One prompt a program: lengths [C] and the batch's kept pairs, which every chunk's weights need beforehand."""
    count_prompt(
        tl.program_id(0),
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


@triton.jit(do_not_specialize=["N", "C", "P", "num_distances", "first_prompt", "first_token"])
def prompts_kernel(
    logps_ptr,
    lengths_ptr,
    token_ends_ptr,
    prompt_ends_ptr,
    rewards_ptr,
    sft_index_ptr,
    pair_counts_ptr,
    prompt_count_ptr,
    sums_ptr,
    scores_ptr,
    coefficients_ptr,
    partials_ptr,
    N,
    C,
    P,
    num_distances,
    first_prompt,
    first_token,
    margin,
    reward_margin,
    rank_weight,
    sft_weight,
    reward_floor,
    HAS_REWARDS: tl.constexpr,
    HAS_SFT_INDEX: tl.constexpr,
    HAS_PROMPT_COUNT: tl.constexpr,
    NOISE: tl.constexpr,
    REDUCE: tl.constexpr,
    SFT_MEAN: tl.constexpr,
    SFT_SQUARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One prompt a program: scores [C], dL/dS [C], and the prompt's share of the 16 metrics, partials [P, 16].

    Programs take the prompts first_prompt and after, of a batch of P; logps are those of tokens [first_token, N).
    sums [C] float64 is scratch. pair_counts: [D] kept pairs by distance, [1] for the pair mean, unused for the sum.
    """
    p = first_prompt + tl.program_id(0)
    logps_ptr -= first_token
    first, last = span(prompt_ends_ptr, p, p >= 0, C)
    size = (last - first).to(tl.float64)
    prompts = tl.cast(P, tl.float64)
    if HAS_PROMPT_COUNT:
        prompts = tl.load(prompt_count_ptr).to(tl.float64)

    scored_tokens = tl.zeros((BLOCK_C,), tl.float64)
    scored_candidates = tl.zeros((BLOCK_C,), tl.float64)
    for i0 in range(first, last, BLOCK_C):
        c = i0 + tl.arange(0, BLOCK_C)
        inside = c < last
        start, end = span(token_ends_ptr, c, inside, N)
        lanes = tl.zeros((BLOCK_C, BLOCK_T), tl.float64)
        for t0 in range(0, tl.max(end - start, axis=0), BLOCK_T):
            t = (start + t0)[:, None] + tl.arange(0, BLOCK_T)[None, :]
            lanes += tl.load(logps_ptr + t, mask=t < end[:, None], other=0.0).to(tl.float64)
        sums = tl.sum(lanes, axis=1)
        length = tl.load(lengths_ptr + c, mask=inside, other=0)
        tl.store(sums_ptr + c, sums, mask=inside)
        scores = tl.where(length > 0, sums / tl.maximum(length, 1), 0.0)
        tl.store(scores_ptr + c, scores.to(tl.float32), mask=inside)
        scored_tokens += length.to(tl.float64)
        scored_candidates += (length > 0).to(tl.float64)
    tl.debug_barrier()

    target = first
    if HAS_SFT_INDEX:
        target = first + tl.load(sft_index_ptr + p)
    # An SFT target outside its prompt makes the loss NaN, as a target word outside the vocabulary does.
    is_own = (target >= first) & (target < last)
    target_length = tl.load(lengths_ptr + target, mask=is_own, other=1)
    target_sum = tl.load(sums_ptr + target, mask=is_own, other=float("nan"))
    gate = target_length > 0
    if HAS_REWARDS:
        gate = gate & (tl.load(rewards_ptr + target, mask=is_own, other=float("inf")) > reward_floor)
    sft_slope = -tl.cast(sft_weight, tl.float64) / prompts
    if SFT_SQUARED:
        sft_slope = sft_slope * (size - 1.0) * (size - 1.0)
    if SFT_MEAN:
        sft_slope = sft_slope / tl.maximum(target_length, 1)
    sft_slope = tl.where(gate, sft_slope, 0.0)

    rank_loss = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    kept_pairs = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    correct = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    lead_sum = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    chosen = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    rejected = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    active_pairs = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    ordered_pairs = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    concordant = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    discordant = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    for i0 in range(first, last, BLOCK_C):
        i = i0 + tl.arange(0, BLOCK_C)
        length_i = tl.load(lengths_ptr + i, mask=i < last, other=0)
        score_i = tl.load(sums_ptr + i, mask=i < last, other=0.0) / tl.maximum(length_i, 1)
        score_i = tl.where(length_i > 0, score_i, 0.0)[:, None]
        reward_i = load_rewards(rewards_ptr, i, i < last, HAS_REWARDS)[:, None]
        slope = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
        # All j, on both sides of i: a program owns whole rows of the pair matrix, so nothing is added atomically.
        for j0 in range(first, last, BLOCK_C):
            j = j0 + tl.arange(0, BLOCK_C)
            length_j = tl.load(lengths_ptr + j, mask=j < last, other=0)
            score_j = tl.load(sums_ptr + j, mask=j < last, other=0.0) / tl.maximum(length_j, 1)
            score_j = tl.where(length_j > 0, score_j, 0.0)[None, :]
            reward_j = load_rewards(rewards_ptr, j, j < last, HAS_REWARDS)[None, :]
            ahead = j[None, :] - i[:, None]
            is_first = ahead > 0
            distance = tl.abs(ahead)
            present = (length_i > 0)[:, None] & (length_j > 0)[None, :] & (distance > 0)
            reward_better = tl.where(is_first, reward_i, reward_j)
            reward_worse = tl.where(is_first, reward_j, reward_i)
            kept = present & is_kept(reward_better, reward_worse, reward_margin, NOISE)
            lead = tl.where(is_first, score_i - score_j, score_j - score_i)
            slack = margin * distance.to(tl.float64) - lead

            if REDUCE == REDUCE_SUM:
                weight = rank_weight / prompts
            elif REDUCE == REDUCE_DISTANCE_MEAN:
                # Too few counts given make the loss NaN.
                is_counted = distance <= num_distances
                count = tl.load(pair_counts_ptr + distance - 1, mask=kept & is_counted, other=1)
                weight = tl.where(is_counted, rank_weight / count.to(tl.float64), float("nan"))
            else:
                weight = rank_weight / tl.load(pair_counts_ptr).to(tl.float64)
            # Compared this way round, a NaN counts as active and reaches loss and gradient. Selected, not
            # multiplied: what is dropped stays dropped even when it is NaN.
            is_active = kept & (rank_weight > 0) & ((slack <= 0) == 0)
            push = tl.where(is_active, weight, 0.0)
            slope += tl.where(is_first, -push, push)

            pair = kept & is_first
            rank_loss += tl.where(is_active & is_first, weight * slack, 0.0)
            kept_pairs += pair.to(tl.float64)
            correct += tl.where(pair & (lead > 0), 1.0, 0.0) + tl.where(pair & (lead == 0), 0.5, 0.0)
            lead_sum += tl.where(pair, lead, 0.0)
            chosen += tl.where(pair, score_i, 0.0)
            rejected += tl.where(pair, score_j, 0.0)
            active_pairs += (pair & (slack > 0)).to(tl.float64)
            order = reward_i - reward_j
            # Without rewards the given order is the order.
            ordered = present & is_first & ((order != 0) | (HAS_REWARDS == 0))
            agreement = tl.where(order < 0, -lead, lead)
            ordered_pairs += ordered.to(tl.float64)
            concordant += (ordered & (agreement > 0)).to(tl.float64)
            discordant += (ordered & (agreement < 0)).to(tl.float64)
        coefficient = tl.sum(slope, axis=1) / tl.maximum(length_i, 1)
        coefficient += tl.where(i == target, sft_slope, 0.0)
        tl.store(coefficients_ptr + i, coefficient.to(tl.float32), mask=i < last)

    sft_loss = tl.where(sft_slope != 0, sft_slope * target_sum, 0.0)
    out = partials_ptr + p.to(tl.int64) * METRICS
    tl.store(out + 0, tl.sum(rank_loss))
    tl.store(out + 1, sft_loss)
    tl.store(out + 2, tl.sum(kept_pairs))
    tl.store(out + 3, size * (size - 1.0) / 2.0)
    tl.store(out + 4, tl.sum(correct))
    tl.store(out + 5, tl.sum(lead_sum))
    tl.store(out + 6, tl.sum(chosen))
    tl.store(out + 7, tl.sum(rejected))
    tl.store(out + 8, tl.sum(active_pairs))
    tl.store(out + 9, tl.sum(ordered_pairs))
    tl.store(out + 10, tl.sum(concordant))
    tl.store(out + 11, tl.sum(discordant))
    tl.store(out + 12, gate.to(tl.float64))
    tl.store(out + 13, tl.full((), 1.0, tl.float64))
    tl.store(out + 14, tl.sum(scored_tokens))
    tl.store(out + 15, tl.sum(scored_candidates))


@triton.jit(do_not_specialize=["P"])
def finish_kernel(partials_ptr, loss_ptr, metrics_ptr, P, BLOCK_P: tl.constexpr):
    """loss [] and metrics [16], float32: the sums of partials [P, 16] in a fixed order, by a single program."""
    column = tl.arange(0, METRICS)
    total = tl.zeros((METRICS,), tl.float64)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        part = tl.load(partials_ptr + p[:, None] * METRICS + column[None, :], mask=(p < P)[:, None], other=0.0)
        total += tl.sum(part, axis=0)
    tl.store(metrics_ptr + column, total.to(tl.float32))
    tl.store(loss_ptr, tl.sum(tl.where(column < 2, total, 0.0)).to(tl.float32))
