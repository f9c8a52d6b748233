"""Streams of ranked rows, tokenised as they come; and what a trainer makes of the datasets that it is given."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.utils import logging

from clha_fast.batching.batch import CandidateFeature
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.workers import Example, as_record
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.options import CLHAOptions
from clha_fast.training.config import CLHAConfig

logger = logging.get_logger(__name__)

# More loader workers than anyone starts; each counts in a place of its own, so that no count is lost.
_WORKERS = 1024


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

    Raises:
        RecordError: a bad record; a record with rewards after one without, or the other way round; no record at all.
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
        self._skipped = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()
        self._epoch = 0

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
        count = passes = 0
        last: Any = None
        while True:
            before = count
            for example in self._pass(0 if worker is None else worker.id):
                count += 1
                last = example
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

    def _pass(self, worker: int) -> Iterator[RankedRecord | CandidateFeature]:
        first: tuple[bool, str] | None = None
        for number, row in enumerate(self.source):
            try:
                example, rewarded, source = self._read(row, f"record {number}")
                if first is None:
                    first = rewarded, source
                elif first[0] != rewarded:
                    expected = f"{'rewards' if first[0] else 'none'}, as of {first[1]}"
                    raise RecordError.of(source, "rewards", expected, "some" if rewarded else None)
            except RecordError:
                if not self.skip_bad_records:
                    raise
                self._skipped[worker % _WORKERS] += 1
            else:
                yield example

    def _read(self, row: Any, place: str) -> tuple[RankedRecord | CandidateFeature, bool, str]:
        if not isinstance(row, (RankedRecord, Mapping)):
            raise RecordError.of(place, "", "a mapping", row)
        if isinstance(row, Mapping) and "completion_ids" in row:
            return row, row.get("rewards") is not None, row.get("source", place)  # type: ignore[return-value]
        record = as_record(row, place)
        rewarded = record.rewards is not None
        if self.skip_bad_records:
            return self.collator.tokenize_record(record), rewarded, record.source
        return record, rewarded, record.source


def as_dataset(dataset: Any, collator: Any, args: CLHAConfig, *, training: bool) -> Any:
    """Rows become a `RankedDataset`, streams a `RankedStream`; what is tokenised, or has its own collator, stays.

    A training stream is repeated without end, so `max_steps` alone ends training, and every process has as many
    batches as the others. An evaluation stream's end is filled up to full batches for all processes.

    Raises:
        ValueError: a path; something that can be read only once; a stream with `max_tokens_per_batch`.
        RecordError: as `RankedDataset`.
    """
    if (
        dataset is None
        or isinstance(dataset, (RankedDataset, RankedStream))
        or not isinstance(collator, RankedCollator)
    ):
        return dataset
    name = "train_dataset" if training else "eval_dataset"
    if isinstance(dataset, (str, os.PathLike)):
        raise ValueError(
            f"{name}: expected rows, such as clha_fast.data.read_records gives for a file, got the path "
            f"{os.fspath(dataset)!r}"
        )
    if not isinstance(dataset, IterableDataset):
        tokenised = "completion_ids" in (getattr(dataset, "column_names", None) or ())
        if isinstance(dataset, torch.utils.data.Dataset) or tokenised:
            return dataset
        if hasattr(dataset, "__len__"):
            found = _tokenised(dataset, collator, args, name)
            if training:
                _warn_if_nothing_is_ranked(found, collator.options)
            return found
        if not hasattr(dataset, "__iter__"):
            return dataset
    if isinstance(dataset, Iterator):
        got = type(dataset).__name__
        raise ValueError(f"{name}: expected rows that can be read again for every pass, got a {got}, which ends")
    if training and args.max_tokens_per_batch is not None:
        raise ValueError(
            f"max_tokens_per_batch: expected None for a stream, whose lengths are not known, got "
            f"{args.max_tokens_per_batch}"
        )
    return RankedStream(
        dataset,
        collator,
        repeat=training,
        fill_to=1 if training or args.world_size == 1 else args.world_size * args.eval_batch_size,
        skip_bad_records=args.skip_bad_records,
    )


def _keeps_a_pair(feature: CandidateFeature, options: CLHAOptions) -> bool:
    rewards = feature.get("rewards")
    if rewards is None or options.noise_rule == "none":
        return len(feature["completion_ids"]) > 1
    if options.noise_rule == "abs":
        return max(rewards) - min(rewards) > options.reward_margin
    best = itertools.accumulate(rewards, max)
    return any(before - reward > options.reward_margin for before, reward in zip(best, rewards, strict=True))


def _warn_if_nothing_is_ranked(dataset: RankedDataset, options: CLHAOptions) -> None:
    """A reward margin that does not fit the rewards' scale drops every pair; training runs, and ranks nothing."""
    if options.rank_weight == 0 or any(_keeps_a_pair(dataset[k], options) for k in range(len(dataset))):
        return
    logger.warning(
        f"train_dataset: no pair of responses is ranked, the SFT term alone trains; reward_margin="
        f"{options.reward_margin:g} with noise_rule={options.noise_rule!r} drops all pairs as noise. Set a margin that "
        "fits the rewards, or noise_rule='none'"
        if any(len(dataset[k]["completion_ids"]) > 1 for k in range(len(dataset)))
        else "train_dataset: no pair of responses is ranked, the SFT term alone trains; every prompt has one response"
    )


def _tokenised(dataset: Any, collator: RankedCollator, args: CLHAConfig, name: str) -> RankedDataset:
    skipped: list[RecordError] | None = [] if args.skip_bad_records else None
    found = RankedDataset(dataset, collator, num_proc=args.dataset_num_proc, skipped=skipped)
    if skipped:
        logger.warning(f"{len(skipped)} bad records left out, the first: {skipped[0]}")
    if found.cut_prompts or found.cut_completions:
        limits = ("max_length", "max_prompt_length", "max_completion_length")
        given = ", ".join(f"{limit}={getattr(collator, limit)}" for limit in limits if getattr(collator, limit))
        logger.warning(
            f"{name}: {found.cut_prompts:,} of {len(found):,} prompts and {found.cut_completions:,} of "
            f"{sum(len(found[k]['completion_ids']) for k in range(len(found))):,} responses were cut to {given}"
        )
    return found
