"""Batches under a token budget: every prompt once, the same number everywhere, little padding, the same order again."""

from __future__ import annotations

import random

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, RandomSampler

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.sampling import (
    LengthSampler,
    Shape,
    TokenBudgetSampler,
    padded_tokens,
    prompt_shapes,
    row_lengths,
)
from clha_fast.objectives.clha import CLHAOptions
from tests.support.tiny import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


def shapes(count: int, seed: int = 0) -> list[Shape]:
    rng = random.Random(seed)
    return [(rng.randint(1, 6), int(rng.lognormvariate(4, 0.8)) + 1) for _ in range(count)]


def padding(given: list[Shape], batches: list[list[int]]) -> float:
    used = sum(rows * width for rows, width in given)
    return 1 - used / sum(padded_tokens(given, batch) for batch in batches)


def test_a_packing_by_hand() -> None:
    given = [(1, 10), (2, 4), (1, 9), (3, 5), (2, 5), (0, 7)]
    sampler = TokenBudgetSampler(given, 25)
    for epoch in range(20):
        # Longest first: 10 and 9 make 20; 3 + 2 rows of 5 make 25; the two of 4 are left. The prompt without a row
        # costs nothing.
        assert sorted(sorted(batch) for batch in sampler.batches(epoch)) == [[0, 2, 5], [1], [3, 4]]
    assert padded_tokens(given, [0, 2, 5]) == 20
    assert padded_tokens(given, [3, 4]) == 25
    assert padded_tokens(given, [5]) == 0
    costs = [padded_tokens(given, batch) for batch in sampler.batches(0)]
    assert costs[0] == max(costs)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "budget"), [(1, 3000), (5, 3000), (64, 3000), (700, 3000), (7, 1), (64, 1)])
def test_every_prompt_once_within_the_budget(count: int, budget: int, processes: int) -> None:
    """Where the batches come to more than the prompts, what comes again closes the last round, one batch a process."""
    given = shapes(count)
    sampler = TokenBudgetSampler(given, budget, seed=7, num_processes=processes)
    assert 0 <= sampler.fill < processes
    for epoch in range(6):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler)
        assert len(batches) % processes == 0
        own = batches[: len(batches) - sampler.fill]
        assert sorted(index for batch in own for index in batch) == list(range(count))
        assert max(padded_tokens(given, batch) for batch in own) == padded_tokens(given, own[0])
        for batch in batches:
            assert batch
            assert padded_tokens(given, batch) <= budget or len(batch) == 1
        assert not sampler.fill or all(len(batch) == 1 for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    given = shapes(200)
    one, same = TokenBudgetSampler(given, 2000, seed=1), TokenBudgetSampler(given, 2000, seed=1)
    random.seed(5)
    torch.manual_seed(5)
    assert [one.batches(epoch) for epoch in (0, 1, 2)] == [same.batches(epoch) for epoch in (0, 1, 2)]
    assert one.batches(0) != one.batches(1)
    assert one.batches(0) != TokenBudgetSampler(given, 2000, seed=2).batches(0)
    one.set_epoch(2)
    assert list(one) == same.batches(2)
    # Not only the order of the batches changes: prompts meet others.
    meetings = [{frozenset(batch) for batch in one.batches(epoch)} for epoch in (0, 1)]
    assert len(meetings[0] & meetings[1]) < len(one) / 2


def test_less_padding_than_random_batches() -> None:
    given = shapes(2000)
    sampler = TokenBudgetSampler(given, 4000)
    order = list(range(2000))
    random.Random(0).shuffle(order)
    size = 2000 // len(sampler)
    by_chance = [order[start : start + size] for start in range(0, 2000, size)]
    for epoch in range(3):
        assert padding(given, sampler.batches(epoch)) < 0.1
    assert padding(given, by_chance) > 0.4


def test_an_epoch_that_needs_more_batches_keeps_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    given = shapes(300)
    sampler = TokenBudgetSampler(given, 1500, seed=3)
    needs = {epoch: len(sampler._pack(epoch)) for epoch in range(200)}
    more = [epoch for epoch, number in needs.items() if number > len(sampler)]
    assert more, "no epoch of these needs more than the first ones did"
    batches = sampler.batches(more[0])
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(300))


def test_a_prompt_above_the_budget_is_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    given = [(4, 100), (1, 10), (1, 10), (1, 99)]
    with caplog.at_level("WARNING"):
        batches = TokenBudgetSampler(given, 100).batches(0)
    assert [0] in batches
    assert "1 of 4 prompts are larger than 100 tokens (up to 400); each forms a batch of its own" in caplog.text


def test_fewer_prompts_than_processes_come_twice() -> None:
    batches = TokenBudgetSampler([(1, 5), (1, 6), (2, 7)], 1000, num_processes=4).batches(0)
    assert len(batches) == 4
    assert {index for batch in batches for index in batch} == {0, 1, 2}


@pytest.mark.parametrize("processes", [2, 3])
def test_accelerate_gives_every_process_as_many(processes: int) -> None:
    given = shapes(101)
    sampler = TokenBudgetSampler(given, 1500, num_processes=processes)
    parts = [list(BatchSamplerShard(sampler, processes, rank, even_batches=False)) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(101))
    costs = [[padded_tokens(given, batch) for batch in part] for part in parts]
    waited_for = processes * sum(max(step) for step in zip(*costs, strict=True))
    assert waited_for <= 1.1 * sum(map(sum, costs))


def test_shapes_are_those_of_the_batch() -> None:
    options = CLHAOptions()
    collator = RankedCollator(TOKENIZER, options, pad_to_multiple_of=8)
    dataset = RankedDataset(make_rows(40), collator)
    found = prompt_shapes(dataset, options, multiple=8)
    whole = prompt_shapes(dataset, options, drop_inert=False)
    dropped = 0
    for index, (rows, width) in enumerate(found):
        batch = collator([dataset[index]])
        dropped += batch["num_inert"]
        if bool((batch["candidate_lengths"] > 0).any()):
            assert tuple(batch["input_ids"].shape) == (rows, width)
        else:
            assert rows == 0
        assert whole[index] == (len(dataset[index]["completion_ids"]), dataset.lengths[index])
    assert dropped > 0
    batches = TokenBudgetSampler(found, 600).batches(0)
    for batch in batches:
        padded = collator([dataset[index] for index in batch])["input_ids"].numel()
        assert padded == max(padded_tokens(found, batch), 8)
    assert row_lengths(dataset) == dataset.lengths
    assert prompt_shapes(RankedDataset(make_rows(3, rewards=False), collator), options)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="max_tokens: expected a positive number, got 0"):
        TokenBudgetSampler([(1, 1)], 0)
    with pytest.raises(ValueError, match="shapes: expected at least one prompt, got none"):
        TokenBudgetSampler([], 10)
    rows: list[object] = [*make_rows(1)]
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: expected a tokenised record with prompt_ids"):
        prompt_shapes(rows, CLHAOptions())  # type: ignore[arg-type]


def test_like_lengths_in_an_order_of_seed_and_epoch() -> None:
    lengths = [width for _, width in shapes(300)]
    one, same = LengthSampler(lengths, 8, seed=1), LengthSampler(lengths, 8, seed=1)
    first = list(one)
    assert sorted(first) == list(range(300))
    same.set_epoch(1)
    later = list(same)
    assert later != first
    one.set_epoch(1)
    assert list(one) == later
    grouped = [lengths[index] for index in first]
    spread = sum(max(grouped[k : k + 8]) - min(grouped[k : k + 8]) for k in range(0, 300, 8))
    chance = [lengths[index] for index in BatchSampler(RandomSampler(lengths), 300, False).__iter__().__next__()]
    assert spread < 0.5 * sum(max(chance[k : k + 8]) - min(chance[k : k + 8]) for k in range(0, 300, 8))
