"""Records of one set hold rewards, and each signal, or lack them: what differs from most is a bad record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from torch.utils.data import IterableDataset

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.signals import PER_CANDIDATE
from clha_fast.batching.stream import RankedStream
from clha_fast.data import RecordError
from clha_fast.objectives import CoHOptions
from tests.support.tiny import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


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
