"""Records for training and evaluation: read, split without leaks, and counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clha_fast.batching.batch import inert_mask
from clha_fast.batching.totals import kept_pairs
from clha_fast.data.records import RankedRecord
from clha_fast.options import CLHAOptions


def prompt_key(record: RankedRecord) -> str:
    """The same text for the same prompt: outer blanks do not count."""
    if isinstance(record.prompt, str):
        return record.prompt.strip()
    return json.dumps([dict(message) for message in record.prompt], sort_keys=True)


def split_records(
    records: Sequence[RankedRecord], fraction: float, seed: int
) -> tuple[list[RankedRecord], list[RankedRecord]]:
    """(training, evaluation), by a hash of prompt and seed: a prompt is on one side, whatever else the file holds.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction: expected a number between 0 and 1, got {fraction!r}")
    train: list[RankedRecord] = []
    held_out: list[RankedRecord] = []
    for record in records:
        digest = hashlib.sha256(f"{seed}\n{prompt_key(record)}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (held_out if share < fraction else train).append(record)
    if not train or not held_out:
        side = "training" if not train else "evaluation"
        raise ValueError(f"eval_fraction: {fraction} of {len(records)} records leaves none for {side}")
    return train, held_out


def shared_prompts(train: Sequence[RankedRecord], held_out: Sequence[RankedRecord]) -> int:
    """How many evaluation records have a prompt that training also has."""
    seen = {prompt_key(record) for record in train}
    return sum(prompt_key(record) in seen for record in held_out)


@dataclass(frozen=True)
class DataSummary:
    """Counts over a list of records, under the options of a loss.

    Attributes:
        pairs: all i < j. noise_pairs: those the noise rule drops. inert: candidates that training does not run.
        closed_gates: prompts whose SFT target's reward is not above the floor.
    """

    prompts: int
    candidates: int
    fewest: int
    most: int
    rewarded: bool
    pairs: int
    noise_pairs: int
    inert: int
    closed_gates: int


def summarise(records: Sequence[RankedRecord], options: CLHAOptions) -> DataSummary:
    """Counts of what the loss will see; records with and without rewards must not be mixed."""
    sizes = torch.tensor([len(record.completions) for record in records])
    targets = torch.tensor([record.sft_index for record in records])
    rewarded = records[0].rewards is not None
    rewards = None
    if rewarded:
        rewards = torch.tensor([reward for record in records for reward in record.rewards or ()], dtype=torch.float32)
    present = torch.ones(int(sizes.sum()), dtype=torch.bool)
    most = int(sizes.max())
    pairs = int((sizes * (sizes - 1) // 2).sum())
    closed = 0
    if rewards is not None:
        starts = sizes.cumsum(0) - sizes
        closed = int((rewards[starts + targets] <= options.reward_floor).sum())
    return DataSummary(
        prompts=len(records),
        candidates=int(sizes.sum()),
        fewest=int(sizes.min()),
        most=most,
        rewarded=rewarded,
        pairs=pairs,
        noise_pairs=pairs - int(kept_pairs(present, sizes, rewards, options, most).sum()),
        inert=int(inert_mask(rewards, sizes, targets, options).sum()),
        closed_gates=closed,
    )
