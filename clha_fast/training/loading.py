"""Which of transformers' and accelerate's settings for loading data hold for batches of candidates."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments


def sampling_strategy(args: TrainingArguments) -> str:
    """`train_sampling_strategy`; older releases knew length grouping alone, as a flag."""
    strategy: Any = getattr(args, "train_sampling_strategy", None)
    if strategy is None:
        return "group_by_length" if getattr(args, "group_by_length", False) else "random"
    return str(getattr(strategy, "value", strategy))


def check_loading(args: Any) -> None:
    """Refuse what cannot be right with ragged batches, and settle what accelerate would choose for streams.

    Raises:
        ValueError: batches read by one process and cut along their first dimension (a batch's tensors have different
            ones); processes with different numbers of batches, which wait for each other for ever; a sampling strategy
            that asks for the length of `input_ids`, or a second one beside `max_tokens_per_batch`.
    """
    loading = args.accelerator_config
    if loading.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches: expected False (a batch of candidates cannot be cut along its first "
            "dimension; every process reads its own), got True"
        )
    loading.dispatch_batches = False  # None would be True for streams
    if not loading.even_batches and args.world_size > 1:
        raise ValueError(
            "accelerator_config.even_batches: expected True with several processes (one with fewer batches would leave "
            "the others waiting), got False"
        )
    strategy = sampling_strategy(args)
    if strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy: expected random, sequential or group_by_length (max_tokens_per_batch balances "
            "batches of candidates), got 'batch_rebalance'"
        )
    if args.max_tokens_per_batch is None:
        return
    if strategy != "random":
        raise ValueError(
            "train_sampling_strategy: expected random with max_tokens_per_batch, which groups by length itself, got "
            f"{strategy!r}"
        )
    if loading.split_batches:
        raise ValueError(
            "accelerator_config.split_batches: expected False with max_tokens_per_batch, which counts the tokens of "
            "each process, got True"
        )
