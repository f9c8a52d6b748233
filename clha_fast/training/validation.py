"""Settings of transformers that end in a traceback, or in something else than was asked for, far from their cause."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import importlib.util
import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from clha_fast.data.records import shorten
from clha_fast.objectives.metrics import METRIC_NAMES, CLHAMetrics
from clha_fast.options import as_python, hints_of, is_integer, is_number, require

logger = logging.get_logger(__name__)

# What `Trainer` itself says of an evaluation.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
# Of what evaluations log: whether more is better; None where neither is.
DIRECTIONS: dict[str, bool | None] = {
    **dict.fromkeys(("loss", "rank_loss", "sft_loss", "good_nll", "target_nll", "runtime"), False),
    **dict.fromkeys(("old_kl", "reference_kl", "unfinished_share", "empty_share"), False),
    **dict.fromkeys(("rewards/accuracies", "rewards/margins", "logps/chosen", "kendall_tau", "best_first"), True),
    **dict.fromkeys(("implicit_rewards/accuracies", "implicit_rewards/margins", "mean_token_accuracy", "reward"), True),
    **dict.fromkeys(("samples_per_second", "steps_per_second"), True),
    **dict.fromkeys(("logps/rejected", "kept_pair_share", "active_pair_share", "open_gate_share", "num_tokens"), None),
    **dict.fromkeys(("inert_candidates", "entropy", "ratio", "clip_share", "answer_tokens"), None),
}
# Arguments of `Trainer` that would be given logits.
NO_LOGITS = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
_LEAST = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        ("a whole number of at least 1", 1),
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "num_train_epochs"), ("a finite number of at least 0", 0)),
}
# What NumPy, and torch's generators, take.
_SEEDS = {"seed": (0, 2**32 - 1), "data_seed": (-(2**63), 2**63 - 1)}
# Schedules that go by `metric_for_best_model`.
_WATCHING = ("reduce_lr_on_plateau", "greedy")
# They cast the model in place.
_CASTS = ("bf16_full_eval", "fp16_full_eval")
_CHOICES: dict[str, type[enum.Enum]] = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
# transformers does not say of these whether they are installed.
_UNKNOWN_REPORTERS = set(INTEGRATION_TO_CALLBACK) & {"codecarbon", "flyte"}


def check_numbers(args: Any) -> None:
    """Before `TrainingArguments` makes anything of them: numbers of numpy's kind become Python's.

    Raises:
        ValueError: a size below 1, a negative or infinite rate, a seed that no generator takes, an own setting that is
            declared as a number and is none, an unknown optimizer or schedule, DeepSpeed without its package.
    """
    kind: Any = type(args)
    for field in dataclasses.fields(args):
        if not field.init:
            continue
        value = getattr(args, field.name)
        value = bool(value) if isinstance(value, np.bool_) else as_python(value)
        setattr(args, field.name, value)
        declared = _own_numbers(kind).get(field.name, set())
        if declared and value is not field.default and not (value is None and type(None) in declared):
            fits, expected = (is_integer, "a whole number") if int in declared else (is_number, "a number")
            require(field.name, value, fits(value), expected)
    for name, (expected, least) in _LEAST.items():
        value = getattr(args, name)
        fits = is_integer if "whole" in expected else is_number
        if not (fits(value) and least <= value < math.inf):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    for name, (least, most) in _SEEDS.items():
        value = getattr(args, name)
        if value is not None and not (is_integer(value) and least <= value <= most):
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value!r}")
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        known = [str(choice.value) for choice in choices]
        if isinstance(value, str) and not isinstance(value, enum.Enum) and value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            raise ValueError(
                f"{name}: expected one of transformers' {choices.__name__}, got {value!r}"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
    if args.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("deepspeed: expected the package deepspeed to be installed, got none")


@functools.lru_cache(maxsize=16)
def _own_numbers(kind: Any) -> dict[str, set[type]]:
    """Settings of the library's own that are numbers: int or float, and None's type beside.

    Neither transformers' nor those that a user's subclass of a configuration adds: they have their own rules.
    """
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = next(base for base in kind.__mro__ if base.__module__.startswith("clha_fast."))
    found = {}
    for name, hint in hints_of(ours).items():
        kinds = set(typing.get_args(hint) or (hint,))
        if name not in theirs and kinds - {type(None)} in ({int}, {float}):
            found[name] = kinds
    return found


def check_arguments(args: Any, kind: type[Any], given: Mapping[str, Any], unused: Sequence[str], why: str) -> None:
    """What a trainer is constructed with.

    Args:
        args: its settings, of the class `kind`. given: other arguments by name; those in `unused` must be None, `why`.

    Raises:
        ValueError: settings of another class, several GPUs in one process, an argument that it has no use for.
    """
    if not isinstance(args, kind):
        raise ValueError(f"args: expected a {kind.__name__}, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: expected one GPU a process, got {args.n_gpu} (nn.DataParallel copies the model, not what stands on "
            "it); start one process a GPU with torchrun or accelerate launch"
        )
    for name in unused:
        if given.get(name) is not None:
            raise ValueError(f"{name}: expected None ({why}), got {shorten(given[name])}")


def check_machine(args: Any) -> None:
    """After `TrainingArguments` has found devices and reporters.

    Raises:
        ValueError: processes of torchrun that each take themselves for the only one; fp16 on a CPU, where the Trainer
            computes float32; checkpoints in host memory of a machine that has no other; a reporter that is unknown or
            not installed.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if torch.distributed.is_torchelastic_launched() else 1
    if args.world_size == 1 < started:
        raise ValueError(
            f"use_cpu: expected True where torchrun starts {started} processes on a machine without a GPU, got "
            f"{args.use_cpu} (each would train alone and write the same files)"
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16: expected False on a CPU (float32 would be computed; bf16 works there), got True")
    checkpoints = getattr(args, "activation_checkpointing_kwargs", None) or {}
    if checkpoints.get("offload") and torch.accelerator.current_accelerator(check_available=True) is None:
        raise ValueError(
            "activation_checkpointing_kwargs: expected no offload without an accelerator (checkpoints go to pinned "
            f"memory, which a machine of CPUs alone does not have), got {checkpoints}"
        )
    available = {*get_available_reporting_integrations(), *_UNKNOWN_REPORTERS}
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: expected none or some of {', '.join(INTEGRATION_TO_CALLBACK)}, got {name!r}")
        if name not in available:
            raise ValueError(
                f"report_to: expected a reporter whose package is installed, got {name!r}; pip install it, or leave "
                "it out"
            )


def check_fsdp(args: Any) -> None:
    """For settings or an environment that ask for FSDP, before there is an Accelerator, which leaves the wish there.

    Raises:
        ValueError: processes on CPUs, with which accelerate trains under DDP instead; an accelerate without FSDP2.
    """
    if not args.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(
            "fsdp: expected processes with an accelerator each (without, accelerate trains with DDP instead), got "
            "CPUs; load the model with from_pretrained(distributed_config=DistributedConfig(fsdp_size=...)), or "
            "see examples/fsdp2_loop.py"
        )
    if "fsdp_version" not in FullyShardedDataParallelPlugin.__dataclass_fields__:
        raise ValueError(f"fsdp: expected accelerate 1.6 or newer, which knows FSDP2, got {accelerate.__version__}")


def check_schedule(args: Any) -> None:
    """ValueError where the schedule cannot be made, for what `lr_scheduler_kwargs` lacks or should not have."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    try:
        get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs: expected what the schedule {name!r} takes, got {args.lr_scheduler_kwargs!r} "
            f"({' '.join(str(error).split())})"
        ) from error
    mode = dict(args.lr_scheduler_kwargs or {}).get("mode", "min")
    if name in _WATCHING and mode != ("max" if args.greater_is_better else "min"):
        better = "more" if args.greater_is_better else "less"
        raise ValueError(
            f"lr_scheduler_kwargs: expected a mode by which {better} of {args.metric_for_best_model!r} is better for "
            f"the schedule {name!r}, as greater_is_better says, got {mode!r}; give "
            f"{{'mode': {'max' if args.greater_is_better else 'min'!r}}}"
        )


def check_optimizer(args: Any, model: Any) -> None:
    """ValueError where transformers cannot make the optimizer, for a package or a setting that it needs."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(
            f"optim: expected an optimizer that can be made here, got {name!r} ({' '.join(str(error).split())})"
        ) from error


def settle_best_metric(args: Any, own: Iterable[str] = ()) -> None:
    """Sets `greater_is_better`, where it is None, by `DIRECTIONS`: for transformers all but losses should grow.

    To be called ahead of `TrainingArguments.__post_init__`; `own` are the objective's metrics. Names of several
    evaluation sets have the set's in front. An unknown name stays for `check_best_metric`.

    Raises:
        ValueError: the name of a metric of which neither more nor less is known to be better.
    """
    name = args.metric_for_best_model
    if not isinstance(name, str) or args.greater_is_better is not None:
        return
    directions = dict.fromkeys(own, None) | DIRECTIONS
    own_name = name.removeprefix("eval_")
    known = [metric for metric in directions if own_name == metric or own_name.endswith(f"_{metric}")]
    if not known:
        return
    better = directions[max(known, key=len)]
    if better is None:
        raise ValueError(
            f"greater_is_better: expected True or False beside metric_for_best_model={name!r}, of which neither more "
            "nor less is better in itself, got None"
        )
    args.greater_is_better = better


def check_best_metric(name: str | None, metrics: Iterable[str]) -> None:
    """ValueError where `metric_for_best_model` is none of an evaluation's `metrics` (with or without `eval_`)."""
    known = [metric.removeprefix("eval_") for metric in metrics]
    if name is not None and name.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(known)}, got {name!r}")


def evaluation_metrics(own: Sequence[str] | Mapping[str, str] = ()) -> list[str]:
    """What an evaluation of `CLHATrainer` with one dataset is known to hold; `own` are the objective's metrics."""
    metrics = CLHAMetrics(torch.zeros(len(METRIC_NAMES) + len(own)), torch.zeros(0), names=own).as_dict()
    return ["loss", *metrics, "inert_candidates", *SPEEDS]


class Dtypes:
    """The dtypes of a model's weights before anything ran."""

    def __init__(self, model: nn.Module) -> None:
        self.given = {parameter.dtype for parameter in model.parameters()}

    def check(self, args: TrainingArguments, model: nn.Module) -> None:
        """ValueError where an evaluation has cast what would be trained, as transformers does outside of training."""
        for name in _CASTS:
            if getattr(args, name) and {parameter.dtype for parameter in model.parameters()} != self.given:
                raise ValueError(
                    f"{name}: expected False where a model trains after it was evaluated, got True, which has cast the "
                    f"weights for good; {name.partition('_')[0]}=True evaluates in that dtype and leaves them"
                )


def check_casts(args: TrainingArguments, dtype: torch.dtype) -> None:
    """ValueError where an evaluation would cast what is trained or saved after it, of weights in `dtype`."""
    for name, other in zip(_CASTS, (torch.bfloat16, torch.float16), strict=True):
        if getattr(args, name) and dtype != other:
            raise ValueError(
                f"{name}: expected False where a run evaluates before it trains and before it saves, got True, which "
                f"casts the weights for good; {name.partition('_')[0]}=True evaluates in that dtype and leaves them"
            )


def say_what_is_left_out(model: nn.Module) -> None:
    """A warning for what an adapter adds to `outputs.loss`, which there is none of in a trainer here."""
    for name, config in getattr(model, "peft_config", {}).items():
        weight = getattr(config, "orth_reg_weight", 0)
        if weight:
            logger.warning(
                f"peft: AdaLoRA's regulariser (orth_reg_weight={weight} of the adapter {name!r}) is added to no "
                "loss of a trainer here, see docs/adapters.md"
            )


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
            ones); processes with different numbers of batches, or of attempts at them, which wait for each other for
            ever; batches in the order in which workers finish them; a sampling strategy that asks for the length of
            `input_ids`; beside `max_tokens_per_batch` a second one, or a search for the batch's size.
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
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            "auto_find_batch_size: expected False with several processes (one that is out of memory would start again "
            "alone, and the others wait for it), got True"
        )
    if not getattr(args, "dataloader_in_order", True):
        raise ValueError(
            "dataloader_in_order: expected True (by their order a resumed run knows which batches it has seen, and an "
            "evaluation which prompts only fill its last one up), got False"
        )
    strategy = sampling_strategy(args)
    if strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy: expected random, sequential or group_by_length (max_tokens_per_batch balances "
            "batches of candidates), got 'batch_rebalance'"
        )
    if args.max_tokens_per_batch is None:
        return
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: expected False with max_tokens_per_batch, which alone says how large a batch is, "
            "got True; a smaller max_tokens_per_batch takes less memory"
        )
    if strategy != "random":
        raise ValueError(
            "train_sampling_strategy: expected random with max_tokens_per_batch, which groups by length itself, got "
            f"{strategy!r}"
        )
    if args.dataloader_drop_last:
        raise ValueError(
            "dataloader_drop_last: expected False with max_tokens_per_batch, whose epochs hold every prompt, got True"
        )
    if loading.split_batches:
        raise ValueError(
            "accelerator_config.split_batches: expected False with max_tokens_per_batch, which counts the tokens of "
            "each process, got True"
        )
