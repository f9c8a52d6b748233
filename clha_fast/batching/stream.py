"""Streams of ranked rows, tokenised as they come."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from clha_fast.batching.batch import CandidateFeature
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.signals import PER_CANDIDATE
from clha_fast.batching.workers import Example, as_record
from clha_fast.data.notes import Notes
from clha_fast.data.records import SKIPS, RankedRecord, RecordError

# More loader workers than anyone starts; each counts in a place of its own, so that no count is lost.
_WORKERS = 1024
_AHEAD = 64  # records that are looked at, for what they hold, before the first is given
_POLL = 0.01  # seconds between looks at whether other workers have done so


class RankedStream(IterableDataset[Any]):
    """Ranked rows one after another, from a source that is read anew for every pass.

    Rows are checked when they are read. They are tokenised when they are collated, so that of several processes each
    tokenises its own rows only; with `skip_bad_records` when they are read, by every process, since all must agree on
    which rows there are.

    With loader workers, a `datasets.IterableDataset` gives each worker its own shards, and any other source must share
    its rows out among workers itself, as torch demands of iterable datasets. Rows are counted where they are read:
    "record 17" is the 18th of its worker.

    Args:
        source: rows in a known format, records or tokenised records; may have `set_epoch`, as shuffled streams do.
        collator: the one of the data loader.
        repeat: begin again at the end, as often as is asked for, with the next epoch.
        fill_to: the end is filled up to a multiple of it with repetitions that the collator counts as `num_fill`.
        skip_bad_records: leave bad records out and count them.

    Attributes:
        skipped: bad records left out so far by this process and its workers, again in every pass.
        discarded: how many examples a pass begins with (of each worker) that are thrown away once they are collated,
            for a run that is resumed behind them. They are read, and checked as records, but not tokenised: the tokens
            of the first stand for all. `skip_bad_records` has to tokenise them.

    Raises:
        RecordError: a bad record; one with rewards, or a signal, that the first lacks, or the other way round; with
            `skip_bad_records`, unlike at least half of the first 64; no record at all. Of several loader workers the
            first, or the first 64, of each are looked at, and all go by the same.
    """

    def __init__(
        self,
        source: Iterable[Example],
        collator: RankedCollator,
        repeat: bool = False,
        fill_to: int = 1,
        skip_bad_records: bool = False,
    ) -> None:
        self.source = source
        self.collator = collator
        self.repeat = repeat
        self.fill_to = fill_to
        self.skip_bad_records = skip_bad_records
        self.discarded = 0
        self._skipped = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()
        self._epoch = 0
        self._notes = Notes()
        # What a batch's records have all or none of.
        self._names = [name for name in PER_CANDIDATE if name in collator.signals]
        if collator.options.markers is None:
            self._names.append("rewards")
        # Of each worker: 1 once it has looked ahead, records that it saw, and how many of them hold each of the names.
        self._seen = torch.zeros(_WORKERS, 2 + len(self._names), dtype=torch.int64).share_memory_()
        # 1 once it is settled which names records hold, and 1 for each that they do.
        self._settled = torch.zeros(1 + len(self._names), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's workers share what they count with one another, too."""
        self.__dict__.update(state)
        for counts in (self._skipped, self._seen, self._settled):
            counts.share_memory_()

    @property
    def skipped(self) -> int:
        return int(self._skipped.sum())

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass."""
        self._epoch = epoch
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        discarded = self.discarded  # by this iteration, not by another that begins while it goes on
        source: Any = self.source
        if worker is not None and self.repeat and isinstance(getattr(source, "_epoch", None), torch.Tensor):
            # `datasets` has one in memory for all workers, of which each is in a pass of its own.
            source._epoch = source._epoch.clone()
        count = passes = 0
        last: Any = None
        stand_in: Any = None
        while True:
            before = count
            for example in self._pass(*((0, 1) if worker is None else (worker.id, worker.num_workers))):
                count += 1
                last = example
                if count <= discarded and isinstance(example, RankedRecord):
                    stand_in = stand_in or self.collator.tokenize_record(example)
                    example = stand_in
                yield example
            if count == before:
                if worker is not None:  # other workers have the shards
                    return
                raise RecordError("records: expected at least one, got none")
            if not self.repeat:
                break
            passes += 1
            if hasattr(self.source, "set_epoch"):
                self.source.set_epoch(self._epoch + passes)
        if count % self.fill_to:
            feature = self.collator.tokenize_record(last) if isinstance(last, RankedRecord) else last
            for _ in range(self.fill_to - count % self.fill_to):
                yield {**feature, "fill": True}

    def _pass(self, worker: int, workers: int) -> Iterator[RankedRecord | CandidateFeature]:
        examples = self._examples(worker)
        # Where such records may be left out, the first is none to hold all others to.
        ahead: list[tuple[Any, frozenset[str], str]] = []
        try:
            ahead += itertools.islice(examples, _AHEAD if self.skip_bad_records else 1)
        finally:  # an error here must not leave the others waiting
            self._look(worker, [held for _, held, _ in ahead])
        expected = self._expected(workers)
        for example, held, source in itertools.chain(ahead, examples):
            if held == expected:
                yield example
                continue
            name = min(held ^ expected)
            first = ahead[0][2] if (name in ahead[0][1]) != (name in held) else "a record of another loader worker"
            has, lacks = (source, first) if name in held else (first, source)
            self._leave_out(RecordError.of(lacks, name, f"some, as {has} has", None), worker)

    def _look(self, worker: int, held: Sequence[frozenset[str]]) -> None:
        counts = Counter(name for names in held for name in names)
        self._seen[worker, 1:] = torch.tensor([len(held), *(counts[name] for name in self._names)])
        self._seen[worker, 0] = 1

    def _expected(self, workers: int) -> frozenset[str]:
        """What records hold, as at least half of those do that all workers have looked at; settled by the first pass.

        Raises:
            RuntimeError: the process whose workers these are has ended.
        """
        parent = os.getppid()
        while not (self._settled[0] or self._seen[:workers, 0].all()):
            if os.getppid() != parent:
                raise RuntimeError("the data loader's process has ended")
            time.sleep(_POLL)
        if not self._settled[0]:
            records, *held = self._seen[:workers, 1:].sum(0).tolist()
            self._settled[1:] = torch.tensor([records > 0 and 2 * count >= records for count in held])
            self._settled[0] = 1
        return frozenset(name for name, some in zip(self._names, self._settled[1:].tolist(), strict=True) if some)

    def _leave_out(self, error: RecordError, worker: int) -> None:
        if not self.skip_bad_records:
            raise error.advised(SKIPS) from None
        self._skipped[worker % _WORKERS] += 1

    def _examples(self, worker: int) -> Iterator[tuple[RankedRecord | CandidateFeature, frozenset[str], str]]:
        """Each good record, what it holds of rewards and signals, and where it is from."""
        for number, row in enumerate(self.source):
            try:
                found = self._read(row, f"record {number}")
            except RecordError as error:
                self._leave_out(error, worker)
            else:
                yield found

    def _read(self, row: Any, place: str) -> tuple[RankedRecord | CandidateFeature, frozenset[str], str]:
        if not isinstance(row, (RankedRecord, Mapping)):
            raise RecordError.of(place, "", "a mapping", row)
        if isinstance(row, Mapping) and "completion_ids" in row:
            held = frozenset(name for name in self._names if row.get(name) is not None)
            return row, held, row.get("source", place)  # type: ignore[return-value]
        said = set(self._notes.unread)
        record = as_record(row, place, self._notes)
        self._notes.say_new_columns(said)
        held = frozenset(
            name for name in self._names if name in record.signals or (name == "rewards" and record.rewards)
        )
        if self.skip_bad_records:
            return self.collator.tokenize_record(record), held, record.source
        return record, held, record.source
