"""A Trainer whose checkpoints appear complete or not at all, under every wrapper that can be resumed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from clha_fast.batching.sampling import start_epoch
from clha_fast.files import WRITING, publish, publish_files, rotate, writing
from clha_fast.messages import nearest
from clha_fast.models.wrapped import unwrap
from clha_fast.training.restoring import load_renamed
from clha_fast.training.shares import empty_shares, own_prompts, prompts_drawn

TRAINER_STATE = "trainer_state.json"
DDP_TYPES = [kind for kind in DistributedType if kind.name.startswith("MULTI_")]


def wait_for_everyone() -> None:
    """A barrier where there are several processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


class CheckpointingTrainer(Trainer):
    """`Trainer`, writing to a folder beside the final one that is renamed once every process has written its part.

    Attributes:
        restored_step: whose weights the model has, where not the last step's (load_best_model_at_end); else None.
    """

    _staging: str | None = None
    restored_step: int | None = None
    _loaded: str = ""  # the checkpoint whose weights the model has got, for this setting:
    _loaded_by: str = "resume_from_checkpoint"
    _began_at: str | None = None  # the checkpoint that each attempt of `auto_find_batch_size` begins with
    _written: tuple[str, ...] = ()  # checkpoints of this attempt
    _drawn: int | None = None  # prompts of the epoch, where its last batches are filled up
    _failed: tuple[str, ...] = ()  # those of attempts before, until this one has a checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # In the order given, whatever training does: a last batch's fill, and predictions, are known by their places.
        if not hasattr(eval_dataset, "__len__") or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything is written to a folder beside the checkpoints, which is renamed when it is complete."""
        folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        final = os.path.join(folder, name)
        self._finish_current_push()  # an upload of the folder must not meet the staging folder
        with self._one_writes(folder, name) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self._sharded_states() and self.args.should_save:
                # `Trainer` leaves out what a new process needs to build the same model.
                path = os.path.join(staging, name)
                self.accelerator.unwrap_model(self.model).config.save_pretrained(path)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(path)
            wait_for_everyone()
            self._name_best(folder)  # each process reads it at the end
            if self.args.should_save:
                self._write_more(os.path.join(staging, name))
                self.state.save_to_json(os.path.join(staging, name, TRAINER_STATE))
                publish(os.path.join(staging, name), final)
        wait_for_everyone()
        if self.args.should_save:
            self._forget_failed(final)
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint, final, self._began_at)
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _forget_failed(self, written: str) -> None:
        """A checkpoint has appeared: those of attempts that ran out of memory go.

        Their steps are of other batches. Resuming would take the one of most steps for the last one, rotation would
        keep it in the place of this attempt's, and a step at which this attempt only evaluates could be found there.
        """
        for path in self._failed:
            if path != written:
                shutil.rmtree(path, ignore_errors=True)
        self._failed, self._written = (), (*self._written, written)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer`, over the whole set, and over the one that is asked for.

        Raises:
            ValueError: a name that no set has.
        """
        self._check_set(eval_dataset)
        with self._whole_set():
            if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
                return super().get_eval_dataloader(eval_dataset)
            # `Trainer` keeps persistent workers under one name, and would measure its own set in another one's place.
            return super().get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `Trainer`, over the whole set."""
        with self._whole_set():
            return super().get_test_dataloader(test_dataset)

    def _check_set(self, dataset: Any) -> None:
        """ValueError for a text that is not the name of one of the trainer's own evaluation sets."""
        known = list(self.eval_dataset) if isinstance(self.eval_dataset, Mapping) else []
        if isinstance(dataset, str) and dataset not in known:
            names = (
                f"a name of the trainer's own sets ({', '.join(map(repr, known))})" if known else "None, the own set"
            )
            raise ValueError(
                f"eval_dataset: expected {names}, or rows, such as clha_fast.data.read_records gives for a file, got "
                f"{dataset!r}{nearest(dataset, known)}"
            )

    @contextlib.contextmanager
    def _whole_set(self) -> Iterator[None]:
        """Loaders made inside leave no batch out: `dataloader_drop_last` is for steps of training, all of one size."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`."""
        self.restored_step = None
        self._written = self._failed = ()
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loaded, self._loaded_by = resume_from_checkpoint, "resume_from_checkpoint"
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._loaded, self._loaded_by = self.state.best_model_checkpoint, "load_best_model_at_end"
        super()._load_best_model()
        best = self.state.best_global_step
        self.restored_step = best if best and best != self.state.global_step else None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not load_renamed(unwrap(self.model), self._loaded, load_result.missing_keys, self._loaded_by):
            super()._issue_warnings_after_load(load_result)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer`; after `load_best_model_at_end` the metrics name the step whose weights are back.

        Training draws afterwards what it draws without: a pass of a loader takes a seed, and a run that is resumed from
        before an evaluation does not make it again.
        """
        with self._unprepared(), torch.random.fork_rng(devices=[]):
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        found.metrics.update(self._restored(metric_key_prefix))
        return found

    def _restored(self, prefix: str) -> dict[str, int]:
        """What an evaluation's metrics say of `restored_step`; {} of the last step's weights."""
        return {} if self.restored_step is None else {f"{prefix}_step": self.restored_step}

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        *others: Any,
        **more: Any,
    ) -> Any:
        # Once a call of `train`, and once more, with a smaller batch, where `auto_find_batch_size` ran out of memory.
        self._failed, self._written = (*self._failed, *self._written), ()
        self._began_at = resume_from_checkpoint if self.args.auto_find_batch_size else None
        self._begin(resume_from_checkpoint)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *others, **more)

    def _begin(self, checkpoint: str | None) -> None:
        """Forget what steps of an earlier call, or of an attempt that failed, have left and no log line has had.

        Args:
            checkpoint: the folder that training is resumed from.
        """

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        # A checkpoint of the last step inside an epoch: `Trainer` would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        start_epoch(train_dataloader, epoch)
        self._drawn = prompts_drawn(train_dataloader)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _own_of_last(self, size: int, sharing: int = 1) -> int | None:
        """How many of the training batch that was read last, of `size` prompts, are not fill; None: all of them.

        Args:
            sharing: processes that are given the same batch.
        """
        if self._drawn is None or not self.accelerator.gradient_state.end_of_dataloader:
            return None
        own = own_prompts(
            self._drawn, size, self.args.process_index // sharing, self.accelerator.num_processes // sharing
        )
        return None if own == size else own

    def _empty_of_last(self, size: int, sharing: int = 1) -> int:
        """How many of the processes' batches that were read last hold nothing but fill; arguments as `_own_of_last`."""
        if self._drawn is None or not self.accelerator.gradient_state.end_of_dataloader:
            return 0
        return empty_shares(self._drawn, size, self.accelerator.num_processes // sharing)

    @contextlib.contextmanager
    def _unprepared(self) -> Iterator[None]:
        """Takes back what an evaluation before training does to the model.

        `Trainer` has accelerate prepare it without a wrapper then; accelerate marks it as prepared, and training would
        get it back as it is: no DistributedDataParallel, every process trains a model of its own.
        """
        data_parallel = (
            self.accelerator.distributed_type in DDP_TYPES and not self.is_distributed_loading_by_transformers
        )
        if self.is_in_train or self.accelerator._models or not data_parallel:
            yield
            return
        model: Any = self.model
        forward = vars(model).get("forward")
        yield
        self.accelerator._models.clear()
        self.model_wrapped = model
        for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
            vars(model).pop(name, None)
        if forward is not None:
            model.forward = forward

    def _sharded_states(self) -> bool:
        return self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer asks for it while the files are still in the staging folder, which is about to be renamed.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, folder: str) -> None:
        """`Trainer` looked for the best checkpoint in the staging folder; give its final name."""
        best = self.state.best_global_step
        if best:
            path = os.path.join(folder, f"checkpoint-{best}")
            if best == self.state.global_step or (os.path.isdir(path) and path not in self._failed):
                self.state.best_model_checkpoint = path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`, but files appear complete or not at all, and the model card is among them."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        self._finish_current_push()
        with self._one_writes(folder, f"the model in {folder}") as staging:
            super().save_model(staging, _internal_call=True)
            if self._sharded_states():
                # `Trainer` keeps shards for its checkpoints and would leave the model out here.
                self._save(staging, state_dict=self.accelerator.get_state_dict(self.model))
            wait_for_everyone()
            if self.args.should_save:
                self._write_card(staging, folder)
                publish_files(staging, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_more(self, checkpoint: str) -> None:
        """Put what else a resumed run has to know into a checkpoint that is being written."""

    def _write_card(self, staging: str, folder: str) -> None:
        """Put what else belongs to the model in `folder` into `staging`."""

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
