"""Micro-batches of whole prompts with little padding: under a budget of tokens that run, or of like length."""

from __future__ import annotations

import functools
import heapq
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from clha_fast.batching.batch import CandidateFeature, inert_mask
from clha_fast.objectives import Objective
from clha_fast.options import count

logger = logging.get_logger(__name__)

Shape = tuple[int, int]

# Batches that are cut from one block of prompts: more sort better, fewer mix better.
_BLOCK = 50
# How much shorter a prompt may be taken to be: with none, a small set would have the same batches in every epoch.
_JITTER = 0.1
# Epochs that are packed beforehand to learn how many batches one may need.
_TRIALS = 4


def prompt_shapes(
    features: Sequence[CandidateFeature],
    options: Objective,
    drop_inert: bool = True,
    multiple: int | None = None,
    layout: str = "padded",
) -> list[Shape]:
    """(rows, tokens of the longest row) that each prompt puts into a batch.

    Args:
        options, drop_inert, multiple, layout: as `RankedCollator` has them (`multiple`: its `pad_to_multiple_of`). A
            prompt whose candidates are all inert has no row, and the length of its longest candidate. In packed and
            shared batches all prompts are in one row: there a shape is (0, the tokens that a prompt adds to it).

    Raises:
        ValueError: an item is no tokenised record.
    """
    items = [_tokenised(features[index], index) for index in range(len(features))]
    sizes = [len(item["completion_ids"]) for item in items]
    kept = torch.ones(sum(sizes), dtype=torch.bool)
    if drop_inert and items:
        rewards = None
        if items[0]["rewards"] is not None:
            rewards = torch.tensor([r for item in items for r in item["rewards"] or ()], dtype=torch.float32)
        targets = torch.tensor([int(item["sft_index"]) for item in items])
        kept = ~inert_mask(rewards, torch.tensor(sizes), targets, options)
    step = multiple or 1
    shapes = []
    for item, mask in zip(items, kept.split(sizes), strict=True):
        lengths = [len(ids) for ids, keep in zip(item["completion_ids"], mask.tolist(), strict=True) if keep]
        if layout != "padded":
            prompts = len(lengths) if layout == "packed" else min(1, len(lengths))
            shapes.append((0, prompts * len(item["prompt_ids"]) + sum(lengths)))
            continue
        width = len(item["prompt_ids"]) + max(lengths or map(len, item["completion_ids"]))
        shapes.append((len(lengths), -(-width // step) * step))
    return shapes


def _tokenised(item: Any, index: int) -> CandidateFeature:
    if isinstance(item, Mapping) and "prompt_ids" in item and "completion_ids" in item:
        return item  # type: ignore[return-value]
    expected = "a tokenised record with prompt_ids and completion_ids (RankedCollator.tokenize_record)"
    raise ValueError(f"train_dataset[{index}]: expected {expected}, got {type(item).__name__}")


def padded_tokens(shapes: Sequence[Shape], batch: Sequence[int], joined: bool = False) -> int:
    """Tokens that run, padding among them, of one batch of positions in `shapes`: rows times the longest row.

    Args:
        joined: the shapes are of packed or shared batches, whose tokens add up.
    """
    if joined:
        return sum(shapes[index][1] for index in batch)
    own = [shapes[index] for index in batch if shapes[index][0]]
    return sum(rows for rows, _ in own) * max((width for _, width in own), default=0)


class TokenBudgetSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of whole prompts, each of at most `max_tokens` tokens that run (of padded rows, rows times the longest).

    An epoch shuffles the prompts, sorts blocks of them by length, cuts the blocks into batches and shuffles these.
    Every prompt is in exactly one batch of an epoch. Every epoch has the same number of batches, a multiple of
    `num_processes` (batches are halved to get there), so that no process waits for another at the end; where there are
    fewer prompts than that, each is a batch and the cheapest comes again, as the last of the epoch's last round
    (`fill` such batches). Batches that run at the same time on several processes cost about the same, and the costliest
    come first, so that memory fails at once or never.

    The order depends on `seed` and epoch alone: every process computes the same one, and a resumed run finds its place.

    Args:
        shapes: of `prompt_shapes`. max_tokens: a prompt that is larger forms a batch of its own, with a warning.
        num_processes: batch i goes to process i modulo num_processes (what accelerate does).
        joined: the shapes are of packed or shared batches.

    Raises:
        ValueError: no prompt; `max_tokens` or `num_processes` is not positive.
    """

    drop_last = False  # accelerate would leave the last batches out

    def __init__(
        self, shapes: Sequence[Shape], max_tokens: int, seed: int = 0, num_processes: int = 1, joined: bool = False
    ) -> None:
        max_tokens = count("max_tokens", max_tokens, "a positive number")
        num_processes = count("num_processes", num_processes, "a positive number")
        if not shapes:
            raise ValueError("shapes: expected at least one prompt, got none")
        self.shapes = list(shapes)
        self.max_tokens = max_tokens
        self.seed = seed
        self.num_processes = num_processes
        self.epoch = 0
        self.joined = joined
        sizes = [padded_tokens([shape], [0], joined) for shape in shapes]
        self._block = max(1, round(_BLOCK * max_tokens / max(sum(sizes), 1) * len(shapes)))
        self.too_large = sum(size > max_tokens for size in sizes)
        if self.too_large:
            largest = max(sizes)
            logger.warning(
                f"max_tokens_per_batch: {self.too_large} of {len(shapes)} prompts are larger than {max_tokens} tokens "
                f"(up to {largest}); each forms a batch of its own"
            )
        most = max(len(self._pack(epoch)) for epoch in range(_TRIALS))
        self._length = -(-most // num_processes) * num_processes

    def __len__(self) -> int:
        return self._length

    @property
    def fill(self) -> int:
        """Batches at the end of every epoch whose prompts have come before, fewer than `num_processes`."""
        return max(self._length - len(self.shapes), 0)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's batches come next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(self.epoch)

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, for all processes."""
        packed = self._pack(epoch)
        if len(packed) > self._length:  # rare: then the prompts stay together as they were, in another order
            packed = self._pack(0)
        packed = sorted(self._halve(packed), key=self._cost, reverse=True)
        packed += packed[-1:] * self.fill
        size = self.num_processes
        groups = [packed[start : start + size] for start in range(0, len(packed), size)]
        last = groups[1:][-1:] if self.fill else []
        first, *others = groups[: len(groups) - len(last)]
        self._random(epoch, "order").shuffle(others)
        return [batch for group in (first, *others, *last) for batch in group]

    def _cost(self, batch: Sequence[int]) -> int:
        return padded_tokens(self.shapes, batch, self.joined)

    def _random(self, epoch: int, what: str) -> random.Random:
        return random.Random(f"{self.seed} {epoch} {what}")

    def _pack(self, epoch: int) -> list[list[int]]:
        chance = self._random(epoch, "prompts")
        order = list(range(len(self.shapes)))
        chance.shuffle(order)
        about = [width * chance.uniform(1 - _JITTER, 1) for _, width in self.shapes]
        batches: list[list[int]] = []
        for start in range(0, len(order), self._block):
            batch: list[int] = []
            rows = width = total = 0
            for index in sorted(order[start : start + self._block], key=lambda k: -about[k]):
                more, longest = self.shapes[index]
                longest = longest if more or self.joined else 0
                cost = total + longest if self.joined else (rows + more) * max(width, longest)
                if total and cost > self.max_tokens:
                    batches.append(batch)
                    batch, rows, width, total = [], 0, 0, 0
                batch.append(index)
                rows, width = rows + more, max(width, longest)
                total = total + longest if self.joined else rows * width
            batches.append(batch)
        return batches

    def _halve(self, batches: list[list[int]]) -> list[list[int]]:
        """The same prompts in `len(self)` batches, or in one each where there are fewer prompts."""
        heap = [(-self._cost(batch), number, batch) for number, batch in enumerate(batches) if len(batch) > 1]
        done = [batch for batch in batches if len(batch) == 1]
        heapq.heapify(heap)
        number = len(batches)
        while heap and len(heap) + len(done) < self._length:
            _, _, batch = heapq.heappop(heap)
            middle = len(batch) // 2
            for part in (batch[:middle], batch[middle:]):
                number += 1
                if len(part) > 1:
                    heapq.heappush(heap, (-self._cost(part), number, part))
                else:
                    done.append(part)
        return [*(batch for _, _, batch in heap), *done]


class LengthSampler(LengthGroupedSampler):
    """transformers' sampler of like lengths, in an order that depends on seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(60))
        return iter(super().__iter__())


def row_lengths(features: Sequence[CandidateFeature]) -> list[int]:
    """Tokens of every prompt's longest row."""
    items = (_tokenised(features[index], index) for index in range(len(features)))
    return [len(item["prompt_ids"]) + max(map(len, item["completion_ids"])) for item in items]


def budget_loader(
    dataset: Any, collator: Callable[[Any], Any], sampler: TokenBudgetSampler, args: TrainingArguments
) -> DataLoader[Any]:
    """A loader with the worker settings of `args`, still to be prepared by accelerate."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        worker_init_fn=functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )


def start_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Tell the samplers in a prepared loader which epoch's order comes next, however deep they are.

    Trainer and accelerate look one or two levels deep, some releases less, and skipping batches puts one more around
    accelerate's shard: a run resumed inside a later epoch would go through the first one's order.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
