"""The Triton backend's forward of the head: which kernel runs, the copy that it may need, and the launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clha_fast.backends.triton.head import Head, gather, programs, round_up, tiles
from clha_fast.options import ROUTE_WORDS
from csrc_triton import forward, routing

_COPY_BYTES = 64 * 2**20


class Blocks(NamedTuple):
    """What the head's kernel writes, float32: peak and sum [blocks, N], target_logit [N], moments [3, blocks, N]."""

    peak: Tensor
    sum: Tensor
    target_logit: Tensor
    moments: Tensor | None = None


def launch_head(hidden: Tensor, head: Head, workspace_bytes: int | None, routed: bool, moments: bool = False) -> Blocks:
    """The numbers of every token and block of words; `moments` for statistics of its distribution.

    A block is a tile's words, or with `routed` at most ROUTE_WORDS of them. `workspace_bytes` (64 MiB) bounds the copy
    of hidden states that the persistent kernel needs where TMA cannot address them.
    """
    num_tokens, vocabulary = head.targets.shape[0], head.weight.shape[0]
    config = _config(head, moments)
    statistic = _statistic(config, routed)
    blocks = tiles(vocabulary, statistic)
    statistics = Blocks(
        torch.empty(blocks, num_tokens, dtype=torch.float32, device=hidden.device),
        torch.empty(blocks, num_tokens, dtype=torch.float32, device=hidden.device),
        torch.empty(num_tokens, dtype=torch.float32, device=hidden.device),
        torch.empty(3, blocks, num_tokens, dtype=torch.float32, device=hidden.device) if moments else None,
    )
    if num_tokens and head.is_persistent:
        _persistent(hidden, head, statistics, config, statistic, workspace_bytes or _COPY_BYTES)
    elif num_tokens:
        _by_pointers(hidden, head, statistics, config, statistic)
    return statistics


def _config(head: Head, moments: bool = False) -> dict[str, int]:
    return head.config("persistent_forward" if head.is_persistent else "head_forward", moments)


def _statistic(config: dict[str, int], routed: bool) -> int:
    """Words that one (maximum, sum) stands for."""
    width = config["BLOCK_V"]
    return min(width, ROUTE_WORDS) if routed else width


def _by_pointers(hidden: Tensor, head: Head, statistics: Blocks, config: dict[str, int], statistic: int) -> None:
    num_tokens, (vocabulary, width) = head.targets.shape[0], head.weight.shape
    grid = (tiles(num_tokens, config["BLOCK_N"]) * tiles(vocabulary, config["BLOCK_V"]),)
    forward.head_forward_kernel[grid](
        hidden,
        head.weight,
        head.bias,
        head.targets,
        head.row_index,
        *statistics[:3],
        head.temperature,
        statistics.moments,
        hidden.shape[0],
        num_tokens,
        vocabulary,
        width,
        *hidden.stride(),
        *head.weight.stride(),
        head.ignore_index,
        head.pre_scale,
        head.post_scale,
        **head.flags,
        HAS_ROW_INDEX=head.row_index is not None,
        EVEN_H=width % config["BLOCK_H"] == 0,
        WIDE=head.is_wide,
        STATISTIC=statistic,
        HAS_TEMPERATURE=head.temperature is not None,
        MOMENTS=statistics.moments is not None,
        **config,
    )


def _persistent(
    hidden: Tensor,
    head: Head,
    statistics: Blocks,
    config: dict[str, int],
    statistic: int,
    copy_bytes: int,
) -> None:
    """One launch over all tokens, or, where hidden states must be copied, one for each chunk of the copy.

    Descriptors are made on the host: they travel as kernel arguments, which a CUDA graph records, and need neither
    global memory nor a process-wide allocator, as descriptors made by the kernel would.
    """
    num_tokens, (vocabulary, width) = head.targets.shape[0], head.weight.shape
    block_n, block_v, block_h = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_H"]
    weight = TensorDescriptor(head.weight, list(head.weight.shape), list(head.weight.stride()), [block_v, block_h])
    chunk = num_tokens
    if not head.hidden_descriptor:
        stride = round_up(width, 8)
        most = max(block_n, copy_bytes // (stride * hidden.itemsize) // block_n * block_n)
        chunk = min(num_tokens, round_up(tiles(num_tokens, tiles(num_tokens, most)), block_n))
        copy = hidden.new_empty(chunk, stride)
    for first in range(0, num_tokens, chunk):
        tokens = min(chunk, num_tokens - first)
        if head.hidden_descriptor:
            rows, stride = hidden, hidden.stride(0)
        else:
            rows = copy
            gather(hidden, head, rows[:tokens], first)
        forward.persistent_forward_kernel[
            (min(programs(hidden.device), tiles(tokens, block_n) * tiles(vocabulary, block_v)),)
        ](
            TensorDescriptor(rows, [tokens, width], [stride, 1], [block_n, block_h]),
            weight,
            head.bias,
            head.targets,
            *statistics[:3],
            head.temperature,
            statistics.moments,
            first,
            tokens,
            num_tokens,
            vocabulary,
            width,
            head.ignore_index,
            head.pre_scale,
            head.post_scale,
            HAS_BIAS=head.flags["HAS_BIAS"],
            HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
            POSITIVE=head.flags["POSITIVE"],
            PTX=head.flags["PTX"],
            STATISTIC=statistic,
            HAS_TEMPERATURE=head.temperature is not None,
            MOMENTS=statistics.moments is not None,
            **config,
        )


def make_route(
    block_peak: Tensor, block_sum: Tensor, lse: Tensor, head: Head, max_dropped_mass: float
) -> tuple[Tensor, Tensor]:
    """(route [cdiv(V, ROUTE_WORDS), N], and the last three metrics [3]), float32.

    route is the block's softmax mass where a (token, block) pair counts, positive or NaN. Where it is left out of the
    gradients, the mass has a minus sign or is 0; of ignored tokens it is 0.
    """
    num_tokens, vocabulary = head.targets.shape[0], head.weight.shape[0]
    blocks = tiles(vocabulary, ROUTE_WORDS)
    route = block_sum.new_empty(blocks, num_tokens)
    kept, dropped = block_sum.new_empty(num_tokens), block_sum.new_empty(num_tokens)
    config = head.config("route")
    if num_tokens:
        routing.route_kernel[(tiles(num_tokens, config["BLOCK_N"]),)](
            block_peak,
            block_sum,
            lse,
            head.targets,
            route,
            kept,
            dropped,
            num_tokens,
            vocabulary,
            block_peak.shape[0],
            blocks,
            head.ignore_index,
            max_dropped_mass,
            # A tile may be narrower than a block; its statistics never are wider.
            RATIO=ROUTE_WORDS // _statistic(_config(head), routed=True),
            ROUTE_WORDS=ROUTE_WORDS,
            **config,
        )
    scored = (head.targets != head.ignore_index).sum(dtype=torch.float64) * blocks
    sums = [kept.sum(dtype=torch.float64), scored, dropped.sum(dtype=torch.float64)]
    return route, torch.stack(sums).to(torch.float32)
