"""Records of one set hold rewards, and each signal, or lack them: what differs from most is a bad record."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.signals import PER_CANDIDATE
from clha_fast.batching.stream import RankedStream
from clha_fast.data import RecordError
from clha_fast.objectives import CoHOptions
from tests.support.tiny import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
COLLATOR = RankedCollator(TOKENIZER)


class Rows(IterableDataset[Any]):
    """A torch stream."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("name", ["rewards", "reference_logps", "advantages"])
def test_a_record_that_lacks_what_others_have_is_a_bad_one(name: str, place: int) -> None:
    rows = [{**row, name: [0.5] * len(row["completions"])} for row in make_rows(6)]
    rows[place][name] = None
    collator = RankedCollator(TOKENIZER, signals=PER_CANDIDATE, max_completion_length=2)
    whole = [f"record {number}" for number in range(6) if number != place]
    for given in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(RecordError, match=rf"^record {place}: {name}: expected some, as 5 of 6 records have them"):
            RankedDataset(given, collator)
        skipped: list[RecordError] = []
        found = RankedDataset(given, collator, skipped=skipped)
        assert [error.source for error in skipped] == [f"record {place}"]
        assert [row["source"] for row in found] == whole
        kept = [row for number, row in enumerate(rows) if number != place]
        assert found.cut_completions == RankedDataset(kept, collator).cut_completions
    stream = RankedStream(Rows(rows), collator, skip_bad_records=True)
    assert [row["source"] for row in stream] == whole
    assert stream.skipped == 1
    with pytest.raises(RecordError, match=rf"^record {place}: {name}: expected some, as record .* skip_bad_records"):
        list(RankedStream(Rows(rows), collator))


@pytest.mark.parametrize("places", [(4,), (1, 3), (0,)])
@pytest.mark.parametrize("name", ["rewards", "reference_logps"])
def test_a_record_that_has_what_most_others_lack_is_a_bad_one(name: str, places: tuple[int, ...]) -> None:
    rows = [{**row, name: None} for row in make_rows(6, rewards=False)]
    for place in places:
        rows[place][name] = [0.5] * len(rows[place]["completions"])
    collator = RankedCollator(TOKENIZER, signals=PER_CANDIDATE)
    whole = [f"record {number}" for number in range(6) if number not in places]
    message = rf"^record {places[0]}: {name}: expected none, as {len(whole)} of 6 records .*score.*, got \[0.5, "
    for given in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(RecordError, match=message):
            RankedDataset(given, collator)
        skipped: list[RecordError] = []
        assert [row["source"] for row in RankedDataset(given, collator, skipped=skipped)] == whole
        assert [error.source for error in skipped] == [f"record {place}" for place in places]
    stream = RankedStream(Rows(rows), collator, skip_bad_records=True)
    assert [row["source"] for row in stream] == whole
    assert stream.skipped == len(places)


def test_chains_have_no_rewards_to_lack() -> None:
    rows = [*make_rows(2), *make_rows(2, rewards=False)]
    collator = RankedCollator(TOKENIZER, CoHOptions())
    assert len(RankedDataset(rows, collator)) == len(list(RankedStream(Rows(rows), collator))) == 4


class Shared(Rows):
    """Each loader worker reads a part of the rows, one after another."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        return iter(self.rows if info is None else self.rows[info.id :: info.num_workers])


@pytest.mark.parametrize(
    ("name", "count", "lacking", "workers"),
    [("rewards", 8, (1, 3, 5, 7), 2), ("reference_logps", 6, (0, 2, 4), 2), ("rewards", 2, (1,), 3)],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_workers_go_by_the_same(name: str, count: int, lacking: tuple[int, ...], workers: int) -> None:
    """One has no record that is like those of the others; a third has no record."""
    rows = [{**row, name: [0.5] * len(row["completions"])} for row in make_rows(count)]
    for place in lacking:
        rows[place][name] = None
    collator = RankedCollator(TOKENIZER, signals=PER_CANDIDATE)
    stream = RankedStream(Shared(rows), collator, skip_bad_records=True)
    for _ in range(2):  # what is settled stays
        loader = DataLoader(stream, 1, collate_fn=list, num_workers=workers)
        found = [feature for batch in loader for feature in batch]
        assert len(found) == count - len(lacking)
        assert all(feature[name] is not None for feature in found)
    assert stream.skipped == 2 * len(lacking)
    with pytest.raises(RecordError, match=rf"{name}: expected some, as .* has, got None.*skip_bad_records"):
        list(DataLoader(RankedStream(Shared(rows), collator), 1, collate_fn=list, num_workers=workers))


def test_an_error_of_a_loader_worker_leaves_no_other_waiting() -> None:
    rows = [{"prompt": "p", "completions": []}, *make_rows(3)]
    with pytest.raises(RecordError, match=r"(?s)^Caught .*record 0: completions: expected"):
        list(DataLoader(RankedStream(Shared(rows), COLLATOR), 1, collate_fn=list, num_workers=2))


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_workers_of_a_copy_hear_of_each_other(copied: Any, skipping: bool) -> None:
    stream = copied(RankedStream(Shared(make_rows(4)), COLLATOR, skip_bad_records=skipping))
    loader = DataLoader(stream, 1, collate_fn=list, num_workers=2, timeout=20)
    assert len(list(loader)) == 4
