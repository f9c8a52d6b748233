"""`clha-fast demo`: a language model of the bundled answers, then their ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from transformers import PrinterCallback
from transformers.utils import logging

from clha_fast.cli.options import collect, read_config, split
from clha_fast.cli.runs import INTERRUPTED, Progress, without_bars
from clha_fast.cli.text import size_text
from clha_fast.cli.train import train
from clha_fast.evaluation import tables as report
from clha_fast.experiments.language_model import language_model_run
from clha_fast.experiments.run import Run

HELP = """\
usage: clha-fast demo [--OPTION VALUE ...]

Trains a small model from nothing on the bundled ranked responses, in two parts: it learns to write the answers,
whatever their rank (a language model), and then, with the CLHA loss, to prefer the better ones. With --model FOLDER
the second part alone, from that model. The options are those of `clha-fast train`, and mean the second part;
--model_config, --build_tokenizer, --max_length, --max_steps, --dtype, --seed and --use_cpu hold for both.
"""


def bundled(name: str) -> str:
    """The path of a file of the demo."""
    return str(resources.files("clha_fast").joinpath("demo").joinpath(name))


FIRST = read_config(bundled("language_model.yaml"))
SECOND = {**read_config(bundled("demo.yaml")), "train_file": bundled("ranked_demo.jsonl")}
# What makes a new model, and what both parts share.
_NEW = ("model_config", "build_tokenizer")
_SHARED = (
    *(*_NEW, "train_file", "eval_file", "columns", "format", "dtype", "attn_implementation", "output_dir"),
    *("max_length", "max_prompt_length", "max_completion_length", "max_steps", "seed", "use_cpu"),
    *("backend", "workspace_mb"),
)


def first_part(ranked: Run, options: Mapping[str, Any]) -> Run:
    """The language model's run, built: on the answers of `ranked`'s training part, into `options["output_dir"]`."""
    shared = {name: options[name] for name in _SHARED if name in options}
    run_options, config, _ = split({**FIRST, **shared, "overwrite": True})
    return language_model_run(ranked, run_options, config)


@without_bars()
def _language_model(options: Mapping[str, Any], folder: str) -> int:
    """Train it into `folder`; the exit status."""
    started = time.monotonic()
    run_options, config, _ = split(
        {name: value for name, value in options.items() if name not in _NEW} | {"model": folder}
    )
    ranked = Run(run_options, config)
    ranked.split(*ranked.read())
    run = first_part(ranked, {**options, "output_dir": folder})
    main_process = run.args.process_index == 0
    run.trainer.remove_callback(PrinterCallback)
    run.trainer.add_callback(Progress())
    parameters = sum(p.numel() for p in run.model.parameters())
    if main_process:
        print(
            f"1. a language model of the answers, whatever their rank: {type(run.model).__name__}, "
            f"{size_text(parameters)} parameters from nothing, {len(run.train_records):,} answers",
            flush=True,
        )
    run.evaluate_before()
    run.train()
    if run.interrupted:
        print("\ninterrupted in the first part, which begins anew", file=sys.stderr)
        return INTERRUPTED
    run.report()
    if main_process:
        before, after = (report.number(found.get("eval_target_nll")) for found in (run.before, run.after))
        seconds = time.monotonic() - started
        print(f"held-out answers: {before} -> {after} nats a token ({seconds:.0f} s)\n\n2. their ranks", flush=True)
    return 0


def demo(words: Sequence[str]) -> int:
    """`clha-fast demo`: the exit status; a demo run before it is replaced."""
    if {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    options = collect(words, SECOND)
    options.setdefault("overwrite", not options.get("resume", False))
    ready = options.get("model")
    if ready is None:
        logging.set_verbosity_error()
        ready = f"{options['output_dir'].rstrip('/')}-language-model"
        if not options.get("resume"):
            status = _language_model(options, ready)
            if status:
                return status
    return train([], {**{name: value for name, value in options.items() if name not in _NEW}, "model": ready})
