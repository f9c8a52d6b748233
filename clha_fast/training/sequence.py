"""Sequence parallelism in a trainer: which processes share the tokens of rows, and that they are given one batch."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.distributed.tensor import DTensor

from clha_fast.models.sequence_parallel import SequenceParallel


def check_sequence(args: Any) -> None:
    """Whether `sequence_parallel_size` fits the processes there are, and the settings beside it.

    Raises:
        ValueError: less than 1, or no number that divides the processes; DeepSpeed, torch.compile, routed gradients,
            NEFTune's noise, evaluation in 16 bits alone, counts of input tokens, or samplers that every process seeds
            for itself.
    """
    size = args.sequence_parallel_size
    if size < 1:
        raise ValueError(f"sequence_parallel_size: expected a whole number of at least 1, got {size!r}")
    if size == 1:
        return
    world = args.world_size
    if world % size:
        right = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
        raise ValueError(
            f"sequence_parallel_size: expected a number that divides the {world} process{'es' if world > 1 else ''} "
            f"there {'are' if world > 1 else 'is'} ({right}), got {size}; torchrun --nproc-per-node starts more"
        )

    def environment(name: str) -> bool:
        return os.environ.get(name, "false").lower() == "true"

    ddp = "the trainer spreads rows under DDP and FSDP2"
    moved = "the model is tried on its device before it trains, where this leaves it elsewhere"
    beside = {
        "deepspeed": (args.deepspeed or environment("ACCELERATE_USE_DEEPSPEED"), ddp),
        "torch_compile": (args.torch_compile, "compiled models are not spread"),
        "max_dropped_mass": (args.max_dropped_mass is not None, "what is left out is not counted over processes"),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "its noise goes by the tokens of a row, of which a process has a part",
        ),
        "bf16_full_eval": (args.bf16_full_eval, moved),
        "fp16_full_eval": (args.fp16_full_eval, moved),
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen not in (False, "no"),
            "transformers would count a batch once for each process; num_tokens in the log is right",
        ),
        "accelerator_config.use_seedable_sampler=False": (
            not args.accelerator_config.use_seedable_sampler,
            "the processes of a batch have to draw the same one",
        ),
    }
    for name, (given, why) in beside.items():
        if given:
            raise ValueError(f"{name}: expected none with sequence_parallel_size={size} ({why}), got one")


def sequence_of(args: Any, model: nn.Module) -> SequenceParallel | None:
    """The processes that share rows with this one: `sequence_parallel_size` in a row of ranks; every process calls.

    Raises:
        ValueError: a model whose weights are spread over processes.
    """
    size = args.sequence_parallel_size
    if size == 1:
        return None
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"model: expected whole weights in every process with sequence_parallel_size={size}, got some that are "
            f"spread already (tensor parallelism, FSDP, ZeRO-3); give the whole model, and fsdp=True if it is to be"
        )
    group, _ = dist.new_subgroups(group_size=size, timeout=args.ddp_timeout_delta)
    assert group is not None  # every process is in one
    return SequenceParallel(group)


def share_batches(accelerator: Any, size: int) -> None:
    """Has `accelerator.prepare` give the `size` processes of a group one batch, and count each group as one process.

    Raises:
        ValueError: the older FSDP.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            f"fsdp: expected FSDP2 with sequence_parallel_size={size}, got the older FullyShardedDataParallel; "
            "fsdp_config={'version': 2} is the newer one"
        )
    own = accelerator.prepare_data_loader

    def prepare(loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
        if getattr(loader, "_is_accelerate_prepared", False):
            return own(loader, device_placement, slice_fn_for_dispatch)
        # As accelerate's own, but for the two counts. It knows such groups as DeepSpeed's alone, which cut batches.
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=accelerator.num_processes // size,
            process_index=accelerator.process_index // size,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=accelerator.dispatch_batches,
            even_batches=accelerator.even_batches,
            slice_fn_for_dispatch=slice_fn_for_dispatch,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    accelerator.prepare_data_loader = prepare
