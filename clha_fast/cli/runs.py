"""What the commands that train have in common: how a run is carried out, and what is printed on the way."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from clha_fast.cli.text import complain, size_text
from clha_fast.evaluation import plots
from clha_fast.evaluation import tables as report
from clha_fast.experiments.run import Run
from clha_fast.files import CheckpointError, survivors, write_text
from clha_fast.models.adapters import base_model
from clha_fast.processes import ProcessError, waited_for_another
from clha_fast.reports.data_summary import template_text
from clha_fast.reports.run_page import REPORT_FILE, read_samples, run_page
from clha_fast.training.samples import SAMPLES_FILE

INTERRUPTED = 130  # what a shell reports for Ctrl-C
FAILED = 1
_FEW = 20  # held-out prompts: 95% of an accuracy of 0.7 are then 0.5 to 0.9
_R = TypeVar("_R", bound=Run)


def folder_text(run: Run) -> str:
    """Where the run goes, and from where it goes on."""
    if run.checkpoint is not None:
        return f"{run.folder}, resumed from {run.checkpoint}"
    if run.options.resume:
        return f"{run.folder}, whose run has no checkpoint yet: training starts from the beginning"
    return run.folder


def model_text(run: Run) -> str:
    """What is trained, and how large it is."""
    model = run.trainer.model
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = "" if trained == parameters else f" ({size_text(trained)} of them trained)"
    return f"{type(base_model(run.model)).__name__}, {size_text(parameters)} parameters{part}"


def lead_line(run: Run) -> dict[str, str]:
    """What the chat template puts in front of the answers, where all stand behind the same and a server's would not."""
    if not run.lead:
        return {}
    return {"prompts": f"end with {run.lead!r}; a server's do not, unless its chat_template_kwargs say so"}


def layout_line(run: Run) -> dict[str, str]:
    """Of which layout the rows are that the model runs; {} where none was asked for."""
    asked, layout = run.args.layout, run.trainer.layout
    return {} if asked == "padded" else {"layout": f"{layout} rows{', as auto counts' if asked == 'auto' else ''}"}


def idle_line(run: Run) -> dict[str, str]:
    """Settings that were given and do nothing; {} where all have a part."""
    return {"unused": "; ".join(run.idle.values())} if run.idle else {}


def skipped_line(run: Run) -> dict[str, str]:
    """How many bad records were left out; {} where none was."""
    if not run.skipped:
        return {}
    return {"skipped": f"{len(run.skipped)} bad records, the first: {' '.join(str(run.skipped[0]).split())}"}


def template_line(run: Run) -> dict[str, str]:
    """That texts go without the chat template, or messages without one that there is not; {} where all is as usual."""
    texts = sum(isinstance(record.prompt, str) for record in run.train_records)
    templated = bool(getattr(run.tokenizer, "chat_template", None))
    said = template_text(texts, len(run.train_records), templated)
    return {"template": said} if said else {}


def _bar(**settings: Any) -> Any:
    return importlib.import_module("tqdm").tqdm(dynamic_ncols=True, **settings)  # it ships no types


class Progress(TrainerCallback):
    """A bar on a terminal, of held-out batches too; elsewhere one line for each line of the log, with `names` of it.

    Attributes:
        finished: nothing of the log is printed any more.
    """

    names: ClassVar[dict[str, str]] = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}

    def __init__(self) -> None:
        self.bar: Any = None
        self.held_out: Any = None
        self.start = time.monotonic()
        self.finished = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.start = time.monotonic()
        if sys.stderr.isatty():
            self.bar = _bar(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # what is left since the last line; a short run has no other
        if self.bar is not None:
            self.bar.update(1)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        if self.held_out is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self.held_out = _bar(total=total, desc="Held out", unit="batch", leave=False)
        self.held_out.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.held_out is not None:
            self.held_out.close()
            self.held_out = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or self.finished:
            return
        kind = "" if "loss" in logs else "eval_"
        if not any(kind + key in logs for key in self.names):
            return
        # Not every metric is measured on held-out prompts.
        shown = {key: short for key, short in self.names.items() if not kind or kind + key in logs}
        numbers = {short: report.number(logs.get(kind + key)) for key, short in shown.items()}
        values = {short: number for short, number in numbers.items() if number != "-"}
        if self.bar is not None and not kind:
            self.bar.set_postfix(values)
        elif state.global_step:
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            place = "held out" if kind else f"{time.monotonic() - self.start:.0f} s"
            line = f"step {state.global_step}/{state.max_steps}  {text}  ({place})"
            print(line, flush=True) if self.bar is None else self.bar.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def shared_text(prompts: int) -> str:
    """Said where held-out prompts have been trained on."""
    return (
        f"{prompts} held-out prompts stand in the training file too, so their figures are not of new prompts; "
        "clha-fast prepare ranked splits files by prompt"
    )


def few_text(prompts: int) -> str:
    """What is to be said of few held-out prompts; "" of enough."""
    return "" if prompts >= _FEW else "; figures on so few prompts are mostly chance (eval_fraction or eval_file: more)"


def print_answers(run: Run) -> None:
    """The first held-out prompt, as it was answered before training and is now, where `eval_samples` asks for it."""
    if not run.args.eval_samples:
        return
    lines = [line for line in read_samples(os.path.join(run.folder, SAMPLES_FILE)) if line["index"] == 0]
    if lines:
        print(f"\n{report.answers_text(lines[0], lines[-1])}")


def write_page(
    run: Run,
    lines: Mapping[str, str],
    result: report.Result,
    panels: Sequence[plots.Panel],
) -> str:
    """`report.html` in the run's folder: its path. `lines` is what the command said first."""
    path = os.path.join(run.folder, REPORT_FILE)
    answers = hasattr(run.args, "eval_samples")
    samples = read_samples(os.path.join(run.folder, SAMPLES_FILE)) if answers else None
    name = os.path.basename(os.path.abspath(run.folder))
    log = run.trainer.state.log_history
    write_text(path, run_page(name, lines.items(), run.changed, result, run.before, run.after, log, samples, panels))
    return path


def header_text(lines: Mapping[str, str]) -> str:
    """What a command says first: names, and what is to be said of each."""
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """transformers' bars are off, of shards written for one."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@without_bars()
def carry_out(
    command: str,
    run: _R,
    started: float,
    header: Callable[[_R], Mapping[str, str]],
    before: Callable[[_R], str],
    finish: Callable[[_R], None],
    progress: Progress | None = None,
) -> int:
    """A prepared run, evaluated, trained and reported; the exit status. The first process alone prints.

    Args:
        started: when the command began. header: what is said first. before: what was found before training, where
            anything was. finish: prints what there is at the end. progress: `Progress()` by default.
    """
    progress = Progress() if progress is None else progress
    first = run.args.process_index == 0
    try:
        run.trainer.remove_callback(PrinterCallback)
        run.trainer.add_callback(progress)
        if first:
            print(header_text(header(run)), flush=True)
            if run.held_out and run.checkpoint is None and not sys.stderr.isatty():  # no bar shows that it goes on
                print(f"\n{len(run.held_out):,} held-out prompts are evaluated before training", flush=True)
        run.evaluate_before()
        if first and run.before:
            print(f"\nheld out before training: {before(run)}\n", flush=True)
        try:
            run.train()
        except KeyboardInterrupt:
            print(f"\ninterrupted; {survivors(run.folder)}", file=sys.stderr)
            return INTERRUPTED
        if run.interrupted:
            run.write_metrics()
            said = f"interrupted after step {run.trainer.state.global_step}, which is saved"
            if first:
                print(f"\n{said}; the same command with --resume continues", file=sys.stderr)
            return INTERRUPTED
        progress.finished = True  # the table says it
        run.report()
        if first:
            finish(run)
            print(f"\n{time.monotonic() - started:.0f} s in all")
        return 0
    except CheckpointError as error:
        with contextlib.suppress(OSError):  # the same disk
            run.write_metrics()
        complain(command, str(error))
        return FAILED
    except (RuntimeError, ValueError) as error:
        if waited := waited_for_another(error):
            raise ProcessError(f"{waited}; {survivors(run.folder)}") from error
        raise
