"""transformers' Trainer with a ranking loss in the output embedding's place: no logits in training or evaluation."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from clha_fast.batching.batch import CandidateBatch, check_chains, first_prompts
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.totals import local_counts, step_counts
from clha_fast.files import last_checkpoint
from clha_fast.models.adapters import base_model, with_adapter
from clha_fast.models.dropout import without_dropout
from clha_fast.models.forward import CandidateForward, LogpForward, check_dropped
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.measure import measure_head
from clha_fast.models.positions import RowLimit
from clha_fast.models.sharding import reshard, whole_weights
from clha_fast.models.tiled import tile_mlps
from clha_fast.objectives.metrics import CLHAMetrics
from clha_fast.training.config import CLHAConfig
from clha_fast.training.dataloaders import RankedLoaders
from clha_fast.training.datasets import as_dataset, check_reach, check_signals, check_trains, say_other_rewards
from clha_fast.training.layout import asked_layout, settle_layout
from clha_fast.training.reference import Reference
from clha_fast.training.reports import ReportingTrainer
from clha_fast.training.running_metrics import RunningMetrics
from clha_fast.training.sequence import sequence_of
from clha_fast.training.trl_names import as_model
from clha_fast.training.validation import NO_LOGITS, Dtypes, check_arguments, check_fsdp, say_what_is_left_out

logger = logging.get_logger(__name__)

# What a collator reads of a tokenised record, or of a row in one of the known formats.
COLUMNS = (
    "prompt_ids completion_ids completion_mask source prompt completions rewards ranks sft_index chosen rejected "
    "score_chosen score_rejected prefix suffix reward query responses scores answers instruction fill "
    "system tools chat_template_kwargs margin "
    "reference_logps reference_tokens old_logps advantages token_weights"
)


def _embeddings_of(model: nn.Module) -> list[nn.Module]:
    found = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    return [module for module in found if isinstance(module, nn.Module)]


class CLHATrainer(RankedLoaders, ReportingTrainer):
    """Trains a causal language model on ranked responses, with any objective of `clha_fast.objectives.OBJECTIVES`.

    What `Trainer` computes as ``model(**batch).logits`` and a loss over them is one call of `linear_loss` inside
    the output embedding. Logs carry `rank_loss`, `sft_loss`, `rewards/accuracies`, `rewards/margins`, `logps/chosen`,
    `logps/rejected`, `kept_pair_share`, `active_pair_share`, `open_gate_share`, `kendall_tau`, `num_tokens` and
    `inert_candidates` (the last two are counts since the last log line), and what the objective reports of its own;
    evaluation the same under `eval_`, pooled
    over all of its batches and processes, and `eval_loss` = `eval_rank_loss` + `eval_sft_loss`, the loss of the whole
    set as one batch, however it is split.

    Args:
        model: a causal language model from transformers, or the folder or name of one, which is loaded.
        args: a `CLHAConfig`.
        train_dataset, eval_dataset: a `RankedDataset`, any list or `datasets.Dataset` of rows in a known format (they
            are tokenised once, at construction), a stream of such rows (`datasets.IterableDataset` or any other
            iterable dataset, tokenised as it comes; training needs `max_steps`, see
            `clha_fast.training.datasets.as_dataset`), or for evaluation a dictionary of them.
        processing_class: the tokenizer; needed unless `data_collator` is given.
        data_collator: returns `CandidateBatch.as_dict()`; a `RankedCollator` from `args` by default.
        peft_config: a configuration of peft's, such as `LoraConfig`: the model gets that adapter, and only it trains.
        ref_model: the frozen model that the objective compares with, where it does; it is put into evaluation mode.
            None leaves it to `CLHAConfig.reference`.
        **kwargs: as `Trainer`; `compute_loss_func`, `compute_metrics` and `preprocess_logits_for_metrics` are refused,
            since no logits exist for them.

    Attributes:
        reference: where reference log-probabilities come from; its `kind` is None where the objective reads none.
        dataset_names: for the model card, set by whoever knows them.
        largest_batch: the training batch with the most scored tokens so far, of the last call of `train`.
        layout: of the batches' rows, `padded`, `packed` or `shared`: what `CLHAConfig.layout` came to.

    Raises:
        ValueError: one of these; more than one GPU in one process (`nn.DataParallel`): use torchrun.
        UnsupportedHeadError: the model's head cannot be fused.
        UnsupportedLayoutError: the model does not compute rows of `CLHAConfig.layout` as it computes candidates alone.
        CheckpointError: a checkpoint could not be written; the one before it is intact.
    """

    # Each micro-batch's loss is a mean of its own, so Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False
    # True of a class with a collator of its own, which reads the limits of `args` elsewhere.
    _collates = False
    _fill_scale: float = 1
    # As `Trainer` sets it for the model at hand; before transformers 5.20 none is.
    is_distributed_loading_by_transformers = False

    def __init__(
        self,
        model: nn.Module | str,
        args: CLHAConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
        peft_config: Any = None,
        ref_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, CLHAConfig, kwargs, NO_LOGITS, "no logits exist that it could be given")
        check_fsdp(args)
        model, processing_class = as_model(model, args, processing_class, data_collator is not None)
        self.loss_options = args.loss_options()
        held_out = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        given = [part for part in (train_dataset, *held_out) if part is not None]
        others = data_collator is not None and not isinstance(data_collator, RankedCollator)
        if not self._collates:
            check_reach(args, data_collator)
        self.reference = Reference(args, self.loss_options, model, ref_model, peft_config, [] if others else given)
        eval_collator = data_collator
        if data_collator is None:
            data_collator = self._make_collator(processing_class, args, args.drop_inert)
            eval_collator = self._make_collator(processing_class, args, args.eval_drop_inert)
            eval_collator.said = data_collator.said  # both of the same records, more often than not
        self.eval_collator = eval_collator
        frozen = self.reference.take(model, ref_model, processing_class)
        if peft_config is not None:
            set_seed(args.seed)  # as Trainer does later: the adapter's first weights are drawn here
            model = with_adapter(model, peft_config)
        if args.disable_dropout:
            without_dropout(model)
        say_what_is_left_out(model)
        # Before any wrapper of the trainer's own: its hooks would stand in the probe's way.
        inner = base_model(model)
        sequence = sequence_of(args, inner)
        budget = None if args.workspace_mb is None else args.workspace_mb << 20
        with whole_weights(inner, *_embeddings_of(inner)):
            self.head_info = measure_head(inner, args.backend)
            self.head_options = self.head_info.options(
                args.temperature, workspace_bytes=budget, max_dropped_mass=args.max_dropped_mass
            )
            measured = args.measured_options()
            self._forward = CandidateForward(
                inner,
                self.head_info,
                self.head_options,
                measured,
                args.backend,  # type: ignore[arg-type]
                sequence,
            )
        tile_mlps(inner, args.tiled_mlp)  # type: ignore[arg-type]  # config has made it a number or a switch
        self.reference.hold(model, frozen, budget, sequence)
        if isinstance(processing_class, PreTrainedTokenizerBase) and len(processing_class) > self.head_info.vocab_size:
            raise ValueError(
                f"processing_class: expected a tokenizer of at most the {self.head_info.vocab_size} tokens that the "
                f"model's head scores, got {len(processing_class)}; resize_token_embeddings makes room"
            )
        self._train_metrics = RunningMetrics(measured)
        # An evaluation's batches are given the counts of the whole of it, so their terms are summed.
        self._eval_metrics = RunningMetrics(measured, summed=True)
        self._step_counts: dict[str, Tensor] | None = None
        self._eval_counts: dict[str, Tensor] | None = None
        self.largest_batch: CandidateBatch | None = None
        self._silent = True  # no batch here so far had a response on which the loss depends
        self._asked = False  # whether all processes were asked
        self._took_steps = False
        self.dataset_names = []
        self._counted = weakref.WeakKeyDictionary()
        config: Any = getattr(model, "config", None)
        caches = getattr(config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=as_dataset(train_dataset, data_collator, args, training=True),
            eval_dataset=(
                {name: as_dataset(part, eval_collator, args, training=False) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else as_dataset(eval_dataset, eval_collator, args, training=False)
            ),
            processing_class=processing_class,
            **kwargs,
        )
        if caches is not None and not args.use_cache:
            # `Trainer` turns it off in what is saved; each forward of training and evaluation here does without anyway.
            config.use_cache = caches
        self._dtypes = Dtypes(self.model)
        self._check_wrappers()
        if frozen is not None and getattr(frozen, "hf_device_map", None) is None:
            frozen.to(args.device)
        logps = LogpForward(inner, self.head_info, self.head_options, args.backend, sequence)  # type: ignore[arg-type]
        self._layouts = RowLayouts(inner, logps, inner)
        self.layout = settle_layout(
            asked_layout(args, self.data_collator),
            [self._layouts, *self.reference.layouts],
            self.accelerator,
            self.train_dataset,
            self.loss_options,
            [data_collator, eval_collator],
        )
        models = [part for part in (model, self.reference.own_model) if part is not None]
        multiple = 1
        if isinstance(data_collator, RankedCollator) and data_collator.layout == "padded":
            multiple = data_collator.pad_to_multiple_of or 1
        self._row_limits = [RowLimit(part, multiple) for part in models]
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, dataset in {"train_dataset": self.train_dataset, **evaluated}.items():
            check_signals(dataset, name, self.loss_options, self.reference.kind)
            for limit in self._row_limits:
                limit.check_dataset(dataset, name)
        check_trains(self.train_dataset, self.loss_options, args, self._data_processes)
        say_other_rewards(self.train_dataset, evaluated)

    def _check_wrappers(self) -> None:
        """ValueError for what would be ignored, or end in an error far from its cause."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes != self.accelerator.num_processes:
            raise ValueError(
                f"args: expected settings under which accelerate finds the {processes} processes there are, got "
                f"{self.accelerator.num_processes} (each would train alone and write the same files); without a GPU "
                "use_cpu=True, and under DeepSpeed PartialState(backend='gloo') first, see docs/trainer.md"
            )
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        if sharded and not self.is_distributed_loading_by_transformers:
            raise ValueError(
                "model: expected one that is whole, or sharded by from_pretrained(distributed_config=...), got DTensor "
                "weights of somebody else's (fully_shard, parallelize_module), which Trainer would wrap again; give "
                "the whole model and fsdp=True, or attach it in a loop of your own (examples/fsdp2_loop.py)"
            )

    def _make_collator(self, tokenizer: Any, args: CLHAConfig, drop_inert: bool) -> RankedCollator:
        if tokenizer is None:
            raise ValueError("processing_class: expected a tokenizer (or a data_collator), got None")
        return RankedCollator(
            tokenizer,
            self.loss_options,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            drop_inert=drop_inert,
            pad_to_multiple_of=args.pad_to_multiple_of,
            signals=self.reference.carried(self.loss_options),
        )

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; with `return_outputs` also a dictionary with its `CLHAMetrics`."""
        batch = CandidateBatch.from_dict(inputs)
        counts = self._step_counts if model.training else None
        # Trainer and wrappers take the mean over all micro-batches, those that hold nothing but fill among them.
        scale = self._fill_scale if model.training else 1
        if counts is not None:
            # The terms of all micro-batches and processes sum to the loss; Trainer and wrappers take means of them.
            scale = self.current_gradient_accumulation_steps * self._data_processes
        loss, metrics = self._loss(model, batch, counts, scale)
        if model.training:
            calls = getattr(self, "current_gradient_accumulation_steps", 1)
            self._train_metrics.add(metrics, batch.num_inert, scale, calls)
            self._silent &= batch.num_inert == batch.candidate_lengths.numel()
            self._note_shape(batch)
        return (loss, {"metrics": metrics}) if return_outputs else loss

    def _loss(
        self, model: nn.Module, batch: CandidateBatch, counts: dict[str, Tensor] | None = None, scale: float = 1
    ) -> tuple[Tensor, CLHAMetrics]:
        for limit in self._row_limits:
            limit.check_rows(batch.segments, batch.input_ids.shape[1])
        if batch.candidates_per_prompt.shape[0]:
            check_chains(batch.chains, self.loss_options)
        check_dropped(vars(batch), self.loss_options)
        batch = self._layouts.taken(batch)
        tensors = {**batch.loss_inputs(), **(counts or {})}
        if self.reference.frozen is not None:
            if batch.reference_logps is not None:
                raise ValueError(
                    f"reference_logps: expected none in a batch beside {self.reference.text}, which says them, got "
                    "some; reference='file' takes those of the batch"
                )
            with self.accelerator.autocast():
                tensors["reference_logps"] = self.reference.frozen(batch)
        found = self._forward(model, batch.model_inputs(), tensors, scale=scale)
        return found.loss, found.metrics

    def _note_shape(self, batch: CandidateBatch) -> None:
        size = batch.targets.numel()
        if self.largest_batch is None or size > self.largest_batch.targets.numel():
            self.largest_batch = batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimiser step, without fill; with `normalizer="global"` also their counts."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._fill_scale = 1
        if samples:
            size = samples[-1]["candidates_per_prompt"].numel()
            own = self._own_of_last(size, self._sharing)
            if own is not None:
                part = first_prompts(CandidateBatch.from_dict(samples[-1]), own)
                samples[-1] = {**samples[-1], **part.as_dict()}
            calls = len(samples) * self._data_processes
            empty = self._empty_of_last(size, self._sharing)
            self._fill_scale = calls / (calls - empty) if empty else 1
        self._count_step(samples, device)
        return samples, items

    def _count_step(self, samples: list[Any], device: torch.device) -> None:
        """That there is a step, and what the loss of its micro-batches divides by."""
        self._took_steps |= bool(samples)
        self._step_counts = None
        if self.args.normalizer == "global" and samples:
            parts = [CandidateBatch.from_dict(sample) for sample in samples]
            sizes = torch.cat([part.candidates_per_prompt for part in parts])
            most = int(sizes.max()) if len(sizes) else 1  # all may be fill here
            if self.accelerator.num_processes > 1:
                most = int(self.accelerator.gather(torch.tensor([most], device=device)).max())
            counts = local_counts(parts, self.loss_options, most).to(device)
            self._step_counts = step_counts(self._sum_over_processes(counts), self.loss_options)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`."""
        if self.is_deepspeed_enabled and self.deepspeed is not None and self.optimizer is None:
            raise ValueError(
                "train: expected no evaluation before it under DeepSpeed, whose engine is built for one or the other, "
                "got one; eval_on_start=True evaluates the untrained model"
            )
        self._dtypes.check(self.args, self.model)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model: expected parameters to train, got none that requires a gradient; an adapter that was loaded "
                "trains with is_trainable=True"
            )
        self._took_steps = False
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if resumed is True:
            resumed = last_checkpoint(self.args.output_dir)
        if isinstance(resumed, (str, os.PathLike)):
            self.reference.check(os.fspath(resumed))
        try:
            found = super().train(*args, **kwargs)
        finally:  # a loss that is asked for afterwards is of its own batch
            self._step_counts, self._fill_scale = None, 1
        step, most = self.state.global_step, self.state.max_steps
        if not self._took_steps:
            why = f"the run that was resumed is finished, at step {step} of {most}" if step else "no step was asked for"
            logger.warning(f"train: nothing was trained; {why}")
        return found

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        self._took_steps = False
        self.largest_batch = None
        self._train_metrics.reset()

    def _write_more(self, checkpoint: str) -> None:
        self.reference.write(checkpoint)

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """Loss and metrics of one evaluation batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        batch = CandidateBatch.from_dict(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            own = self._own_prompts(batch, inputs.get("num_fill", 0))
            if own:
                # The last batch was filled up with prompts seen before; they must not count twice.
                batch = first_prompts(batch, own)
            # Also where none is its own: the model may be spread over the processes, which all have to take part.
            loss, metrics = self._loss(model, batch, self._eval_counts)
        if own == 0:
            return loss, None, None
        self._eval_metrics.add(metrics, batch.num_inert)
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer`, with the pooled metrics of the loss."""
        if self.is_fsdp_enabled and not self.is_in_train and not self.accelerator._models:
            raise ValueError(
                "evaluate: expected a model that training has begun to shard, under FSDP, got one as it was given; "
                "eval_on_start=True evaluates the untrained model"
            )
        self._eval_metrics.reset()
        self._eval_counts = step_counts(self._counts_of(dataloader), self.loss_options)
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        finally:
            self._eval_counts = None
        reshard(self.model)
        metrics = self._eval_metrics.take(self._sum_over_processes, self.args.device)
        if metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            output.metrics[f"{metric_key_prefix}_loss"] = metrics["rank_loss"] + metrics["sft_loss"]
        return output

    def _set_signature_columns_if_needed(self) -> None:
        # Should someone set remove_unused_columns: what the collator reads, not what the model's forward takes.
        if self._signature_columns is None:
            self._signature_columns = COLUMNS.split()

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`; a training line also gets the metrics of the steps since the last one."""
        if "loss" in logs:
            metrics = self._train_metrics.take(self._sum_over_processes, self.args.device)
            logs.update(metrics or {}, **self._skipped_records())
            if metrics is not None and not self._asked:
                self._asked = True
                spoke = torch.tensor(float(not self._silent), device=self.args.device)
                if self._sum_over_processes(spoke) == 0:  # a stream: other data are looked at before
                    hint = self.loss_options.silence_hint(several=True)
                    logger.warning(f"train_dataset: the loss has depended on no response so far; {hint}")
        self._place_events()
        super().log(logs, start_time)
