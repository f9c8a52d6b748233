"""The part of the trainer that makes data loaders: streams, batches under a token budget, like lengths."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer

from clha_fast.batching.batch import CandidateBatch, first_prompts
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.sampling import (
    LengthSampler,
    TokenBudgetSampler,
    budget_loader,
    prompt_shapes,
    row_lengths,
)
from clha_fast.batching.stream import RankedStream
from clha_fast.batching.totals import add_counts, dataset_counts, local_counts
from clha_fast.objectives import Objective
from clha_fast.training.datasets import as_dataset
from clha_fast.training.sequence import share_batches
from clha_fast.training.validation import sampling_strategy


class RankedLoaders(Trainer):
    """`Trainer`, whose data loaders give batches of candidates; `CLHATrainer` is the whole."""

    args: Any  # a CLHAConfig
    data_collator: Any
    eval_collator: Any
    loss_options: Objective
    layout: str
    _signature_columns: list[str] | None
    # Counts of evaluation sets, which do not change from evaluation to evaluation.
    _counted: weakref.WeakKeyDictionary[RankedDataset, Tensor]

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`; with `sequence_parallel_size` the processes of a group are given the same batches."""
        super().create_accelerator_and_postprocess()
        if self.args.sequence_parallel_size > 1:
            share_batches(self.accelerator, self.args.sequence_parallel_size)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Prompts of an optimiser step."""
        return super().get_total_train_batch_size(args) // args.sequence_parallel_size

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`; with `max_tokens_per_batch` its batches are those of a `TokenBudgetSampler`.

        Raises:
            ValueError: a dataset whose prompts are not tokenised, with `max_tokens_per_batch` or group_by_length.
        """
        budget = self.args.max_tokens_per_batch
        if budget is None or self.train_dataset is None or isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        sampler = self._budget_sampler(budget)
        loader = budget_loader(self.train_dataset, self.data_collator, sampler, self.args)
        # The sampler's batches are even already, and before 1.14 accelerate evens out none without a fixed size.
        self.accelerator.even_batches, even = False, self.accelerator.even_batches
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even

    def _budget_sampler(self, budget: int) -> TokenBudgetSampler:
        collator = self.data_collator
        own = isinstance(collator, RankedCollator)
        shapes = prompt_shapes(
            self.train_dataset,
            self.loss_options,
            drop_inert=collator.drop_inert if own else self.args.drop_inert,
            multiple=collator.pad_to_multiple_of if own else self.args.pad_to_multiple_of,
            layout=self.layout,
        )
        joined = self.layout != "padded"
        return TokenBudgetSampler(shapes, budget, self._data_seed, self._data_processes, joined)

    @property
    def _data_processes(self) -> int:
        """Processes with batches of their own."""
        return self.accelerator.num_processes // self._sharing

    @property
    def _sharing(self) -> int:
        """Processes that are given the same batch: those of a tensor-parallel or sequence-parallel group."""
        return self.get_tp_size() * self.args.sequence_parallel_size

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if sampling_strategy(self.args) != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        # Trainer would look for the length of input_ids, which a prompt with its candidates has not.
        lengths = dataset.lengths if isinstance(dataset, RankedDataset) else row_lengths(dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthSampler(lengths, size, self._data_seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`; what a resumed run throws away of a stream is not tokenised."""
        stream = self.train_dataset
        if not isinstance(stream, RankedStream):
            return super()._run_epoch(*args, **kwargs)
        resumed = kwargs.get("resume_from_checkpoint") is not None and kwargs.get("epoch") == kwargs["epochs_trained"]
        batches = kwargs["steps_trained_in_current_epoch"] if resumed and not self.args.ignore_data_skip else 0
        # Of several workers some may give a batch more than this, none gives less.
        batches //= max(self.args.dataloader_num_workers, 1)
        split = self.args.accelerator_config.split_batches
        size = self._train_batch_size * (1 if split else self._data_processes)
        # accelerate fills up the end of a stream that has one with what it began with.
        stream.discarded = batches * size if stream.repeat else 0
        return super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`; once a pass of a stream has begun, what it throws away is not thrown away by another."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            if isinstance(self.train_dataset, RankedStream):
                self.train_dataset.discarded = 0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer`, with the evaluation's collator."""
        if not isinstance(eval_dataset, str):
            eval_dataset = as_dataset(eval_dataset, self.eval_collator, self.args, training=False)
        with self._evaluating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `Trainer`, with the evaluation's collator; rows in a known format will do."""
        dataset = as_dataset(test_dataset, self.eval_collator, self.args, training=False)
        with self._evaluating():
            return super().get_test_dataloader(dataset)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            yield
        finally:
            self.data_collator = train_collator

    def _own_prompts(self, batch: CandidateBatch, num_fill: int) -> int | None:
        """How many of this process's prompts of an evaluation batch are not fill; None when all are its own.

        Args:
            num_fill: what a stream has filled up at the end of the batch.
        """
        size = batch.candidates_per_prompt.numel()
        if num_fill:
            return size - num_fill
        state = self.accelerator.gradient_state
        if self._data_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        own = min(max(state.remainder - self.args.process_index // self._sharing * size, 0), size)
        return None if own == size else own

    def _counts_of(self, loader: DataLoader) -> Tensor:
        """float64 on the device, `local_counts` of everything that an evaluation's loader gives, over all processes.

        A tokenised dataset is counted as it is; anything else is read once more, a pass without the model.
        """
        dataset, collator = getattr(loader, "dataset", None), self.eval_collator
        if isinstance(dataset, RankedDataset) and isinstance(collator, RankedCollator):
            if dataset not in self._counted:
                self._counted[dataset] = dataset_counts(dataset, self.loss_options, collator.drop_inert)
            return self._counted[dataset].to(self.args.device)
        parts, most = [], 1
        with torch.random.fork_rng(devices=[]):  # a pass of a loader draws a seed for its workers
            for inputs in loader:
                batch = CandidateBatch.from_dict(inputs)
                own = self._own_prompts(batch, inputs.get("num_fill", 0))
                if own != 0:
                    batch = batch if own is None else first_prompts(batch, own)
                    largest = int(batch.candidates_per_prompt.max())
                    parts.append(local_counts([batch], self.loss_options, largest))
                    most = max(most, largest)
        if self.accelerator.num_processes > 1:
            most = int(self.accelerator.gather(torch.tensor([most], device=self.args.device)).max())
        return self._sum_over_processes(add_counts(parts, most).to(self.args.device))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        """Over those with batches of their own; whole numbers stay exact."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values, reduction="sum") / self._sharing

    def _skipped_records(self) -> dict[str, int]:
        """What a training line of the log says of a stream's bad records."""
        stream = self.train_dataset
        return {"skipped_records": stream.skipped} if isinstance(stream, RankedStream) and stream.skipped else {}
