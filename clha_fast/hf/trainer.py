"""transformers' Trainer with the CLHA loss in the output embedding's place: no logits in training or evaluation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from clha_fast.batch import CandidateBatch
from clha_fast.functional import linear_clha_loss
from clha_fast.hf.checkpoint import WRITING, publish, publish_files, rotate, writing
from clha_fast.hf.collator import RankedCollator
from clha_fast.hf.config import CLHAConfig
from clha_fast.hf.dataloaders import RankedLoaders
from clha_fast.hf.heads import cache_flags, fused_head, inspect_head
from clha_fast.hf.hooks import through_hooks
from clha_fast.hf.normalizer import GlobalCounts, first_prompts, local_counts
from clha_fast.hf.stream import as_dataset
from clha_fast.metrics import METRIC_NAMES, CLHAMetrics

TRAINER_STATE = "trainer_state.json"
# What a collator reads of a tokenised record, or of a row in one of the known formats.
COLUMNS = (
    "prompt_ids completion_ids source prompt completions rewards ranks sft_index chosen rejected score_chosen "
    "score_rejected prefix suffix reward query responses scores answers instruction fill"
)


def wait_for_everyone() -> None:
    """A barrier where there are several processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


class _Running:
    """Metrics added up over calls, and over processes when read."""

    def __init__(self) -> None:
        self.total: CLHAMetrics | None = None
        self.inert = self.calls = 0

    def add(self, metrics: CLHAMetrics, inert: int, loss_scale: float = 1.0) -> None:
        values = metrics.values.detach().clone()
        values[:2] *= loss_scale  # rank_loss and sft_loss, as the loss itself is scaled
        plain = CLHAMetrics(values, metrics.scores[:0])
        self.total = plain if self.total is None else CLHAMetrics.merge([self.total, plain])
        self.inert += inert
        self.calls += 1

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float] | None:
        """The metrics' dictionary with `inert_candidates`, and an empty accumulator again."""
        total, inert, calls = self.total, self.inert, self.calls
        self.__init__()  # type: ignore[misc]
        values = torch.zeros(len(METRIC_NAMES), device=device) if total is None else total.values.to(device)
        counts = torch.tensor([inert, calls], dtype=torch.float64, device=device)
        values, counts = reduce(values), reduce(counts)
        inert, calls = int(counts[0]), int(counts[1])
        if not calls:
            return None
        return {**CLHAMetrics(values, values[:0], calls).as_dict(), "inert_candidates": float(inert)}


class CLHATrainer(RankedLoaders):
    """Trains a causal language model on ranked responses.

    What `Trainer` computes as ``model(**batch).logits`` and a loss over them is one call of `linear_clha_loss` inside
    the output embedding. Logs carry `rank_loss`, `sft_loss`, `rewards/accuracies`, `rewards/margins`, `logps/chosen`,
    `logps/rejected`, `kept_pair_share`, `active_pair_share`, `open_gate_share`, `kendall_tau`, `num_tokens` and
    `inert_candidates` (the last two are counts since the last log line); evaluation the same under `eval_`, pooled
    over all of its batches and processes, and `eval_loss` = `eval_rank_loss` + `eval_sft_loss`, a mean over batches.

    Args:
        model: a causal language model from transformers.
        args: a `CLHAConfig`.
        train_dataset, eval_dataset: a `RankedDataset`, any list or `datasets.Dataset` of rows in a known format (they
            are tokenised once, at construction), a stream of such rows (`datasets.IterableDataset` or any other
            iterable dataset, tokenised as it comes; training needs `max_steps`, see
            `clha_fast.hf.stream.as_dataset`), or for evaluation a dictionary of them.
        processing_class: the tokenizer; needed unless `data_collator` is given.
        data_collator: returns `CandidateBatch.as_dict()`; a `RankedCollator` from `args` by default.
        **kwargs: as `Trainer`; `compute_loss_func`, `compute_metrics` and `preprocess_logits_for_metrics` are refused,
            since no logits exist for them.

    Raises:
        ValueError: one of these; more than one GPU in one process (`nn.DataParallel`): use torchrun.
        UnsupportedHeadError: the model's head cannot be fused.
        CheckpointError: a checkpoint could not be written; the one before it is intact.
    """

    # Each micro-batch's loss is a mean of its own, so Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: CLHAConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, CLHAConfig):
            raise ValueError(f"args: expected a CLHAConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU a process, got {args.n_gpu} (nn.DataParallel copies the model, not its head); "
                "start one process a GPU with torchrun or accelerate launch"
            )
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected None (no logits exist that it could be given), got a function")
        self.loss_options = args.loss_options()
        eval_collator = data_collator
        if data_collator is None:
            data_collator = self._make_collator(processing_class, args, args.drop_inert)
            eval_collator = self._make_collator(processing_class, args, args.eval_drop_inert)
        self.eval_collator = eval_collator
        # Before any wrapper: sharded weights and hooks would stand in the probe's way.
        self.head_info = inspect_head(model)
        budget = None if args.workspace_mb is None else args.workspace_mb << 20
        self.head_options = self.head_info.options(args.temperature, workspace_bytes=budget)
        self._model_flags = cache_flags(model)
        self._train_metrics, self._eval_metrics = _Running(), _Running()
        self._step_counts: GlobalCounts | None = None
        self._staging: str | None = None
        self.largest_batch: CandidateBatch | None = None
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
        loss, metrics = self._loss(model, batch, counts)
        scale = 1
        if counts is not None:
            # The terms of all micro-batches and processes sum to the loss; Trainer and wrappers take means of them.
            scale = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * scale
        if model.training:
            self._train_metrics.add(metrics, batch.num_inert, scale)
            self._note_shape(batch)
        return (loss, {"metrics": metrics}) if return_outputs else loss

    def _loss(self, model: nn.Module, batch: CandidateBatch, counts: GlobalCounts | None) -> tuple[Tensor, CLHAMetrics]:
        normalizers = {} if counts is None else {"pair_counts": counts.pairs, "prompt_count": counts.prompts}

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, CLHAMetrics]:
            return linear_clha_loss(
                hidden,
                weight,
                bias=bias,
                head=self.head_options,
                options=self.loss_options,
                backend=self.args.backend,
                **batch.loss_inputs(),  # type: ignore[arg-type]
                **normalizers,
            )

        inner = self.accelerator.unwrap_model(model)
        with fused_head(inner, compute, self.head_info) as head, through_hooks(self.head_info.module, head):
            outputs = model(**batch.model_inputs(), **self._model_flags)
        loss: Tensor = outputs.logits
        auxiliary = getattr(outputs, "aux_loss", None)  # a mixture of experts that was asked for router logits
        if auxiliary is not None:
            loss = loss + inner.config.router_aux_loss_coef * auxiliary.to(loss.device)
        return loss, head.result[1]

    def _note_shape(self, batch: CandidateBatch) -> None:
        size = batch.targets.numel()
        if self.largest_batch is None or size > self.largest_batch.targets.numel():
            self.largest_batch = batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimiser step; with `normalizer="global"` also their counts over all processes."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_counts = None
        if self.args.normalizer == "global" and samples:
            parts = [CandidateBatch.from_dict(sample) for sample in samples]
            most = max(int(part.candidates_per_prompt.max()) for part in parts)
            if self.accelerator.num_processes > 1:
                most = int(self.accelerator.gather(torch.tensor([most], device=device)).max())
            counts = local_counts(parts, self.loss_options, most).to(device)
            self._step_counts = GlobalCounts.of(self._sum_over_processes(counts))
        return samples, items

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum") if self.accelerator.num_processes > 1 else values

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
            loss, metrics = self._loss(model, batch, None)
            own = self._own_prompts(batch, inputs.get("num_fill", 0))
            if own == 0:
                return loss, None, None
            if own is not None:
                # The last batch was filled up with prompts seen before; they must not count twice.
                batch = first_prompts(batch, own)
                loss, metrics = self._loss(model, batch, None)
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
        self._eval_metrics = _Running()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
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
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything is written to a folder beside the checkpoints, which is renamed when it is complete."""
        folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        final = os.path.join(folder, name)
        with self._one_writes(folder, name) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            wait_for_everyone()
            if self.args.should_save:
                self._name_best(folder)
                self.state.save_to_json(os.path.join(staging, name, TRAINER_STATE))
                publish(os.path.join(staging, name), final)
        wait_for_everyone()
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _name_best(self, folder: str) -> None:
        """`Trainer` looked for the best checkpoint in the staging folder; give its final name."""
        best = self.state.best_global_step
        if best:
            path = os.path.join(folder, f"checkpoint-{best}")
            if best == self.state.global_step or os.path.isdir(path):
                self.state.best_model_checkpoint = path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`, but files appear complete or not at all."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        with self._one_writes(folder, f"the model in {folder}") as staging:
            super().save_model(staging, _internal_call=True)
            wait_for_everyone()
            if self.args.should_save:
                publish_files(staging, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextlib.contextmanager
    def _one_writes(self, folder: str, name: str) -> Iterator[str]:
        """The staging folder: made and removed by the writing process, shared by all."""
        wait_for_everyone()
        if self.args.should_save:
            with writing(folder, name) as staging:
                wait_for_everyone()
                yield staging
        else:
            wait_for_everyone()
            yield os.path.join(folder, WRITING)
