"""`clha-fast train`: what it prints."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from clha_fast.cli.defaults import defaults_text
from clha_fast.cli.devices import backend_text, device_text, head_of_run, loss_dtype
from clha_fast.cli.options import collect, split
from clha_fast.cli.runs import (
    carry_out,
    few_text,
    folder_text,
    idle_line,
    layout_line,
    lead_line,
    model_text,
    print_answers,
    shared_text,
    skipped_line,
    template_line,
    write_page,
)
from clha_fast.evaluation import memory, plots
from clha_fast.evaluation import tables as report
from clha_fast.experiments.run import CURVE_FILE, METRICS_FILE, Run
from clha_fast.objectives import OBJECTIVES, CLHAOptions, Objective
from clha_fast.reports.data_summary import DataSummary, data_text, share_text
from clha_fast.training.config import CLHAConfig
from clha_fast.training.objective import DEFAULT, settings_of

TRAIN_HELP = """\
usage: clha-fast train [--config RUN.yaml] [--OPTION VALUE ...]

Options stand in the YAML file under the same names; flags win. `--model_config.hidden_size 128` sets one entry.

files     --train_file FILE  --eval_file FILE | --eval_fraction 0.1 (0: none)  --format auto  --rank_by_reward
          --columns.prompt question --columns.completions '[response_a, response_b]' --columns.rewards '[a, b]'
          (columns of other names; dots lead into nested ones)
          --skip_bad_records (leave malformed records out and say how many)
folder    --output_dir DIR  --resume | --overwrite
          (resume takes the same settings; to train further, --model OLD_DIR and a new folder)
model     --model PATH_OR_NAME, or --model_config.model_type llama --model_config.hidden_size 128 ...
          --dtype float32  --attn_implementation NAME
          --peft_config.r 8 --peft_config.target_modules '[q_proj, v_proj]' ... (LoRA, or peft_config.peft_type)
          --model_init_kwargs.quantization_config '{load_in_4bit: true}' (QLoRA) and whatever else from_pretrained takes
tokenizer --tokenizer PATH_OR_NAME, or --build_tokenizer.vocab_size 4096
loss      --objective NAME and its settings as --objective.SETTING VALUE (in YAML objective: {name: NAME, ...}):
          OBJECTIVES
          of clha also --preset published|paper|sft_only, and to override it --margin --reward_margin --noise_rule
          --reduction --rank_weight --sft --sft_weight --sft_factor --reward_floor
          --reference file|adapter|copy|MODEL (what an objective with reference log-probabilities compares with: the
          records' reference_logps, see clha-fast score --policy; the model without its adapter; a frozen copy of it; a
          model to load)
          --normalizer batch|global  --temperature  --backend auto|triton|workspace|torch|reference  --workspace_mb MIB
          --max_dropped_mass D (softmax mass that a token's gradient may leave out; none by default)
lengths   --max_length --max_prompt_length --max_completion_length (tokens)
          --max_tokens_per_batch (that run, padding among them, in per_device_train_batch_size's place)
          --layout padded|packed|shared|auto (a row a response; all in one row; a prompt once before its responses)
          --sequence_parallel_size N (under torchrun: so many processes share each row's tokens)
          --dataset_num_proc (processes that tokenise)
training  --learning_rate --num_train_epochs --max_steps --per_device_train_batch_size (prompts)
          --gradient_accumulation_steps --seed, and every other field of transformers' TrainingArguments
report    --memory_report (peak memory of the loss, beside the eager loss's)  --plot false
"""


def _help() -> str:
    lines = (
        " ".join((name, *(f"--objective.{key} {field.default}" for key, field in settings_of(name).items())))
        for name in OBJECTIVES
        if name != DEFAULT
    )
    text = TRAIN_HELP.replace("OBJECTIVES\n", "\n          ".join((f"{DEFAULT} (unless told)", *lines)) + "\n")
    return f"{text}\n{defaults_text()}"


def _loss_text(args: CLHAConfig, options: Objective) -> str:
    means = f"means over each {'micro-batch' if args.normalizer == 'batch' else 'optimiser step'}"
    if isinstance(options, CLHAOptions):
        return (
            f"{args.preset}: margin {options.margin:g}, reward margin {options.reward_margin:g} "
            f"({options.noise_rule}), {options.reduction}, SFT {options.sft} x {options.sft_weight:g}; {means}"
        )
    settings = ", ".join(f"{name} {getattr(options, name)}" for name in settings_of(options.name))
    return f"{options.name}{f': {settings}' if settings else ''}; {means}"


def _cut_text(dataset: Any, summary: DataSummary) -> str:
    """What the limits have cut; "" where they have cut nothing."""
    if not (dataset.cut_prompts or dataset.cut_completions):
        return ""
    run, name = (summary.candidates, "responses") if summary.chains is None else (summary.chains, "chains")
    return (
        f"; cut to the length limits: prompts {share_text(dataset.cut_prompts, summary.prompts)}, "
        f"{name} {share_text(dataset.cut_completions, run)}"
    )


def length_line(args: CLHAConfig, dataset: Any) -> dict[str, str]:
    """The row that needs most memory, where nothing cuts it; {} where something does."""
    if args.max_length is not None or None not in (args.max_prompt_length, args.max_completion_length):
        return {}
    longest = max(dataset.lengths)
    place = dataset[dataset.lengths.index(longest)]["source"]
    return {"lengths": f"no limit: the longest row has {longest:,} tokens ({place}); --max_length N cuts it to N"}


def header(run: Run) -> dict[str, str]:
    """What will be trained, on what, how: lines by their names."""
    trainer, args = run.trainer, run.args
    train, held_out, shared = run.summary()
    options = trainer.loss_options
    lines = {
        "model": f"{model_text(run)}, vocabulary {run.model.config.vocab_size:,}",
        "device": f"{device_text(args.device)}, {_processes_text(args)}",
        "backend": backend_text(
            args.backend,
            args.device,
            loss_dtype(run),
            spread=args.sequence_parallel_size > 1,
            **head_of_run(run),
        ),
        "loss": _loss_text(args, options),
        **({"reference": trainer.reference.text} if trainer.reference.kind is not None else {}),
        "training": data_text(train, options) + _cut_text(trainer.train_dataset, train),
        "held out": (
            "no held-out set"
            if held_out is None
            else data_text(held_out, options) + _cut_text(trainer.eval_dataset, held_out) + few_text(held_out.prompts)
        ),
        **length_line(args, trainer.train_dataset),
        **template_line(run),
        **lead_line(run),
        **layout_line(run),
        **idle_line(run),
        "folder": folder_text(run),
    }
    if train.gaps and isinstance(options, CLHAOptions):
        lines["rewards"] = report.margin_text(train.gaps, "a --reward_margin")
    if args.max_dropped_mass is not None:
        lines["gradients"] = f"each token leaves out at most {args.max_dropped_mass:g} of its softmax mass"
    lines |= skipped_line(run)
    if shared:
        lines["note"] = shared_text(shared)
    return lines


def _processes_text(args: CLHAConfig) -> str:
    count = f"{args.world_size} process{'es' if args.world_size > 1 else ''}"
    return count if args.sequence_parallel_size == 1 else f"{count}, {args.sequence_parallel_size} to each row"


def memory_report(run: Run) -> dict[str, int | None]:
    """Peaks of the loss variants at the largest training batch, by `memory.VARIANTS`; None of one that does not fit.

    Raises:
        MemoryReportError: a measurement failed otherwise, or the head is one that is not fused.
    """
    batch = run.trainer.largest_batch
    if batch is None:
        return {}
    trainer = run.trainer
    head: Any = trainer.head_info.module
    if trainer.head_info.own_forward is not None:
        raise memory.MemoryReportError("not measured: the head's own forward runs in chunks, not the fused loss")
    shapes = memory.LossShapes(
        rows=batch.input_ids.numel(),
        hidden_size=head.weight.shape[1],
        vocab_size=trainer.head_info.vocab_size,
        candidate_lengths=batch.candidate_lengths.tolist(),
        candidates_per_prompt=batch.candidates_per_prompt.tolist(),
        rewards=None if batch.rewards is None else batch.rewards.tolist(),
        bias=head.bias is not None,
        dtype=str(loss_dtype(run)).removeprefix("torch."),
        device=str(run.args.device),
        backend=run.args.backend,
        head=trainer.head_options.encoded,
        options=trainer.loss_options.encoded,
    )
    return measured(shapes)


def measured(shapes: memory.LossShapes) -> dict[str, int | None]:
    """`memory.measure` of every variant, None where there is not so much memory."""
    peaks: dict[str, int | None] = {}
    for variant in memory.VARIANTS:
        try:
            peaks[variant] = memory.measure(variant, shapes)
        except memory.DoesNotFitError:
            peaks[variant] = None
    return peaks


def memory_text(peaks: Mapping[str, int | None]) -> str:
    """The table of what was measured, and a line for each variant that does not fit."""
    fitting = {variant: peak for variant, peak in peaks.items() if peak is not None}
    lines = [report.memory_table(fitting, memory.VARIANTS)] if fitting else []
    lines += [f"{memory.VARIANTS[name]}: does not fit the memory" for name, peak in peaks.items() if peak is None]
    return "\n".join(lines)


def _finish(run: Run, command: Mapping[str, Any]) -> None:
    own = run.trainer.loss_options.metric_names
    result = report.evaluation_result(run.before, run.after, own) if run.held_out else report.NO_RESULT
    print(f"\n{result.text}")
    print_answers(run)
    log = run.trainer.state.log_history
    if not command.get("plot", True):
        pass
    elif plots.can_plot():
        path = os.path.join(run.folder, CURVE_FILE)
        plots.loss_curve(log, run.before, run.after, path)
        print(f"\nloss curve      {path}")
    else:
        print("\nloss curve      not drawn: the plot extra (matplotlib) is not installed")
    print(f"report          {write_page(run, header(run), result, plots.PANELS)}")
    print(f"all figures     {os.path.join(run.folder, METRICS_FILE)}")
    print(f"model           {run.folder}")
    if command.get("memory_report"):
        try:
            peaks = memory_report(run)
        except memory.MemoryReportError as error:
            print(f"\nmemory report   {error}")
        else:
            run.write_metrics(memory=peaks)
            if peaks:
                print(f"\n{memory_text(peaks)}")


def _before(run: Run) -> str:
    accuracy = report.number(run.before.get("eval_rewards/accuracies"))
    # Without pairs (chains) there is none.
    return f"loss {report.number(run.before['eval_loss'])}" if accuracy == "-" else f"ranking accuracy {accuracy}"


def train(words: Sequence[str], base: Mapping[str, Any] | None = None) -> int:
    """`clha-fast train`: the exit status.

    Args:
        words: the command line after `train`. base: options that file and flags override.

    Raises:
        ValueError, OSError: user errors, each one sentence.
    """
    if {"-h", "--help"} & set(words):
        print(_help(), end="")
        return 0
    started = time.monotonic()
    run_options, config, command = split(collect(words, base))
    logging.set_verbosity_error()
    run = Run(run_options, config).prepare()
    return carry_out("train", run, started, header, _before, lambda done: _finish(done, command))
