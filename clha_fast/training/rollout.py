"""RLHF with a rollout step: the policy answers prompts, a reward judges, clipped policy gradients update."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PredictionOutput

from clha_fast.batching.batch import CandidateBatch, CandidateFeature, HostSizes, pack_candidates
from clha_fast.batching.segments import SegmentGroup, Segments
from clha_fast.data.prompts import Prompted
from clha_fast.data.records import RecordError
from clha_fast.generation.backend import EncodedPrompt, GenerationSettings, answer_text, cut_answer, read_answer
from clha_fast.generation.decoding import Decoding, Tried
from clha_fast.generation.prompts import own_ends
from clha_fast.models.adapters import base_model
from clha_fast.models.dropout import without_dropout
from clha_fast.models.forward import LogpForward
from clha_fast.models.loading import config_positions
from clha_fast.models.positions import positions_of
from clha_fast.objectives.policy import PolicyOptions
from clha_fast.rewards.answers import AnswerRewards
from clha_fast.training.config import CLHAConfig
from clha_fast.training.judged import Answered, checked_rewards
from clha_fast.training.prompt_data import PromptDataset, collate_numbers
from clha_fast.training.trainer import CLHATrainer
from clha_fast.training.validation import sampling_strategy

# Rewards of the answers to each prompt, from the prompts' records and the answers' texts.
Reward = Callable[[Sequence[Prompted], Sequence[Sequence[str]]], list[list[float]]]
METRICS = ("reward", "answer_tokens", "unfinished_share", "empty_share")
GROUP_METRICS = ("reward_std", "equal_rewards_share")  # of several answers to a prompt
_WAITING_FILE = "rollout.pt"


@dataclass
class RolloutConfig(CLHAConfig):
    """`CLHAConfig` for `RolloutTrainer`; a batch counts prompts, each with all its answers.

    Args:
        objective: "policy", or a mapping with the settings of `PolicyOptions`; advantages are those of the group.
            With `kl_weight` the reference is a frozen copy of the model as it is at the start, unless `reference`
            names another.
        answers_per_prompt: sampled from the policy at `temperature`, from all of its distribution.
        rollout_steps: optimiser steps on the answers of one rollout. With 1 the policy that is updated is the one that
            sampled, and nothing is clipped.
        max_prompt_length, max_completion_length: tokens of a prompt and of an answer.
        per_device_eval_batch_size: answers that are sampled, or judged, at a time.
        eval_samples: of an evaluation's answers the first so many are lines of `samples.jsonl`, with their rewards.

    Raises:
        ValueError: as `CLHAConfig`; fewer than two answers a prompt; a setting that has no meaning here.
    """

    one_objective: ClassVar[bool] = True
    objective: dict[str, Any] | str | None = field(default="policy", metadata={"help": "policy, or with settings."})
    normalizer: str = field(default="global", metadata={"help": "batch or global."})
    max_prompt_length: int | None = field(default=384, metadata={"help": "Tokens, cut on the left."})
    max_completion_length: int | None = field(default=128, metadata={"help": "Tokens of an answer."})
    answers_per_prompt: int = field(default=4, metadata={"help": "Sampled from the policy."})
    rollout_steps: int = field(default=1, metadata={"help": "Optimiser steps on one rollout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.loss_options()
        if not isinstance(options, PolicyOptions) or options.advantages != "group":
            raise ValueError(f"objective: expected policy with the advantages of the group, got {self.objective!r}")
        for name, least in (("answers_per_prompt", 2), ("rollout_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {getattr(self, name)}")
        if self.max_completion_length is None:
            raise ValueError("max_completion_length: expected a number of tokens, at which an answer ends, got None")
        if self.reference == "file":
            raise ValueError("reference: expected copy, adapter or a model for answers that are sampled, got 'file'")
        for name, none in _NOTHING.items():
            if getattr(self, name) != none:
                raise ValueError(f"{name}: expected {none!r} where answers are sampled, got {getattr(self, name)!r}")
        if sampling_strategy(self) == "group_by_length":
            raise ValueError("train_sampling_strategy: expected random or sequential, got 'group_by_length'")
        if self.fsdp or self.deepspeed or self.world_size > 1:
            raise ValueError(
                "args: expected one process without FSDP or DeepSpeed (this loop is a small one; TRL's GRPOTrainer is "
                f"for many), got {self.world_size} process{'es' if self.world_size > 1 else ''}"
            )


_NOTHING: dict[str, Any] = {
    "max_length": None,
    "max_tokens_per_batch": None,
    "dataset_num_proc": None,
    "eval_sample_tokens": CLHAConfig.eval_sample_tokens,
    "eval_sample_temperature": CLHAConfig.eval_sample_temperature,
    "eval_drop_inert": False,
    "truncation_mode": None,
    "batch_eval_metrics": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "neftune_noise_alpha": None,  # a ratio of policies would measure the noise
}


class RolloutTrainer(CLHATrainer):
    """Trains a causal language model on answers of its own: GRPO and its kin, in one process.

    Every `rollout_steps` optimiser steps the policy, as it then is, answers the prompts of those steps
    (`answers_per_prompt` each), `reward` judges the answers, and `PolicyOptions` makes advantages of them within each
    prompt. The log-probabilities of the policy that sampled, one a token, are computed by the very forward that trains.
    Dropout is switched off, for the ratio of both would measure it.

    Logs carry `reward` (the mean over answers), `answer_tokens`, `unfinished_share` (answers that reached
    `max_completion_length`), `empty_share`, and what `reward` has in an attribute `metrics` after a call, a mapping of
    numbers; evaluation the same under `eval_`, of one greedy answer a prompt. Of the several answers to a prompt in
    training there is also `reward_std`, the mean over prompts of their rewards' standard deviation, and
    `equal_rewards_share`, prompts whose answers all have one reward: these train nothing.
    A resumed run gives the very weights of an uninterrupted one: draws depend on `seed`, step and place alone, and a
    checkpoint holds the answers that still wait.

    Args:
        model, args, processing_class, peft_config, ref_model, **kwargs: as `CLHATrainer`; `args` a `RolloutConfig`.
        reward: from records and texts of answers, see `rewards.answers.AnswerRewards`; or a function of your own.
        lead: what prompts of messages end with, as in `GenerationSettings`; None is as a server asks, for responses
            beside a prompt play no part.
        answer_prefix: what every answer begins with, no part of it (`generation.prompts.trained_prefix`).
        train_dataset, eval_dataset: records, or rows with a prompt (`data.prompts.read_prompts` reads a file), whose
            other columns (a solution, say) `reward` finds in the record's `extra`; evaluation sets may have names, in a
            mapping.

    Raises:
        ValueError: as `CLHATrainer`; rewards of another number than the answers', or not finite; a model whose forward
            draws something in training (a router's jitter), which a ratio of policies would measure; one that reads
            padding as text, with `per_device_eval_batch_size` above 1; one whose answers, with its cache and without,
            are drawn from other distributions than those of the forward that trains.
    """

    _collates = True
    control: Any

    def __init__(
        self,
        model: nn.Module | str,
        args: RolloutConfig,
        reward: Reward,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        lead: str | None = None,
        answer_prefix: str = "",
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, RolloutConfig):
            raise ValueError(f"args: expected a RolloutConfig, got {type(args).__name__}")
        if processing_class is None:
            raise ValueError("processing_class: expected the model's tokenizer, got None")
        assert args.max_completion_length is not None
        settings = GenerationSettings(
            args.max_completion_length, args.max_prompt_length, seed=args.seed, lead=lead, answer_prefix=answer_prefix
        )
        positions = config_positions(model) if isinstance(model, str) else positions_of(model)
        self._read = functools.partial(
            PromptDataset,
            tokenizer=processing_class,
            settings=settings,
            positions=positions,
            skip_bad_records=args.skip_bad_records,
            judge=reward.read if isinstance(reward, AnswerRewards) else None,
        )
        train = self._read(train_dataset, name="train_dataset") if train_dataset else None
        held_out: Any = None
        if isinstance(eval_dataset, Mapping):
            held_out = {name: self._read(rows, name=name) for name, rows in eval_dataset.items()}
        elif eval_dataset:
            held_out = self._read(eval_dataset, name="eval_dataset")
        self.reward = reward
        self._draws: bool | None = None
        self._sampling = Decoding("per_device_eval_batch_size", trained=True)
        self._waiting: list[list[dict[str, Any]]] = []
        self._to_skip = 0
        self._attempted = False  # whether this call of `train` has begun before
        self._rollouts: list[dict[str, float]] = []
        super().__init__(
            model,
            args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing_class,
            data_collator=collate_numbers,
            **kwargs,
        )
        without_dropout(self.model)
        backend: Any = args.backend
        self._logps = LogpForward(base_model(self.model), self.head_info, self.head_options, backend)

    # ---- rollouts ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `CLHATrainer`; what an earlier call sampled and did not train on is forgotten."""
        self._attempted = False
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not os.path.isfile(os.path.join(resume_from_checkpoint, _WAITING_FILE)):
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint of RolloutTrainer, with {_WAITING_FILE} (the answers "
                f"that wait), got {os.fspath(resume_from_checkpoint)!r} without it; to begin a new run with its "
                "weights, load the model from there and train without resume_from_checkpoint"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        self._waiting, self._to_skip, self._rollouts = [], 0, []
        if checkpoint is not None:
            known: list[Any] = [HostSizes, Segments, SegmentGroup, Tried]  # beside a batch's tensors
            with torch.serialization.safe_globals(known):
                found = torch.load(os.path.join(checkpoint, _WAITING_FILE), weights_only=True)
            self._rollouts, self._sampling.tried = found["rollouts"], found.get("decoding", {})
            if not self._attempted:  # a second attempt has smaller batches, and samples for them anew
                self._waiting, self._to_skip = found["waiting"], len(found["waiting"])
        self._attempted = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimiser step; the first step of a rollout answers the prompts of all."""

        def draw() -> list[Any]:
            return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)[0]

        for _ in range(self._to_skip):  # prompts of the answers that came with a checkpoint
            draw()
        self._to_skip = 0
        if not self._waiting:
            drawn = (draw() for _ in range(self.args.rollout_steps))
            self._waiting = self._rollout([step for step in drawn if step])
        samples = self._waiting.pop(0) if self._waiting else []
        self._count_step(samples, device)
        return samples, None

    def _rollout(self, steps: Sequence[Sequence[dict[str, Tensor]]]) -> list[list[dict[str, Any]]]:
        """The micro-batches of these steps' prompts, answered by the policy as it is."""
        batches = [batch["prompts"].tolist() for step in steps for batch in step]
        numbers = [number for batch in batches for number in batch]
        if not numbers:
            return []
        found = self._answer(self.train_dataset, numbers, self.args.answers_per_prompt, self.args.temperature)
        self._rollouts.append(found.metrics)
        features = iter(found.features)
        packed = iter([self._pack([next(features) for _ in batch]) for batch in batches])
        return [[next(packed) for _ in step] for step in steps]

    def _pack(self, features: list[CandidateFeature]) -> dict[str, Any]:
        """A micro-batch with `old_logps`, on the CPU."""
        batch = pack_candidates(
            features,
            pad_token_id=self._pad,
            objective=self.loss_options,
            drop_inert=self.args.drop_inert,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            layout="padded" if self._layouts.layout == "padded" else self.layout,
        )
        here = self._layouts.taken(CandidateBatch.from_dict(self._prepare_inputs(batch.as_dict())))
        before = self._random_state()
        logps = self._old_logps(here)
        if self.model.training and self._draws is None:
            # Some draw and do nothing with it.
            drew = not torch.equal(before, self._random_state())
            self._draws = drew and not torch.equal(logps, self._old_logps(here))
            if self._draws:
                raise ValueError(
                    "model: expected one whose forward draws nothing in training, for the ratio of policies would "
                    f"measure it, got {type(base_model(self.model)).__name__}, which does; set what draws to 0 in its "
                    "configuration before it is loaded (router_jitter_noise, say)"
                )
        return dataclasses.replace(batch, old_logps=logps.float().cpu()).as_dict()

    def _old_logps(self, batch: CandidateBatch) -> Tensor:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._logps(self.model, batch.model_inputs(), batch.targets, batch.row_index)

    def _random_state(self) -> Tensor:
        device: Any = self.args.device
        own = torch.get_rng_state()
        return torch.cat([own, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else own

    @property
    def _pad(self) -> int:
        tokenizer: Any = self.processing_class
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def _answer(self, dataset: PromptDataset, numbers: Sequence[int], count: int, temperature: float) -> Answered:
        """`count` answers to each of these prompts, judged; of no temperature greedy ones."""
        model: Any = self.accelerator.unwrap_model(self.model)
        prompts = [dataset.prompts[number] for number in numbers for _ in range(count)]
        places = [f"{self.args.seed} {self.state.global_step} {place}" for place in range(len(prompts))]
        seeds = [int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") >> 1 for place in places]
        training = model.training
        model.eval()
        tokens: list[list[int]] = []
        with self.compute_loss_context_manager():
            for start in range(0, len(prompts), self.args.eval_batch_size):
                part = slice(start, start + self.args.eval_batch_size)
                tokens += self._sample(model, prompts[part], seeds[part], dataset.settings.max_new_tokens, temperature)
        model.train(training)
        texts, finished = zip(*map(self._text, prompts, tokens), strict=True)
        grouped = [list(texts[start : start + count]) for start in range(0, len(texts), count)]
        records = [dataset.records[number] for number in numbers]
        rewards = self._judge(records, grouped)
        features: list[CandidateFeature] = [
            {
                "prompt_ids": prompts[place * count].ids,
                "completion_ids": tokens[place * count : (place + 1) * count],
                "rewards": own,
                "sft_index": 0,
                "source": record.source,
            }
            for place, (record, own) in enumerate(zip(records, rewards, strict=True))
        ]
        values: tuple[list[float], ...] = (
            [reward for own in rewards for reward in own],
            [float(len(row)) for row in tokens],
            [float(not end) for end in finished],
            [float(not text) for text in texts],
        )
        means = {name: sum(value) / len(tokens) for name, value in zip(METRICS, values, strict=True)}
        if count > 1:
            spreads = [statistics.stdev(own) for own in rewards]
            equal = sum(len(set(own)) == 1 for own in rewards)
            means |= zip(GROUP_METRICS, (sum(spreads) / len(rewards), equal / len(rewards)), strict=True)
        return Answered(features, {**means, **getattr(self.reward, "metrics", {})}, texts, finished)

    def _sample(
        self, model: Any, prompts: Sequence[EncodedPrompt], seeds: Sequence[int], length: int, temperature: float
    ) -> list[list[int]]:
        rows, stopped = [prompt.ids for prompt in prompts], None
        if any(prompt.stops for prompt in prompts):

            def stopped(row: int, new: list[int]) -> bool:
                return cut_answer(answer_text(new, self.processing_class), prompts[row].stops)[1]

        return self._sampling.answer(
            model,
            rows,
            ends=self._ends(prompts[0]),
            pad=self._pad,
            max_new_tokens=length,
            temperature=temperature,
            seeds=seeds,
            stopped=stopped,
        )

    def _ends(self, prompt: EncodedPrompt) -> list[int]:
        return sorted({*prompt.ends, *own_ends(self.accelerator.unwrap_model(self.model))})

    def _text(self, prompt: EncodedPrompt, tokens: Sequence[int]) -> tuple[str, bool]:
        """An answer's text as its reader gets it, and whether it has an end."""
        found = read_answer(tokens, self.processing_class, self._ends(prompt), prompt.stops)
        return found.text, found.finish == "stop"

    def _judge(self, records: Sequence[Prompted], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        try:
            given = self.reward(records, texts)
        except RecordError as error:
            place = f"step {self.state.global_step}: {error}"
            raise RecordError(place, source=error.source, field=error.field, has_way=error.has_way) from error
        return checked_rewards(given, records, texts, self.state.global_step)

    # ---- evaluation, checkpoints, logs ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """The rewards of one greedy answer a held-out prompt; also `rewards`, those of each prompt, not logged.

        Args:
            eval_dataset: None is the trainer's own; the name of one of these; or records or rows. Of several sets in a
                mapping each has its metrics under its name, and so has `rewards`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._check_set(dataset)
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, Mapping):
            found = {
                name: self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}") for name, rows in dataset.items()
            }
            rewards = {name: own.pop("rewards") for name, own in found.items()}
            return {**{name: value for own in found.values() for name, value in own.items()}, "rewards": rewards}
        metrics, own = self._measured(dataset, "eval_dataset", metric_key_prefix, keep=True)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return {**metrics, "rewards": own}

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As `evaluate`, of records or rows, and not logged; `predictions` are the prompts' rewards, float64 [P]."""
        metrics, rewards = self._measured(test_dataset, "test_dataset", metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(np.array(rewards, dtype=np.float64), None, metrics)

    def _measured(
        self, dataset: Any, name: str, prefix: str, keep: bool = False
    ) -> tuple[dict[str, float], list[float]]:
        """Metrics over one greedy answer a prompt, and the reward of each; `name` is the argument's.

        With `keep` some of the answers are written, once for a step.
        """
        if dataset is not None and not isinstance(dataset, PromptDataset):
            dataset = self._read(dataset, name=name)
        if not isinstance(dataset, PromptDataset):
            raise ValueError(f"{name}: expected prompts to answer, got none")
        answered = self._answer(dataset, range(len(dataset)), 1, 0.0)
        metrics = {f"{prefix}_{metric}": value for metric, value in answered.metrics.items()}
        metrics.update(self._restored(prefix))
        if keep and self.args.eval_samples and self._sampled_step != self.state.global_step:
            self._sampled_step = self.state.global_step
            self._keep_samples(answered.lines(self.args.eval_samples, self.state.global_step, self.processing_class))
        return metrics, answered.rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `CLHATrainer`; a training line also gets the means over the rollouts since the last one."""
        if "loss" in logs and self._rollouts:
            names = dict.fromkeys(name for part in self._rollouts for name in part)
            logs.update({name: sum(part[name] for part in self._rollouts) / len(self._rollouts) for name in names})
            self._rollouts = []
        super().log(logs, start_time)

    def _write_more(self, checkpoint: str) -> None:
        super()._write_more(checkpoint)
        state = {"waiting": self._waiting, "rollouts": self._rollouts, "decoding": self._sampling.tried}
        torch.save(state, os.path.join(checkpoint, _WAITING_FILE))
