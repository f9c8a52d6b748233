"""A Trainer that shows what it trained: samples at evaluation, and a model card."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from clha_fast.generation.decoding import Decoding
from clha_fast.models.sharding import reshard
from clha_fast.objectives import Objective
from clha_fast.training import card, samples
from clha_fast.training.checkpoints import TRAINER_STATE, CheckpointingTrainer
from clha_fast.training.reference import Reference
from clha_fast.training.validation import check_best_metric

logger = logging.get_logger(__name__)


class ReportingTrainer(CheckpointingTrainer):
    """`CheckpointingTrainer` with `samples.jsonl` and the card; the settings are a `CLHAConfig`.

    Attributes:
        dataset_names: for the card, set by whoever knows them.
        loss_options, reference, eval_collator: of the trainer that is built on it.
    """

    loss_options: Objective
    reference: Reference
    eval_collator: Any
    dataset_names: list[str]
    _sample_examples: tuple[Any, list[Any]] | None = None  # the set that was evaluated last, and its first prompts
    _sampled_step: int | None = None
    _decoding: Decoding | None = None
    _began: bool = False  # an attempt of this call of `train`

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer`; with `eval_samples` also what the model writes to the first prompts, once for a step."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.args.eval_samples and self._sampled_step != self.state.global_step:
            self._sampled_step = self.state.global_step
            # Of several sets transformers gives each one's name alone.
            named = isinstance(eval_dataset, str)
            given = self.eval_dataset[eval_dataset] if named else eval_dataset
            self._write_samples(self.eval_dataset if given is None else given)
        return metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`."""
        self._began = False
        return super().train(*args, **kwargs)

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        again, self._began = self._began, True
        if not self.args.eval_samples:
            return
        path = None if checkpoint is None else os.path.join(checkpoint, TRAINER_STATE)
        start = TrainerState.load_from_json(path).global_step if path and os.path.isfile(path) else 0
        # An attempt with smaller batches has other steps at the ends of its epochs, and would leave some lines there.
        # Those of an earlier call stay until others take their place.
        if again and self.is_world_process_zero():
            samples.forget(self.args.output_dir, start)
        if self._sampled_step is not None and self._sampled_step > start:
            self._sampled_step = None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        check_best_metric(self.args.metric_for_best_model, [name for name in metrics if name.startswith("eval_")])
        return super()._determine_best_metric(metrics, trial)

    def _place_events(self) -> None:
        """TensorBoard's events go below the output folder, also where something is logged before training begins."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(self.args.output_dir, "runs", f"{time.strftime('%b%d_%H-%M-%S')}")

    def _write_samples(self, dataset: Any) -> None:
        """Every process takes part, since the weights may be spread over them; the first one writes."""
        tokenizer = self.processing_class or getattr(self.eval_collator, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("processing_class: expected a tokenizer, which eval_samples needs, got None")
        if self._sample_examples is None or self._sample_examples[0] is not dataset:
            found = samples.first_prompts(dataset, self.args.eval_samples, self.eval_collator)
            self._sample_examples = dataset, found
        _, examples = self._sample_examples
        prompts = [list(example["prompt_ids"]) for example in examples]
        ends = samples.closing_tokens(examples, tokenizer, self.accelerator.unwrap_model(self.model))
        length, temperature = self.args.eval_sample_tokens, self.args.eval_sample_temperature
        self._decoding = self._decoding or Decoding()
        with self.compute_loss_context_manager():
            answers = samples.generate(
                self.model, prompts, tokenizer, ends, self.args.device, length, temperature, self._decoding
            )
        reshard(self.model)
        if not self.is_world_process_zero():
            return
        self._keep_samples(samples.describe(self.state.global_step, prompts, answers, ends, tokenizer))

    def _keep_samples(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Into `samples.jsonl`, the log and TensorBoard."""
        samples.write(self.args.output_dir, lines)
        text = "\n\n".join(f"{line['prompt']}\n> {line['completion']}" for line in lines)
        logger.info(f"step {self.state.global_step}, samples:\n{text}")
        for callback in self.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)  # TensorBoard's
            if writer is not None:
                writer.add_text("eval/samples", text, self.state.global_step)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """`README.md` in the output folder, from what the trainer knows; one that somebody else wrote is left alone.

        Args:
            as `Trainer`; `dataset` and `dataset_tags` are names beside `dataset_names`, `dataset_args` are not used.
        """
        if not self.is_world_process_zero():
            return
        folder = self.args.output_dir
        if not card.may_write(folder):
            logger.warning(f"{os.path.join(folder, card.CARD_FILE)} is not a card of clha-fast, it is left as it is")
            return
        names = [*self.dataset_names, *_list(dataset_tags), *_list(dataset)]
        text = self._card_text(
            model_name,
            finetuned_from,
            datasets=list(dict.fromkeys(names)),
            language=language,
            license=license,
            tags=_list(tags),
            **({"tasks": _list(tasks)} if tasks else {}),
        )
        card.write(folder, text)

    def _card_text(self, name: str | None = None, base_model: str | None = None, **more: Any) -> str:
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        path = getattr(config, "_name_or_path", "") or ""
        if base_model is None and path and not os.path.exists(path):
            base_model = path
        return card.model_card(
            name or os.path.basename(os.path.abspath(self.args.output_dir)),
            self.loss_options,
            self.args,
            self.state.log_history,
            base_model=base_model,
            library="peft" if hasattr(self.model, "peft_config") else "transformers",
            reference=None if self.reference.kind is None else self.reference.text,
            **{"datasets": self.dataset_names, **more},
        )

    def _write_card(self, staging: str, folder: str) -> None:
        path = os.path.join(staging, card.CARD_FILE)
        if card.may_write(folder):
            card.write(staging, self._card_text())
        elif os.path.exists(path):  # an adapter's own
            os.unlink(path)


def _list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
