"""`clha-fast rlhf`: what it prints."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from transformers.utils import logging

from clha_fast.cli.devices import backend_text, device_text, head_of_run, loss_dtype
from clha_fast.cli.generate import check_lead
from clha_fast.cli.options import collect, config_hints, field_hints
from clha_fast.cli.runs import (
    Progress,
    carry_out,
    few_text,
    folder_text,
    idle_line,
    layout_line,
    model_text,
    print_answers,
    skipped_line,
    write_page,
)
from clha_fast.evaluation import plots
from clha_fast.evaluation import tables as report
from clha_fast.experiments.rollout_run import RolloutRun, RolloutRunOptions
from clha_fast.experiments.run import METRICS_FILE
from clha_fast.training import prompt_data
from clha_fast.training.prompt_data import PromptDataset
from clha_fast.training.rollout import RolloutConfig

HELP = """\
usage: clha-fast rlhf [--config RUN.yaml] [--OPTION VALUE ...]

The model answers prompts, a reward model judges the answers, clipped policy gradients (GRPO) update the model.
Options stand in the YAML file under the same names; flags win.

files     --train_file FILE (its prompts; responses are not used)  --eval_file FILE | --eval_fraction 0.1 (0: none)
          --format auto  --columns.prompt question  --skip_bad_records (leave bad prompts out and say how many)
folder    --output_dir DIR  --resume | --overwrite
model     --model PATH_OR_NAME  --tokenizer PATH_OR_NAME  --dtype float32  --attn_implementation NAME
          --peft_config.r 8 ...
reward    --reward_model PATH (clha-fast reward-model train makes one)  --label N
rollout   --answers_per_prompt 4  --temperature 1  --max_prompt_length 384  --max_completion_length 128
          --lead TEXT (what prompts of messages end with; '' is as a server asks; else as the model was trained)
          --rollout_steps 1 (optimiser steps on the answers of one rollout; clipping needs more than 1)
          --per_device_eval_batch_size 8 (answers that are sampled or judged at a time)
          --eval_samples 3 (the first answers of each evaluation, with rewards, into samples.jsonl and the page)
loss      --objective.clip_low 0.2 --objective.clip_high 0.2 --objective.reduction token_mean|sequence_mean
          --objective.kl_weight 0 (above 0: a frozen copy of the model is kept; --reference names another one)
          --objective.entropy_weight 0 (times the mean entropy, off the loss)
training  --learning_rate --max_steps --num_train_epochs --per_device_train_batch_size (prompts)
          --gradient_accumulation_steps --seed, and every other field of transformers' TrainingArguments
"""
RUN_HINTS = field_hints(RolloutRunOptions)
CONFIG_HINTS = config_hints(RolloutConfig)


class _Progress(Progress):
    names: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "reward": "reward",
        "answer_tokens": "tokens",
        "clip_share": "clipped",
        "equal_rewards_share": "equal",
    }


def rlhf(words: Sequence[str]) -> int:
    """`clha-fast rlhf`: the exit status.

    Raises:
        ValueError, OSError, ImportError: user errors, each one sentence.
    """
    if {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    started = time.monotonic()
    options = collect(words, hints={**CONFIG_HINTS, **RUN_HINTS})
    objective = options.get("objective")
    if isinstance(objective, Mapping):  # --objective.clip_low alone
        options["objective"] = {"name": "policy", **objective}
    check_lead(options.get("lead"))
    logging.set_verbosity_error()
    run = RolloutRun(
        RolloutRunOptions(**{name: value for name, value in options.items() if name in RUN_HINTS}),
        {name: value for name, value in options.items() if name in CONFIG_HINTS},
    )
    with _said_in_header():
        run.prepare()
    return carry_out("rlhf", run, started, header, _before, _finish, _Progress())


@contextlib.contextmanager
def _said_in_header() -> Iterator[None]:
    """Without the warnings of prompts that are tokenised inside."""
    level = prompt_data.logger.level
    prompt_data.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        prompt_data.logger.setLevel(level)


def _before(run: RolloutRun) -> str:
    return _reward_text(run.before)


def _finish(run: RolloutRun) -> None:
    result = results(run)
    print(f"\n{result.text}")
    print_answers(run)
    print(f"report          {write_page(run, header(run), result, plots.ROLLOUT_PANELS)}")
    print(f"all figures     {os.path.join(run.folder, METRICS_FILE)}")
    print(f"model           {run.folder}")


def header(run: RolloutRun) -> dict[str, str]:
    """What will be trained, on what, judged by whom."""
    args, trainer = run.args, run.trainer
    options: Any = trainer.loss_options
    kl = f", divergence x {options.kl_weight:g} from {trainer.reference.text}" if options.kl_weight else ""
    clip = f"policy: clipped at {1 - options.clip_low:g} and {1 + options.clip_high:g}"
    bonus = f", entropy x {options.entropy_weight:g}" if options.entropy_weight else ""
    judge, limit = type(run.reward_model.model).__name__, run.reward_model.default_max_length
    reads = "" if limit is None else f", which reads {limit:,} tokens of a prompt and an answer"
    prefix = {"answers": f"begin with {run.answer_prefix!r}, as in training"} if run.answer_prefix else {}
    length = trainer.train_dataset.settings.max_new_tokens
    sets = [trainer.train_dataset, *([trainer.eval_dataset] if run.held_out else [])]
    template = next((data.said for data in sets if data.said), "")
    lines = {
        "model": model_text(run),
        "reward": f"{run.options.reward_model}: {judge}{reads}",
        "device": device_text(args.device),
        "backend": backend_text(args.backend, args.device, loss_dtype(run), **head_of_run(run)),
        "loss": f"{clip}, {options.reduction}{kl}{bonus}",
        "rollout": f"{args.answers_per_prompt} answers a prompt, of at most {length} tokens, for "
        f"{args.rollout_steps} step{'s' if args.rollout_steps > 1 else ''}",
        "training": _data_text(trainer.train_dataset),
        "held out": _data_text(trainer.eval_dataset) + few_text(len(trainer.eval_dataset))
        if run.held_out
        else "no held-out set",
        **prefix,
        **({"template": template} if template else {}),
        **layout_line(run),
        **idle_line(run),
        **skipped_line(run),
        "folder": folder_text(run),
    }
    return lines


def _data_text(data: PromptDataset) -> str:
    cut = f"; {data.cut_prompts:,} cut to {data.settings.max_prompt_length:,} tokens" if data.cut_prompts else ""
    return f"{len(data):,} prompts{cut}"


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else "{:.4g} to {:.4g}".format(*interval)


def _reward_text(found: Mapping[str, Any]) -> str:
    return f"mean reward {report.number(found['eval_reward'])} (95% interval {_interval(found['interval'])})"


def results(run: RolloutRun) -> report.Result:
    """The held-out rewards before and after training, and how sure the difference is."""
    if not run.held_out:
        return report.NO_RESULT
    gain, interval = run.gain()
    sides = (run.before, run.after)
    rows = [
        ["mean reward", *(report.number(side["eval_reward"]) for side in sides), report.number(gain)],
        ["  95% interval", *(_interval(side["interval"]) for side in sides), _interval(interval)],
        ["tokens an answer", *(report.number(side["eval_answer_tokens"]) for side in sides), ""],
        ["unfinished", *(report.number(side["eval_unfinished_share"]) for side in sides), ""],
        ["empty", *(report.number(side["eval_empty_share"]) for side in sides), ""],
    ]
    notes = [
        f"{len(run.after['rewards']):,} prompts; intervals: bootstrap over prompts",
        "These rewards are of the model that the policy was trained to please: let another one judge it.",
    ]
    for share, what in (
        ("judge_cut_share", "were cut to what the reward model reads: these rewards are of a part"),
        ("judge_empty_share", "are empty to the reward model"),
    ):
        if found := max(side.get(f"eval_{share}", 0) for side in sides):
            notes.append(f"Up to {found:.0%} of the answers {what}.")
    if interval is None:
        notes.append("One prompt gives no interval: hold out more.")
    elif interval[0] <= 0 <= interval[1]:
        notes.append("The interval of the difference includes 0.")
    return report.Result(["held out, greedy", "before", report.after_text(run.after), "difference"], rows, notes)
