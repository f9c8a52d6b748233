"""How many prompts of an epoch's last batches are its own, by the sampler that processes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from clha_fast.training.shares import own_prompts, prompts_drawn

PROMPTS = range(7)


class Unmeasured(Sampler[int]):
    """Has no length, as torch's samplers need none."""

    def __iter__(self) -> Iterator[int]:
        return iter(PROMPTS)


class Buckets(Sampler[list[int]]):
    """Batches of somebody's own, with no sampler below."""

    batch_size, drop_last = 2, False

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3], [4, 5], [6]])

    def __len__(self) -> int:
        return 4


class Repeating(BatchSampler):
    """Fills its last batch up by itself."""

    def __iter__(self) -> Iterator[list[int]]:
        return (batch + batch[:1] * (self.batch_size - len(batch)) for batch in super().__iter__())


def shared(batches: Any, **settings: Any) -> DataLoader[int]:
    return DataLoader(PROMPTS, batch_sampler=BatchSamplerShard(batches, 2, 0, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [SequentialSampler(PROMPTS), RandomSampler(PROMPTS)])
def test_the_sampler_says_what_is_drawn(sampler: Any) -> None:
    loader = shared(BatchSampler(sampler, 2, False))
    assert prompts_drawn(loader) == prompts_drawn(skip_first_batches(loader, 1)) == 7
    assert [own_prompts(7, 2, share, 2) for share in (0, 1)] == [2, 1]
    assert prompts_drawn(shared(BatchSampler(sampler, 2, True))) is None
    assert prompts_drawn(shared(BatchSampler(sampler, 2, False), even_batches=False)) is None


@pytest.mark.parametrize(
    "batches", [Buckets(), BatchSampler(Unmeasured(), 2, False), Repeating(SequentialSampler(PROMPTS), 2, False)]
)
def test_of_other_samplers_nothing_is_known(batches: Any) -> None:
    loader = shared(batches)
    assert sum(map(len, loader.batch_sampler)) == 4  # type: ignore[arg-type]
    assert prompts_drawn(loader) is None


def test_one_process_has_no_share() -> None:
    assert prompts_drawn(DataLoader(PROMPTS, batch_size=2)) is None  # type: ignore[arg-type]
