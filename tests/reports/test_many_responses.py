"""Prompts with very many responses: what is counted of their pairs is counted some pairs at a time, and exactly."""

from __future__ import annotations

import functools
import itertools
import random
import tracemalloc
from typing import Any

import pytest
import torch

from clha_fast.batching.batch import inert_mask
from clha_fast.batching.totals import dataset_counts
from clha_fast.data import RankedRecord
from clha_fast.data.records import agreeing
from clha_fast.evaluation.likelihood import _pair_counts
from clha_fast.objectives import CLHAOptions, Objective, RRHFOptions
from clha_fast.objectives.pairs import Pairs, pair_blocks, quantiles
from clha_fast.reports.data_summary import summarise
from clha_fast.reports.inspection import inspect_file
from clha_fast.training.reward_data import PairedDataset
from tests.support.tiny import make_tokenizer

AT_A_TIME = 1 << 18


def made(size: int, count: int) -> list[RankedRecord]:
    draw = random.Random(size)
    answers = tuple(str(k) for k in range(size))
    return [
        RankedRecord(f"prompt {number}", answers, tuple(round(draw.uniform(-9, 9), 1) for _ in answers))
        for number in range(count)
    ]


@pytest.mark.parametrize(("size", "count"), [(40, 360), (300, 7), (800, 2)])
@pytest.mark.parametrize("what", ["summarise", "inspect", "inert", "counts", "likelihood"])
def test_few_pairs_exist_at_a_time(what: str, size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objective: Objective = CLHAOptions() if what != "inert" else RRHFOptions()
    records = made(size, count)
    seen: list[int] = []
    whole = Pairs.of

    def counted(*args: Any) -> Pairs:
        found = whole(*args)
        seen.append(len(found.i))
        return found

    monkeypatch.setattr(Pairs, "of", counted)
    if what == "summarise":
        assert summarise(records, objective).pairs == count * size * (size - 1) // 2
    elif what == "inspect":
        rows = [record.as_dict() for record in records]
        assert inspect_file(rows, objective, progress=False).summary.pairs == count * size * (size - 1) // 2
    elif what == "inert":
        rewards = torch.tensor([reward for record in records for reward in record.rewards or ()])
        assert len(inert_mask(rewards, torch.tensor([size] * count), None, objective)) == size * count
    elif what == "counts":
        tokens = {"prompt_ids": [1], "completion_ids": [[2]] * size, "sft_index": 0}
        dataset = [{**tokens, "rewards": record.rewards} for record in records]
        assert dataset_counts(dataset, objective, drop_inert=True)[size - 1] == count, "prompts"
    else:
        scores = [list(record.rewards or ()) for record in records]
        found = _pair_counts(records, scores, "abs", 3.0)
        assert found["correct"] == found["ordered"], "the scores are the rewards"
        assert found["pairs"] == [size * (size - 1) / 2] * count
    assert seen
    assert max(seen) <= max(AT_A_TIME, size * (size - 1) // 2)


def test_blocks_are_all_prompts_in_order() -> None:
    sizes = [2] * 3000 + [500, 1, 2, 900, 900, 3] + [60] * 300
    blocks = list(pair_blocks(sizes, int))
    assert list(itertools.chain.from_iterable(blocks)) == sizes
    assert [900] in blocks, "more than a block alone"
    assert len(blocks) < 12
    assert list(pair_blocks([], int)) == []


@pytest.mark.parametrize("count", [1, 2, 9, 700])
@pytest.mark.parametrize("kind", ["drawn", "ties", "equal", "tiny", "huge"])
def test_quantiles_without_sorting(kind: str, count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=draw)
    values = {
        "drawn": values * 4,
        "ties": (values * 3).round() / 7,
        "equal": torch.full((count,), -0.1),
        "tiny": values * 1e-40,
        "huge": values * 1e38 * 2,  # some of them inf
    }[kind]
    shares = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
    ordered = values.abs().sort().values
    expected = [float(ordered[max(-(-round(share * 100) * count // 100) - 1, 0)]) for share in shares]
    for size in (count, 300):
        blocks = functools.partial(values.split, size)
        assert list(quantiles(blocks, shares)) == expected
    assert quantiles(lambda: [values[:0]], shares) == ()


class Compared(float):
    times = 0

    def __lt__(self, other: float) -> bool:
        Compared.times += 1
        return float(self) < float(other)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_agreement_against_all_pairs(size: int, distinct: int) -> None:
    draw = random.Random(size)
    given, scores = ([float(draw.randrange(distinct)) for _ in range(size)] for _ in range(2))
    ordered = [(i, j) for i, j in itertools.permutations(range(size), 2) if given[i] > given[j]]
    right = sum((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in ordered)
    assert agreeing(given, scores) == (right, len(ordered))


def test_agreement_compares_few() -> None:
    draw = random.Random(0)
    given, scores = ([Compared(draw.random()) for _ in range(1000)] for _ in range(2))
    Compared.times = 0
    assert agreeing(given, scores)[1] == 499_500
    assert Compared.times < 60_000


def test_pairs_of_a_reward_model_are_small() -> None:
    records, tokenizer = made(96, 4), make_tokenizer()
    PairedDataset(records[:1], tokenizer)
    tracemalloc.start()
    try:
        dataset = PairedDataset(records, tokenizer)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert dataset.pairs > 15_000
    assert held < 24 * dataset.pairs, "bytes"
    assert dataset[0].better[:3] == [0, 0, 0]
    assert isinstance(dataset[0].worse, list)
