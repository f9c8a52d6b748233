"""What the processes' shares of an epoch hold beside its prompts: accelerate fills the last batches up to full ones."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from clha_fast.batching.sampling import TokenBudgetSampler


def prompts_drawn(loader: Any) -> int | None:
    """How many prompts an epoch of a prepared loader draws, for all processes; None where no batch is filled up.

    By the sampler that is cut into shares, however deep it is: a loader that skips batches knows no total. None also of
    batches that neither torch's own `BatchSampler` nor a `TokenBudgetSampler` has made, and of a sampler without a
    length: what fills them up is not known.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, BatchSamplerShard):
        sampler = getattr(sampler, "batch_sampler", None)
    if sampler is None or sampler.drop_last:
        return None
    batches = sampler.batch_sampler
    if isinstance(batches, TokenBudgetSampler):
        return len(batches.shapes) if batches.fill else None  # batches of one prompt then
    if not sampler.even_batches:
        return None
    known = type(batches) is BatchSampler and isinstance(batches.sampler, Sized)
    return len(batches.sampler) if known else None


def own_prompts(drawn: int, size: int, share: int, shares: int) -> int:
    """How many of the `size` prompts in an epoch's last batch are not fill, in the share with this number.

    Args:
        drawn: as `prompts_drawn`. shares: how many there are, each with a batch of `size`.
    """
    left = drawn % (size * shares) or size * shares
    return min(max(left - share * size, 0), size)


def empty_shares(drawn: int, size: int, shares: int) -> int:
    """How many of the shares have nothing but fill in the epoch's last batch; arguments as `own_prompts`."""
    return sum(own_prompts(drawn, size, share, shares) == 0 for share in range(shares))
