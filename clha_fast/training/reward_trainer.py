"""A reward model from ranked responses: transformers' Trainer with the Bradley-Terry loss of all pairs of a prompt."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments, set_seed

from clha_fast.batching.sampling import LengthSampler
from clha_fast.batching.segments import check_layout
from clha_fast.data.records import SKIPS, RecordError
from clha_fast.files import write_json
from clha_fast.layout import accumulate
from clha_fast.models.adapters import base_model, with_adapter
from clha_fast.objectives.pairs import COMPARED, wins
from clha_fast.rewards.joined import JOINED_FIELDS, JoinedRewards
from clha_fast.rewards.reward_model import BLANK, REWARD_FILE, RewardModel
from clha_fast.rewards.rows import padded_rewards, read_as_text
from clha_fast.training.checkpoints import CheckpointingTrainer
from clha_fast.training.layout import COUNTED, padded_for_noise, probe_layout
from clha_fast.training.reward_data import PairCollator, PairedDataset, PairedPrompt, first_pairs
from clha_fast.training.switches import idle_settings, say_idle
from clha_fast.training.validation import (
    NO_LOGITS,
    SPEEDS,
    Dtypes,
    check_arguments,
    check_best_metric,
    check_loading,
    check_machine,
    check_numbers,
    check_schedule,
    sampling_strategy,
    say_what_is_left_out,
    settle_best_metric,
)

METRICS = ("loss", "rewards/accuracies", "rewards/margins")
# Columns of what an evaluation gathers for each prompt.
_CORRECT, _MARGIN, _LOSS, _PAIRS = range(4)


@dataclass
class RewardConfig(TrainingArguments):
    """`TrainingArguments` (a batch counts prompts, each with all its responses) and these fields.

    Args:
        max_length: tokens of prompt and response, cut as `RankedCollator` does; None takes the model's and the
            tokenizer's limit. It is saved with the tokenizer: scoring cuts to the same length.
        pad_to_multiple_of: rows are padded to a multiple of it.
        dataset_num_proc: processes that tokenise; None and 1 are the training process itself.
        skip_bad_records: leave malformed records out and count them, instead of stopping at the first.
        layout: of the rows that the model runs, as `CLHAConfig.layout`: `padded`, `packed`, `shared` or `auto`.

    Raises:
        ValueError: a value outside its choices, or a setting that `RewardTrainer` does not carry.
    """

    max_length: int | None = field(default=None, metadata={"help": "Tokens of prompt and response."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Rows are padded to it."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    skip_bad_records: bool = field(default=False, metadata={"help": "Leave malformed records out."})
    layout: str = field(default="padded", metadata={"help": "padded, packed, shared or auto."})

    # As in CLHAConfig: columns are not the forward's arguments, and a NaN loss must be seen.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses in logs."})
    max_tokens_per_batch = None  # no field: what `check_loading` asks for

    def __post_init__(self) -> None:
        check_numbers(self)
        idle = idle_settings(vars(self), type(self))
        settle_best_metric(self)
        super().__post_init__()
        check_machine(self)
        check_loading(self)
        check_schedule(self)
        for name in ("max_length", "pad_to_multiple_of", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        check_layout(self.layout, "auto")
        if self.torch_compile and self.layout != "padded":
            raise ValueError(
                f"layout: expected padded with torch_compile in the training of a reward model, got {self.layout!r}"
            )
        sharded = bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        for name, given in (
            ("fsdp", sharded),
            ("deepspeed", bool(self.deepspeed)),
            ("use_liger_kernel", self.use_liger_kernel),
            ("label_smoothing_factor", bool(self.label_smoothing_factor)),
            ("batch_eval_metrics", self.batch_eval_metrics),
        ):
            if given:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected none in the training of a reward model, got {got!r}")
        say_idle(self, idle)


def bradley_terry(rewards: Tensor, better: Tensor, worse: Tensor, pairs_per_prompt: Tensor) -> Tensor:
    """Each prompt's mean over its pairs of -log sigmoid(r_better - r_worse).

    Args:
        rewards: [C], floating. better, worse: int64 [pairs], positions in `rewards`, prompt after prompt.
        pairs_per_prompt: int64 [P], each at least 1.

    Returns:
        [P], in the dtype of `rewards`, with a graph.
    """
    return _prompt_means(-F.logsigmoid(rewards[better] - rewards[worse]), pairs_per_prompt)


def _wins(rewards: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """As `pairs.wins` [pairs], in the dtype of the rewards, which are compared as all are."""
    compared = rewards.to(COMPARED)
    return wins(compared[better] - compared[worse]).to(rewards.dtype)


def _prompt_means(values: Tensor, pairs_per_prompt: Tensor) -> Tensor:
    return _prompt_sums(values, pairs_per_prompt) / pairs_per_prompt


def _prompt_sums(values: Tensor, pairs_per_prompt: Tensor) -> Tensor:
    prompts = torch.arange(len(pairs_per_prompt), device=values.device)
    owner = torch.repeat_interleave(prompts, pairs_per_prompt, output_size=len(values))
    sums = values.new_zeros(len(pairs_per_prompt))
    accumulate(sums, owner, values)
    return sums


class RewardTrainer(CheckpointingTrainer):
    """Trains a sequence classifier with one label so that better responses get the higher logit.

    The loss is the mean over prompts of `bradley_terry`, over all prompts of an optimiser step, however it is split;
    each response runs once. Logs carry `rewards/accuracies` (pairs whose better response has the higher reward, equal
    rewards half) and `rewards/margins` (the mean of r_better - r_worse); evaluation the same under `eval_`, pooled over
    all pairs.

    Rows are tokenised, padded and read as `clha_fast.rewards.scoring` does it, and what that depends on is saved with
    the model, in its folder and in checkpoints: the padding token, `tokenizer.model_max_length`, where the tokenizer
    had no EOS token, its SEP token as such, and in `reward_model.json` whether responses begin with a blank.

    Args:
        model: a sequence classifier from transformers. args: a `RewardConfig`.
        train_dataset, eval_dataset: a `PairedDataset`, or rows in a known format.
        processing_class: the tokenizer; it is changed as above.
        peft_config: a configuration of peft's with task_type SEQ_CLS: only that adapter trains, with the head.
        **kwargs: as `Trainer`; `data_collator`, `compute_loss_func`, `compute_metrics` and
            `preprocess_logits_for_metrics` are refused.

    Attributes:
        layout: of the batches' rows, `padded`, `packed` or `shared`: what `RewardConfig.layout` came to.

    Raises:
        ValueError: one of these; what `RewardModel` refuses; a tokenizer without EOS and SEP; a limit beyond the
            model's positions; a model that reads padding as text; more than one GPU in one process.
        UnsupportedLayoutError: the model does not compute rows of `RewardConfig.layout` as it computes responses alone.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: RewardConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, RewardConfig, kwargs, ("data_collator", *NO_LOGITS), "the trainer has its own")
        parts = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
        check_best_metric(args.metric_for_best_model, [part + name for part in parts for name in (*METRICS, *SPEEDS)])
        if processing_class is None:
            raise ValueError("processing_class: expected the model's tokenizer, got None")
        tokenizer = processing_class
        self._pad = prepare(model, tokenizer, args.max_length)
        train_dataset = as_pairs(train_dataset, tokenizer, args, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: as_pairs(rows, tokenizer, args, name) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = as_pairs(eval_dataset, tokenizer, args, "eval_dataset")
        if peft_config is not None:
            set_seed(args.seed)  # as Trainer does later: the adapter's first weights are drawn here
            model = with_adapter(model, peft_config)
        self._seen: Tensor | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(self._pad, args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=_metrics,
            **kwargs,
        )
        self._dtypes = Dtypes(self.model)
        say_what_is_left_out(self.model)
        self._check_padding(tokenizer)
        self._joined = JoinedRewards(self.model, self._pad)
        data = self.train_dataset
        tokens = data.count_tokens(COUNTED) if args.layout == "auto" and isinstance(data, PairedDataset) else None
        self.layout = probe_layout(padded_for_noise(args), [self._joined], self.accelerator, tokens)
        collator: Any = self.data_collator
        collator.layout = self.layout

    def _check_padding(self, tokenizer: PreTrainedTokenizerBase) -> None:
        dataset = self.train_dataset
        if not isinstance(dataset, PairedDataset):
            return
        # Two prompts will do: whether a model heeds the mask does not depend on the text.
        rows = [row for index in {0, len(dataset) - 1} for row in dataset[index].rows]
        longer, shorter = max(rows, key=len), min(rows, key=len)
        if len(shorter) == len(longer):
            return
        model: Any = self.model
        shown = read_as_text(RewardModel(model, tokenizer).score_tokens, model, longer, shorter)
        if shown:
            raise ValueError(
                f"model: expected one that leaves padding out, got {type(base_model(model)).__name__}, which reads it "
                f"as text ({shown})"
            )

    def _rewards(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        if "segments" in inputs:
            return self._joined(model, {name: inputs[name] for name in JOINED_FIELDS})
        config = self.accelerator.unwrap_model(model).config
        return padded_rewards(model, config, inputs["input_ids"], inputs["attention_mask"], self._pad)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimiser step, and how many prompts they hold over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = self._own_of_last(len(samples[-1]["pairs_per_prompt"])) if samples else None
        if own is not None:
            samples[-1] = first_pairs(samples[-1], own)
        count = torch.tensor(sum(len(sample["pairs_per_prompt"]) for sample in samples), device=device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count[None]).sum()
        return samples, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's mean over prompts; with `return_outputs` also the rewards [C]."""
        rewards = self._rewards(model, inputs)
        better, worse, counts = (inputs[name] for name in ("better", "worse", "pairs_per_prompt"))
        losses = bradley_terry(rewards, better, worse, counts)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # gradients are means over processes
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        if model.training:
            lead = (rewards[better] - rewards[worse]).detach()
            seen = torch.stack([_wins(rewards.detach(), better, worse).sum(), lead.sum(), lead.new_tensor(len(lead))])
            self._seen = seen if self._seen is None else self._seen + seen
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """What the prompts of one evaluation batch add to the metrics, [P, 4], in the place of logits."""
        inputs = self._prepare_inputs(inputs)
        counts = inputs["pairs_per_prompt"]
        with torch.no_grad(), self.compute_loss_context_manager():
            rewards = self._rewards(model, inputs)
        lead = rewards[inputs["better"]] - rewards[inputs["worse"]]
        columns = [
            _prompt_sums(_wins(rewards, inputs["better"], inputs["worse"]), counts),
            _prompt_sums(lead, counts),
            _prompt_means(-F.logsigmoid(lead), counts),
            counts.to(lead.dtype),
        ]
        return None, torch.stack(columns, dim=1), counts

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`."""
        self._dtypes.check(self.args, self.model)
        return super().train(*args, **kwargs)

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        self._seen = None

    def _write_more(self, checkpoint: str) -> None:
        super()._write_more(checkpoint)
        self._describe(checkpoint)

    def _write_card(self, staging: str, folder: str) -> None:
        super()._write_card(staging, folder)
        self._describe(staging)

    def _describe(self, folder: str) -> None:
        """What scoring reads there beside configuration and tokenizer."""
        write_json(os.path.join(folder, REWARD_FILE), {BLANK: getattr(self.train_dataset, "blank", None)})

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer`; rows in a known format will do."""
        if not isinstance(eval_dataset, str):  # the name of one of the trainer's own
            eval_dataset = self._held_out(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `Trainer`; rows in a known format will do."""
        return super().get_test_dataloader(self._held_out(test_dataset, "test_dataset"))

    def _held_out(self, rows: Any, name: str) -> Any:
        other = isinstance(rows, torch.utils.data.Dataset) and not isinstance(rows, (PairedDataset, IterableDataset))
        if other and len(rows) and isinstance(rows[0], PairedPrompt):  # a part of a tokenised set
            return rows
        tokenizer: Any = self.processing_class
        args: Any = self.args
        return as_pairs(rows, tokenizer, args, name)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if sampling_strategy(self.args) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(dataset.lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`; a training line also gets the metrics of the steps since the last one.

        Raises:
            ValueError: the loss is not finite.
        """
        if "loss" in logs and self._seen is not None:
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"learning_rate: expected one at which the loss stays finite, got {self.args.learning_rate:g} (the "
                    f"loss is {logs['loss']} at step {self.state.global_step})"
                )
            correct, margin, pairs = self.accelerator.reduce(self._seen, reduction="sum").tolist()
            logs.update({"rewards/accuracies": correct / pairs, "rewards/margins": margin / pairs})
            self._seen = None
        super().log(logs, start_time)


def _table(predictions: Any) -> np.ndarray:
    """float64 [P, 4], of all batches: without `eval_do_concat_batches` Trainer has a list, an array for each."""
    parts = predictions if isinstance(predictions, (list, tuple)) else [predictions]
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])


def prompt_results(predictions: Any) -> tuple[list[float], list[int]]:
    """(correct pairs, pairs) of each prompt, of what `RewardTrainer.predict` gives as predictions."""
    table = _table(predictions)
    return table[:, _CORRECT].tolist(), [int(count) for count in table[:, _PAIRS]]


def _metrics(found: EvalPrediction) -> dict[str, float]:
    table = _table(found.predictions)
    wrong = int((~np.isfinite(table)).any(axis=1).sum())
    if wrong:
        raise ValueError(f"model: expected finite rewards, got others for {wrong:,} of {len(table):,} held-out prompts")
    pairs = table[:, _PAIRS].sum()
    values = (table[:, _LOSS].mean(), table[:, _CORRECT].sum() / pairs, table[:, _MARGIN].sum() / pairs)
    return dict(zip(METRICS, map(float, values), strict=True))


def as_pairs(rows: Any, tokenizer: PreTrainedTokenizerBase, args: RewardConfig, name: str) -> Any:
    """Rows in a known format, called `name`, become a `PairedDataset`, cut to the tokenizer's limit; one stays.

    Raises:
        ValueError: as `PairedDataset`; one with rows beyond `max_length`; a path. RecordError: as `PairedDataset`.
    """
    if isinstance(rows, (str, os.PathLike)):
        raise ValueError(
            f"{name}: expected rows, such as clha_fast.data.read_records gives for a file, got the path "
            f"{os.fspath(rows)!r}"
        )
    if isinstance(rows, PairedDataset) and args.max_length is not None and max(rows.lengths) > args.max_length:
        raise ValueError(
            f"max_length: expected at least the {max(rows.lengths)} tokens of the longest row of {name}, which "
            f"is tokenised and is not cut any more, got {args.max_length}; give records"
        )
    if rows is None or isinstance(rows, PairedDataset):
        return rows
    skipped: list[Any] | None = [] if args.skip_bad_records else None
    try:
        return PairedDataset(rows, tokenizer, reward_limit(tokenizer), args.dataset_num_proc, skipped, name)
    except RecordError as error:
        raise error if skipped is not None else error.advised(SKIPS) from None


def reward_limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokens that rows are cut to: what `prepare` has written into the tokenizer."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None


def prepare(model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """Settle in configuration and tokenizer what scoring reads there: end, padding, length. Returns the padding token.

    The padding token, of both, is the configuration's where that is a special token of the tokenizer's, else the
    tokenizer's PAD, else EOS: classifiers on decoders then read a response at the token before its end, in training and
    in scoring.

    Raises:
        ValueError: as `RewardTrainer`.
    """
    if tokenizer.eos_token_id is None:
        if tokenizer.sep_token is None:
            raise ValueError(
                "tokenizer: expected one with an EOS or SEP token, which closes every response, got neither; set "
                "tokenizer.eos_token, save the tokenizer and give it"
            )
        tokenizer.eos_token = tokenizer.sep_token
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels != 1:
        raise ValueError(
            "model: expected a sequence classifier with one label (AutoModelForSequenceClassification with "
            f"num_labels=1), got {type(model).__name__} with {labels}"
        )
    reward_model = RewardModel(model, tokenizer)
    limit = reward_model.max_positions
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length: expected at most the model's {limit} positions, got {max_length}")
    length = reward_model.default_max_length if max_length is None else max_length
    if length is not None:
        tokenizer.model_max_length = length
    config: Any = reward_model.model.config
    text = config.get_text_config()
    pad: Any = getattr(text, "pad_token_id", None)
    if pad not in tokenizer.all_special_ids:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # `Trainer` would take the tokenizer's over into the configuration, in the middle of training.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config.pad_token_id = text.pad_token_id = pad
    return int(pad)
