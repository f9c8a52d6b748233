"""What paths that sweep over chunks of whole prompts share: where the chunks end, and sums into repeated rows."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from clha_fast.types import RankingInputs


class Chunk(NamedTuple):
    """Prompts [first_prompt, last_prompt), their candidates and their tokens."""

    first_prompt: int
    last_prompt: int
    first_candidate: int
    last_candidate: int
    start: int
    stop: int


def prompt_chunks(ranking: RankingInputs, num_tokens: int, capacity: int) -> list[Chunk]:
    """Chunks of whole prompts of at most `capacity` tokens; a larger prompt stands alone.

    As few and as even as whole prompts allow: every chunk costs a pass over the weight's gradient, a short one too.
    Only sizes that lie on the CPU are read. Sizes on a GPU would cost a synchronisation: the batch is one chunk then.
    """
    lengths, sizes = ranking.candidate_lengths, ranking.candidates_per_prompt
    if lengths.device.type != "cpu" or sizes.device.type != "cpu":
        return [Chunk(0, sizes.shape[0], 0, lengths.shape[0], 0, num_tokens)]
    candidates = [0, *itertools.accumulate(sizes.tolist())]
    offsets = [0, *itertools.accumulate(lengths.tolist())]
    edges = [offsets[c] for c in candidates]
    largest = max((b - a for a, b in itertools.pairwise(edges)), default=0)
    # Chunks that end within a prompt of this share are no more than there must be.
    limit = min(capacity, largest + even_share(edges[-1], capacity))
    cuts = [0]
    for last in range(1, len(edges)):
        if edges[last] - edges[cuts[-1]] > limit and last - 1 > cuts[-1]:
            cuts.append(last - 1)
    cuts.append(len(edges) - 1)
    return [
        Chunk(first, last, candidates[first], candidates[last], edges[first], edges[last])
        for first, last in itertools.pairwise(cuts)
    ]


def even_share(total: int, capacity: int) -> int:
    """The size of equal parts of `total`, none larger than `capacity` and as few as possible."""
    parts = -(-total // capacity)
    return -(-total // parts) if parts else 0


def accumulate(target: Tensor, index: Tensor, source: Tensor) -> None:
    """target[index] += source, repeats summed, the same bits every time."""
    if target.is_cuda:
        target.index_put_((index,), source, accumulate=True)  # sorts; index_add_ there uses float atomics
    else:
        target.index_add_(0, index, source)
