"""What a trainer makes of the datasets that it is given."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.utils import logging

from clha_fast.batching.collator import LIMITS, RankedCollator, RankedDataset
from clha_fast.batching.stream import RankedStream
from clha_fast.batching.totals import feature_chunks, is_tokenised, ranking_inputs
from clha_fast.data.records import SKIPS, RecordError
from clha_fast.layout import Layout
from clha_fast.objectives import CLHAOptions, Objective
from clha_fast.objectives.pairs import Pairs
from clha_fast.training.config import CLHAConfig
from clha_fast.training.validation import sampling_strategy
from clha_fast.types import SIGNALS

# Of the class itself: a subclass's own are asked for.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CLHAConfig)}
_LOOK = 2048  # prompts whose order is held to their rewards
# A reward model that agrees with a ranking reverses fewer of its pairs once noise is dropped.
_CONTRADICTION = 0.2
logger = logging.get_logger(__name__)


def check_reach(args: CLHAConfig, collator: Any) -> None:
    """Whether settings that are not the default's reach a collator of the caller's own.

    Raises:
        ValueError: one that does not.
    """
    if collator is None:
        return
    for name in (*LIMITS, "pad_to_multiple_of", "drop_inert", "eval_drop_inert"):
        value = getattr(args, name)
        if value == _DEFAULTS[name]:
            continue
        if not isinstance(collator, RankedCollator):
            raise ValueError(
                f"{name}: expected {_DEFAULTS[name]!r} beside a data_collator that is no RankedCollator, which decides "
                f"it, got {value!r}"
            )
        own = getattr(collator, name.removeprefix("eval_"))
        if value != own:
            raise ValueError(f"{name}: expected {own!r}, as the data_collator has it, got {value!r}")


def _check_limits(collator: RankedCollator, dataset: Any, name: str) -> None:
    """ValueError where what is tokenised already may be longer than a collator allows.

    A limit as strict holds; else a `RankedDataset`'s lengths tell, of another one's those of the first `_LOOK` prompts,
    of a stream nothing.
    """
    own: dict[str, Any] = {}
    if isinstance(dataset, RankedStream):
        own = {limit: getattr(dataset.collator, limit) for limit in LIMITS}
    elif isinstance(dataset, RankedDataset):
        own = getattr(dataset, "limits", {})
    asked = {limit: value for limit in LIMITS if (value := getattr(collator, limit)) is not None}
    asked = {limit: value for limit, value in asked.items() if own.get(limit) is None or own[limit] > value}
    hidden = set(LIMITS) if isinstance(dataset, RankedStream) else set()
    if collator.options.markers is not None:
        hidden.add("max_completion_length")  # of each answer of a chain
    for limit in [limit for limit in asked if limit in hidden]:
        value = asked.pop(limit)
        if own:
            kind = type(dataset).__name__
            raise ValueError(
                f"{limit}: expected {own[limit]!r}, with which the {kind} is tokenised, got {value!r}; give records, "
                f"or a collator of that limit to the {kind}"
            )
    if not asked or not is_tokenised(dataset):
        return
    most = len(dataset) if isinstance(dataset, RankedDataset) else min(_LOOK, len(dataset))
    for feature in (dataset[k] for k in range(most)):
        prompt, longest = len(feature["prompt_ids"]), max(map(len, feature["completion_ids"]), default=0)
        for limit, length in zip(LIMITS, (prompt + longest, prompt, longest), strict=True):
            if limit in asked and length > asked[limit]:
                raise ValueError(
                    f"{limit}: expected at least the {length} tokens of a row of {name}, which is tokenised and is "
                    f"not cut any more, got {asked[limit]}; give records"
                )


def _check_stream(args: CLHAConfig, training: bool) -> None:
    """ValueError for batches by lengths that are not known."""
    if training and args.max_tokens_per_batch is not None:
        raise ValueError(
            f"max_tokens_per_batch: expected None for a stream, whose lengths are not known, got "
            f"{args.max_tokens_per_batch}"
        )
    if training and sampling_strategy(args) == "group_by_length":
        raise ValueError(
            "train_sampling_strategy: expected random or sequential for a stream, whose lengths are not known, got "
            "'group_by_length'"
        )


def as_dataset(dataset: Any, collator: Any, args: CLHAConfig, *, training: bool) -> Any:
    """Rows become a `RankedDataset`, streams a `RankedStream`; what is tokenised, or has its own collator, stays.

    A training stream is repeated without end, so `max_steps` alone ends training, and every process has as many
    batches as the others. An evaluation stream's end is filled up to full batches for all processes.

    Raises:
        ValueError: a path; something that can be read only once; a stream with `max_tokens_per_batch` or
            `group_by_length`.
        RecordError: as `RankedDataset`.
    """
    if dataset is None or not isinstance(collator, RankedCollator):
        return dataset
    name = "train_dataset" if training else "eval_dataset"
    if isinstance(dataset, RankedStream):
        _check_stream(args, training)
    if isinstance(dataset, (RankedDataset, RankedStream)):
        _check_limits(collator, dataset, name)
        return dataset
    if isinstance(dataset, (str, os.PathLike)):
        raise ValueError(
            f"{name}: expected rows, such as clha_fast.data.read_records gives for a file, got the path "
            f"{os.fspath(dataset)!r}"
        )
    if not isinstance(dataset, IterableDataset):
        tokenised = "completion_ids" in (getattr(dataset, "column_names", None) or ())
        if isinstance(dataset, torch.utils.data.Dataset) or tokenised:
            _check_limits(collator, dataset, name)
            return dataset
        if hasattr(dataset, "__len__"):
            return _tokenised(dataset, collator, args, name)
        if not hasattr(dataset, "__iter__"):
            return dataset
    if isinstance(dataset, Iterator):
        got = type(dataset).__name__
        raise ValueError(f"{name}: expected rows that can be read again for every pass, got a {got}, which ends")
    _check_stream(args, training)
    processes = args.world_size // args.sequence_parallel_size
    return RankedStream(
        dataset,
        collator,
        repeat=training,
        fill_to=1 if training or processes == 1 else processes * args.eval_batch_size,
        skip_bad_records=args.skip_bad_records,
    )


def check_trains(dataset: Any, objective: Objective, args: CLHAConfig, processes: int) -> None:
    """Whether training on `dataset` would change anything, as far as data say; of what is not tokenised, the size.

    Args:
        processes: how many have batches of their own.

    Raises:
        ValueError: no batch is full and only full ones train; the loss depends on no response.
    """
    if not hasattr(dataset, "__len__"):
        return
    size, least = len(dataset), args.train_batch_size
    if not args.accelerator_config.split_batches:
        least *= processes
    if args.dataloader_drop_last and size < least:
        raise ValueError(
            f"dataloader_drop_last: expected False, or at least the {least} prompts of a full batch on each of "
            f"{processes} process{'es' if processes > 1 else ''}, got True and {size}, none of which would train; a "
            "smaller per_device_train_batch_size makes full ones"
        )
    if not is_tokenised(dataset):
        return
    counts = several = False
    seen = kept = backwards = 0
    for features in feature_chunks(dataset):
        given = ranking_inputs(features)
        layout = Layout.whole(given.candidates_per_prompt)
        pairs = Pairs.of(layout, given.rewards)
        chosen = objective.kept(pairs)
        several |= layout.largest > 1
        counts |= not bool(objective.inert(layout, given.rewards, given.sft_index).all())
        kept += int(chosen.sum())
        backwards += int((chosen & (pairs.order < 0)).sum())
        seen += len(features)
        if seen >= _LOOK and counts and (kept or not objective.ranks):
            break
    clha = isinstance(objective, CLHAOptions)
    if counts and objective.ranks and objective.by_rank and backwards > _CONTRADICTION * kept:
        signed = ", noise_rule='signed' drops such pairs" if clha else ""
        logger.warning(
            f"train_dataset: the rewards contradict the order in {backwards:,} of {kept:,} kept pairs "
            f"({100 * backwards / kept:.0f}%) of the first {seen:,} prompts, which train as they are ordered; "
            f"rank_by_reward=True (of read_records, and of clha-fast train) orders the responses by reward{signed}"
        )
    if counts and (kept or not objective.ranks):
        return
    if not counts:
        raise ValueError(
            "train_dataset: expected responses on which the loss depends, got none, so nothing would train; "
            f"{objective.silence_hint(several)}"
        )
    # A reward margin that does not fit the rewards' scale drops every pair; training runs, and ranks nothing.
    why = objective.noise_hint if several else "every prompt has one response"
    left = "the SFT term alone trains" if clha else f"the ranking term of {objective.name!r} is 0"
    logger.warning(f"train_dataset: no pair of responses is ranked, {left}{f'; {why}' if why else ''}")


def check_signals(dataset: Any, name: str, objective: Objective, reference: str | None) -> None:
    """Whether tokenised records hold what the objective cannot do without; others are seen batch by batch.

    Args:
        reference: the kind of `reference.Reference`: with "file" they hold it, with another kind nobody asks them.

    Raises:
        ValueError: they lack it.
    """
    if is_tokenised(dataset):
        check_first(dataset[0], name, objective, reference)


def check_first(row: Mapping[str, Any], name: str, objective: Objective, reference: str | None) -> None:
    """`check_signals` of the first record, as a mapping of what it holds.

    Raises:
        ValueError: it lacks something.
    """
    needed = {*objective.needs} & {"rewards", *SIGNALS}
    needed = needed - {"reference_logps"} if reference != "file" else needed | {"reference_logps"}
    for signal in sorted(needed):
        if row.get(signal) is None:
            way = ""
            if signal == "reference_logps":
                way = "; clha-fast score --policy MODEL SRC DST writes them, or take reference='copy'"
            elif signal == "rewards":
                way = "; clha-fast score --reward-model MODEL SRC DST writes them"
            raise ValueError(
                f"{name}: expected records with {signal}, which the objective {objective.name!r} reads, got none in "
                f"the first one{way}"
            )


def say_other_rewards(training: Any, evaluated: Mapping[str, Any]) -> None:
    """Says which held-out sets have no rewards where training's records have some, or the other way round.

    Their pairs are then kept, and ordered, by another rule than those that train.
    """
    if not is_tokenised(training):
        return
    expected = training[0].get("rewards") is not None
    for name, dataset in evaluated.items():
        if is_tokenised(dataset) and (dataset[0].get("rewards") is not None) != expected:
            ours, theirs = ("none", "some") if expected else ("some", "none")
            rule = "all of its pairs count, in the order of the responses" if expected else "its pairs count by rewards"
            logger.warning(
                f"{name}: expected records with rewards as train_dataset has them ({theirs}), got {ours}: {rule}, and "
                "its figures do not compare with those of training"
            )


def _tokenised(dataset: Any, collator: RankedCollator, args: CLHAConfig, name: str) -> RankedDataset:
    skipped: list[RecordError] | None = [] if args.skip_bad_records else None
    try:
        found = RankedDataset(dataset, collator, num_proc=args.dataset_num_proc, skipped=skipped)
    except RecordError as error:
        raise error if skipped is not None else error.advised(SKIPS) from None
    if skipped:
        logger.warning(f"{len(skipped)} bad records left out, the first: {skipped[0]}")
    if found.cut_prompts or found.cut_completions:
        limits = ("max_length", "max_prompt_length", "max_completion_length")
        given = ", ".join(f"{limit}={getattr(collator, limit)}" for limit in limits if getattr(collator, limit))
        what = "responses" if collator.options.markers is None else "chains"
        logger.warning(
            f"{name}: {found.cut_prompts:,} of {len(found):,} prompts and {found.cut_completions:,} of "
            f"{sum(len(found[k]['completion_ids']) for k in range(len(found))):,} {what} were cut to {given}"
        )
    return found
