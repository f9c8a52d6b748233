"""`clha-fast reward-model train`: what it prints."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from clha_fast.cli.devices import device_text
from clha_fast.cli.options import collect, config_hints, field_hints
from clha_fast.cli.runs import (
    carry_out,
    few_text,
    folder_text,
    idle_line,
    layout_line,
    model_text,
    shared_text,
    skipped_line,
    write_page,
)
from clha_fast.evaluation import plots
from clha_fast.evaluation import tables as report
from clha_fast.evaluation.accuracy import PairAccuracy
from clha_fast.experiments.reward_run import CHANCE, RewardRun, RewardRunOptions
from clha_fast.rewards.reward_model import REWARD_FILE
from clha_fast.training.reward_data import PairedDataset
from clha_fast.training.reward_trainer import RewardConfig

USAGE = """\
usage: clha-fast reward-model COMMAND ...

  train    train a reward model on the pairs of ranked responses (clha-fast reward-model train --help)
"""
TRAIN_HELP = """\
usage: clha-fast reward-model train [--config RUN.yaml] [--OPTION VALUE ...]

Options stand in the YAML file under the same names; flags win. `clha-fast score --reward-model DIR` takes the folder.

files     --train_file FILE  --eval_file FILE | --eval_fraction 0.1 (0: none)  --format auto  --columns.prompt question
          --rank_by_reward (pairs by reward; without it by the order of the responses)  --skip_bad_records
          --half 0|1 (train on that half of the prompts: give the model that evaluates the other one)
folder    --output_dir DIR  --resume | --overwrite
model     --model PATH_OR_NAME (a causal language model, an encoder, or a classifier with one label to go on with),
          or --model_config.model_type llama --model_config.hidden_size 128 ...
          --dtype float32  --attn_implementation NAME  --peft_config.r 8 ... (merged into the model at the end)
tokenizer --tokenizer PATH_OR_NAME, or --build_tokenizer.vocab_size 4096
lengths   --max_length (tokens of prompt and response)  --pad_to_multiple_of  --dataset_num_proc
          --layout padded|packed|shared|auto (a row a response; all in one row; a prompt once before its responses)
training  --learning_rate --num_train_epochs --max_steps --per_device_train_batch_size (prompts)
          --gradient_accumulation_steps --seed, and every other field of transformers' TrainingArguments
"""
RUN_HINTS = field_hints(RewardRunOptions)
CONFIG_HINTS = config_hints(RewardConfig)


def reward_model(words: Sequence[str]) -> int:
    """`clha-fast reward-model`: the exit status.

    Raises:
        ValueError, OSError, ImportError: user errors, each one sentence.
    """
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] != "train":
        raise ValueError(f"expected a command of reward-model (train), got {words[0]!r}")
    return train(words[1:])


def train(words: Sequence[str]) -> int:
    """`clha-fast reward-model train`: the exit status."""
    if {"-h", "--help"} & set(words):
        print(TRAIN_HELP, end="")
        return 0
    started = time.monotonic()
    options = collect(words, hints={**CONFIG_HINTS, **RUN_HINTS})
    logging.set_verbosity_error()
    run = RewardRun(
        RewardRunOptions(**{name: value for name, value in options.items() if name in RUN_HINTS}),
        {name: value for name, value in options.items() if name in CONFIG_HINTS},
    ).prepare()
    return carry_out("reward-model", run, started, header, _before, _finish)


def _before(run: RewardRun) -> str:
    return _accuracy_text(run.before)


def _finish(run: RewardRun) -> None:
    result = results(run)
    print(f"\n{result.text}")
    print(f"report          {write_page(run, header(run), result, plots.REWARD_PANELS)}")
    print(f"figures         {os.path.join(run.folder, REWARD_FILE)}")
    print(f"reward model    {run.folder}, for clha-fast score --reward-model")


def header(run: RewardRun) -> dict[str, str]:
    """What will be trained, on what."""
    args, trainer = run.args, run.trainer
    new = f"; new weights: {', '.join(run.fresh)}" if run.fresh else ""
    pad = run.tokenizer.convert_ids_to_tokens(trainer.data_collator.pad)
    longest = max(trainer.train_dataset.lengths)
    length = f"at most {run.max_length:,} tokens" if run.max_length else f"no limit, at most {longest:,} tokens a row"
    by = "reward" if run.options.rank_by_reward else "rank"
    lines = {
        "model": f"{model_text(run)}{new}",
        "device": f"{device_text(args.device)}, {args.world_size} process{'es' if args.world_size > 1 else ''}",
        "training": _data_text(trainer.train_dataset, by),
        "held out": _data_text(trainer.eval_dataset, by) + few_text(len(trainer.eval_dataset))
        if run.held_out
        else "no held-out set",
        "lengths": f"{length}, padded with {pad}",
        **layout_line(run),
        **idle_line(run),
        "folder": folder_text(run),
    }
    if run.options.half is not None:
        lines["half"] = f"{run.options.half} of the prompts of {run.options.train_file}"
    if pad == run.tokenizer.eos_token:
        lines["lengths"] += ", the end of a response: rewards are read at the token before it"
    lines |= skipped_line(run)
    if run.shared:
        lines["note"] = shared_text(run.shared)
    return lines


def _data_text(data: PairedDataset, by: str) -> str:
    fewest, most = data.sizes
    span = str(most) if fewest == most else f"{fewest} to {most}"
    parts = [f"{len(data):,} prompts, {data.responses:,} responses ({span} a prompt), {data.pairs:,} pairs by {by}"]
    if data.reversed_pairs:
        share = 100 * data.reversed_pairs / data.pairs
        parts.append(
            f"{data.reversed_pairs:,} of them ({share:.0f}%) against their rewards (rank_by_reward orders by these)"
        )
    counts = {
        "pairs of equal rewards": data.equal_rewards,
        "pairs of equal responses": data.equal_responses,
        "prompts without a pair": data.unpaired,
    }
    left_out = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    if left_out:
        parts.append(f"left out: {left_out}")
    if data.cut_prompts or data.cut_completions:
        of = f", of all {len(data) + data.unpaired:,} prompts" if data.unpaired else ""
        parts.append(f"cut to max_length{of}: {data.cut_prompts:,} prompts, {data.cut_completions:,} responses")
    return "; ".join(parts)


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else "{:.3f} to {:.3f}".format(*interval)


def _accuracy_text(found: Mapping[str, Any]) -> str:
    return f"accuracy {found['accuracy']:.3f} (95% interval {_interval(found['interval'])})"


def results(run: RewardRun) -> report.Result:
    """The held-out accuracy before and after training beside its baselines, and what it does not show."""
    if not run.held_out:
        return report.NO_RESULT
    longer = run.longer_wins()
    found = {"before": run.before, report.after_text(run.after): run.after, "longer response wins": longer.as_dict()}
    rows = [
        [name, report.number(values.get("accuracy")), _interval(values.get("interval"))]
        for name, values in found.items()
    ]
    notes = [f"{longer.pairs:,} pairs of {longer.prompts:,} prompts; intervals: bootstrap over prompts"]
    after = PairAccuracy(run.after["accuracy"], run.after["interval"], longer.prompts, longer.pairs)
    if after.interval is None:
        notes.append("One prompt gives no interval: hold out more.")
    elif after.like_chance:
        notes.append("The interval includes 0.5: on these prompts the reward model cannot be told from guessing.")
    elif after.interval[0] <= max(longer.accuracy, 1 - longer.accuracy):
        notes.append("The interval reaches down to what the length of a response alone says.")
    rows.append(["chance", report.number(CHANCE), "-"])
    return report.Result(["held-out pairs", "accuracy", "95% interval"], rows, notes)
