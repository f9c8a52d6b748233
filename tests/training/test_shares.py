"""How many prompts of an epoch's last batches are its own, by the sampler that processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from clha_fast.batching.sampling import TokenBudgetSampler
from clha_fast.training.shares import empty_shares, own_prompts, prompts_drawn
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import config

PROMPTS = range(7)
TOKENIZER = make_tokenizer()


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


@pytest.mark.parametrize(("prompts", "shares"), [(1, 2), (3, 2), (2, 3), (7, 4), (5, 3)])
def test_a_budget_with_more_batches_than_prompts(prompts: int, shares: int) -> None:
    sampler = TokenBudgetSampler([(1, 10)] * prompts, 1, num_processes=shares)
    loaders = [
        DataLoader(PROMPTS, batch_sampler=BatchSamplerShard(sampler, shares, share, even_batches=False))  # type: ignore[arg-type]
        for share in range(shares)
    ]
    seen: list[int] = []
    for share, loader in enumerate(loaders):
        drawn = prompts_drawn(loader)
        assert drawn == prompts
        *whole, last = [prompt for batch in loader.batch_sampler for prompt in batch]  # type: ignore[union-attr]
        seen += [*whole, *[last] * own_prompts(drawn, 1, share, shares)]
    assert sorted(seen) == list(range(prompts))
    assert empty_shares(prompts, 1, shares) == -prompts % shares
    assert prompts_drawn(shared(TokenBudgetSampler([(1, 10)] * 8, 1, num_processes=4))) is None, "none is filled up"


@pytest.mark.parametrize(
    "batches", [Buckets(), BatchSampler(Unmeasured(), 2, False), Repeating(SequentialSampler(PROMPTS), 2, False)]
)
def test_of_other_samplers_nothing_is_known(batches: Any) -> None:
    loader = shared(batches)
    assert sum(map(len, loader.batch_sampler)) == 4  # type: ignore[arg-type]
    assert prompts_drawn(loader) is None


def test_one_process_has_no_share() -> None:
    assert prompts_drawn(DataLoader(PROMPTS, batch_size=2)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("normalizer", ["global", "batch"])
def test_a_loss_behind_training_is_of_its_own_batch(tmp_path: Path, normalizer: str) -> None:
    class Filled(CLHATrainer):
        def _empty_of_last(self, size: int, sharing: int = 1) -> int:
            return 1  # as in the last round of several processes

        @property
        def _data_processes(self) -> int:
            return 2

    ours = Filled(
        make_model(len(TOKENIZER)),
        config(tmp_path, normalizer=normalizer, learning_rate=0.0),
        train_dataset=make_rows(6),
        processing_class=TOKENIZER,
    )
    inputs = ours.data_collator(make_rows(3, seed=4))
    expected = float(ours.compute_loss(ours.model.train(), inputs))
    ours.train()
    assert float(ours.compute_loss(ours.model.train(), inputs)) == expected
