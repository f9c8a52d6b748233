"""Settings of a training run: transformers' TrainingArguments and the loss's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from clha_fast.batching.segments import check_layout
from clha_fast.batching.signals import signals_of
from clha_fast.models.tiled import check_rows
from clha_fast.objectives import Objective
from clha_fast.objectives.clha import CLHAOptions, Preset
from clha_fast.ops.dispatch import BACKENDS
from clha_fast.options import HeadOptions
from clha_fast.training.objective import CLHA_FIELDS, DEFAULT, as_mapping, make, settle
from clha_fast.training.sequence import check_sequence
from clha_fast.training.switches import idle_settings, say_idle
from clha_fast.training.trl_names import TRLNames, settle_names
from clha_fast.training.validation import (
    check_loading,
    check_machine,
    check_numbers,
    check_schedule,
    settle_best_metric,
)

_PRESET = {"help": "Of CLHA. None: as the preset says."}


@dataclass
class CLHAConfig(TRLNames, TrainingArguments):
    """`TrainingArguments` (a batch counts prompts, each with all its candidates) and these fields.

    Args:
        objective: the loss: a name of `clha_fast.objectives.OBJECTIVES`, or a mapping with the name and settings of its
            class, `{"name": "pro", "form": "paper"}`; an object of such a class is taken, too, and turned into that.
        reference: where the log-probabilities of a frozen model come from, for an objective that reads them. "file":
            the records' `reference_logps`; "adapter": the model with its adapter switched off; "copy": a frozen copy of
            the model as it is at the start; or a folder or name of a model to load. None takes, where the objective
            needs them, the file's if the first record has them, else the adapter's if there is one, else a copy's.
        preset: of CLHA: "published", "paper" or "sft_only"; the nine fields after it override it one by one, None does
            not. None of them is taken beside another objective.
        margin, reward_margin, noise_rule, reduction, rank_weight, sft, sft_weight, sft_factor, reward_floor: see
            `CLHAOptions`.
        normalizer: what the means of the loss divide by. "batch": the kept pairs and prompts of each micro-batch on
            each process, then the mean over gradient accumulation and processes. "global": those of the whole
            optimiser step, so the result does not depend on how it is split.
        backend: "auto", "triton", "workspace", "torch" or "reference".
        temperature: divisor of the logits.
        max_length, max_prompt_length, max_completion_length: tokens, see `RankedCollator`; None is no limit.
        pad_to_multiple_of: rows are padded to a multiple of it.
        layout: of the rows that the model runs. "padded": one a candidate; "packed": all candidates of a micro-batch in
            one, nothing padded; "shared": a prompt once, before all of its candidates. The last two are probed on the
            model, and refused where it does not compute them as it computes each candidate alone. "auto": shared where
            the probe passes and the tokens are a tenth fewer, else padded; it is said which. See docs/long-inputs.md.
        sequence_parallel_size: so many processes are given the same batches, and each holds a slice of every row's
            tokens (Ulysses, see `models.sequence_parallel`). It divides the number of processes; groups of so many are
            data parallel.
        max_tokens_per_batch: tokens that run (of padded rows, rows times the longest) of a training micro-batch on each
            process, in `per_device_train_batch_size`'s place: as many whole prompts of like length as fit, see
            `batching.sampling.TokenBudgetSampler`. Micro-batches then hold different numbers of prompts, which
            normalizer="global" weighs alike.
        dataset_num_proc: processes that tokenise; None and 1 are the training process itself.
        skip_bad_records: leave malformed records out and count them, instead of stopping at the first.
        workspace_mb: memory in MiB that logits may take at a time; None chooses, see `HeadOptions`.
        max_dropped_mass: softmax mass that each token's gradient may leave out, see `HeadOptions`; None for exact ones.
        log_token_statistics: logs `entropy`, of the softmax at each token in nats, and `mean_token_accuracy`, the share
            of tokens that are the model's first choice, means over scored tokens, in evaluation too. The pass that
            makes log-probabilities sums them up; on GPUs CLHA's ranking then runs in torch instead of its kernels.
        tiled_mlp: MLPs run so many tokens at a time, True chooses: the same gradients, less memory, see `models.tiled`.
        drop_inert: candidates that neither loss nor gradients depend on do not run through the model in training.
        eval_drop_inert: the same in evaluation; by default all run there, since Kendall's tau counts them all.
        eval_samples: after an evaluation, this many of the first held-out prompts are answered, and the answers written
            to `samples.jsonl` in the output folder. eval_sample_tokens: at most so many tokens each.
            eval_sample_temperature: 0 is greedy. Training goes on as if there had been none.
        loss_type: TRL's name of an objective, "sigmoid" (dpo), "hinge" or "ipo". beta: of an objective that has one.
        truncation_mode: TRL's way to cut, taken where `max_length` is None and nothing is cut.
        disable_dropout: every dropout of the model is 0. pad_token: what the tokenizer pads with.
        model_init_kwargs: for `from_pretrained`, where the trainer is given a model's folder or name; a model that
            `reference` names is loaded with the same.
        greater_is_better: of `metric_for_best_model`; None is what the metric means (an NLL is better when it is less),
            and is refused where it means neither, as the entropy.

    Raises:
        ValueError: a value outside its choices, fp16 on a CPU, a reporter or DeepSpeed that is not installed, a setting
            that this trainer does not carry (Liger's kernels, label smoothing, batches dispatched by one process).
    """

    # Whether no other objective than the default one is taken.
    one_objective: ClassVar[bool] = False
    # A text of these is JSON.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012 - not a field

    # In this order transformers' HfArgumentParser takes a text, as for fields of its own that are mappings.
    objective: dict[str, Any] | str | None = field(default=DEFAULT, metadata={"help": "A name, or JSON with settings."})
    reference: str | None = field(default=None, metadata={"help": "file, adapter, copy, or a model's folder or name."})
    preset: Preset = field(default="published", metadata={"help": "Of CLHA: published, paper or sft_only."})
    margin: float | None = field(default=None, metadata=_PRESET)
    reward_margin: float | None = field(default=None, metadata=_PRESET)
    noise_rule: str | None = field(default=None, metadata=_PRESET)
    reduction: str | None = field(default=None, metadata=_PRESET)
    rank_weight: float | None = field(default=None, metadata=_PRESET)
    sft: str | None = field(default=None, metadata=_PRESET)
    sft_weight: float | None = field(default=None, metadata=_PRESET)
    sft_factor: str | None = field(default=None, metadata=_PRESET)
    reward_floor: float | None = field(default=None, metadata=_PRESET)
    normalizer: str = field(default="batch", metadata={"help": "batch or global."})
    backend: str = field(default="auto", metadata={"help": "auto, triton, workspace, torch or reference."})
    temperature: float = field(default=1.0, metadata={"help": "Divisor of the logits."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of prompt and response."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Tokens, cut on the left."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Tokens, cut on the right."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Rows are padded to it."})
    layout: str = field(default="padded", metadata={"help": "padded, packed, shared or auto."})
    sequence_parallel_size: int = field(default=1, metadata={"help": "Processes that share each row's tokens."})
    max_tokens_per_batch: int | None = field(default=None, metadata={"help": "Tokens that run, a micro-batch."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    skip_bad_records: bool = field(default=False, metadata={"help": "Leave malformed records out."})
    workspace_mb: int | None = field(default=None, metadata={"help": "MiB for logits."})
    max_dropped_mass: float | None = field(default=None, metadata={"help": "Mass gradients may leave out."})
    log_token_statistics: bool = field(default=False, metadata={"help": "Log entropy and mean_token_accuracy."})
    tiled_mlp: bool | str = field(default=False, metadata={"help": "MLPs a tile of tokens at a time: true, or tokens."})
    drop_inert: bool = field(default=True, metadata={"help": "Inert candidates skip the model in training."})
    eval_drop_inert: bool = field(default=False, metadata={"help": "The same in evaluation."})
    eval_samples: int = field(default=0, metadata={"help": "Held-out prompts to answer at evaluation."})
    eval_sample_tokens: int = field(default=64, metadata={"help": "Tokens of such an answer, at most."})
    eval_sample_temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})

    # Where TrainingArguments' own default would be wrong here: columns are not the forward's arguments, and a NaN loss
    # must be seen.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses in logs."})

    def __post_init__(self) -> None:
        check_numbers(self)
        idle = idle_settings(vars(self), type(self))
        settle_names(self)
        settle(self)
        settle_best_metric(self, self.loss_options().metric_names)
        super().__post_init__()
        check_machine(self)
        objective = self.loss_options()
        if self.reference is not None and "reference_logps" not in signals_of(objective):
            raise ValueError(
                f"reference: expected None with the objective {objective.name!r}, which reads no reference "
                f"log-probabilities, got {self.reference!r}"
            )
        _choice("normalizer", self.normalizer, ("batch", "global"))
        _choice("backend", self.backend, BACKENDS)
        check_layout(self.layout, "auto")
        check_sequence(self)
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise ValueError(f"workspace_mb: expected a positive number of MiB, got {self.workspace_mb}")
        HeadOptions(max_dropped_mass=self.max_dropped_mass)
        wanted = self.measured_options().wanted
        if self.max_dropped_mass is not None and wanted:
            asks = "log_token_statistics" if self.log_token_statistics else f"the objective {objective.name!r}"
            raise ValueError(
                f"max_dropped_mass: expected None beside token statistics, got {self.max_dropped_mass}, and {asks} "
                f"asks for {', '.join(wanted)}; leave out one of the two"
            )
        self.tiled_mlp = check_rows(self.tiled_mlp)  # type: ignore[assignment]
        for name in ("max_tokens_per_batch", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        check_loading(self)
        check_schedule(self)
        for name, least in (("eval_samples", 0), ("eval_sample_tokens", 1), ("eval_sample_temperature", 0.0)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel: expected False (it replaces the head that is fused here), got True")
        if self.label_smoothing_factor:
            got = self.label_smoothing_factor
            raise ValueError(f"label_smoothing_factor: expected 0 (the loss has no smoothed form), got {got}")
        say_idle(self, idle)

    def loss_options(self) -> Objective:
        """The objective; CLHA's is the preset with the fields that are not None."""
        settings = as_mapping(self.objective)
        if settings["name"] != DEFAULT:
            return make(settings)
        changes: dict[str, Any] = {name: getattr(self, name) for name in CLHA_FIELDS}
        return CLHAOptions.preset(self.preset).replace(
            **{name: value for name, value in changes.items() if value is not None}
        )

    def measured_options(self) -> Objective:
        """`loss_options` with all metrics that are logged, those of `log_token_statistics` among them."""
        options = self.loss_options()
        return options.watched() if self.log_token_statistics else options


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
