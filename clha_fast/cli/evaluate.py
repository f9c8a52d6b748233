"""`clha-fast eval`: what it takes and what it prints."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from clha_fast.batching.collator import RankedCollator
from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.generate import add_model_arguments, answer, model_text, say_prefix, settings_of
from clha_fast.cli.guard import guarded
from clha_fast.cli.reading import add_skip_argument, read, readable
from clha_fast.cli.text import Parser, check_positive, with_dashes
from clha_fast.data import FORMATS, RankedRecord
from clha_fast.data.prompts import prompt_hash
from clha_fast.evaluation import report
from clha_fast.evaluation.intervals import check_extra
from clha_fast.files import check_destination, write_json
from clha_fast.generation.answers import Answer, read_answers
from clha_fast.generation.hf import load_backend
from clha_fast.generation.prompts import encode_prompts
from clha_fast.models.layouts import LAYOUT_CHOICES
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions, NoiseRule
from clha_fast.rewards.reward_model import RewardModel, load_reward_model, probe_reward_model

# Options that say how answers are made, how the model is asked, and where models run.
_ANSWERING = ("max_new_tokens", "temperature", "top_p", "seed", "stop", "resume", "lead", "chat_template_kwargs")
_OF_THE_MODEL = ("answer_prefix", "max_prompt_length", "layout", "noise_rule", "reward_margin")
_RUNNING = ("device", "dtype", "batch_size")
_OF_REWARD_MODELS = ("label",)
DESCRIPTION = (
    "Measure answers against ranked references: BLEU, length, diversity, rewards; with --model also the model's "
    "likelihood and ranking. Without ANSWERS the model answers the references' prompts first. Needs the eval extra: "
    "pip install 'clha-fast[eval]'."
)


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what answers are measured with."""
    parser.add_argument("--references", metavar="FILE", help="ranked responses to the same prompts, best first")
    parser.add_argument("--format", default="auto", help=f"of FILE: auto (default), {', '.join(FORMATS)}")
    add_skip_argument(parser)
    parser.add_argument(
        "--reward-model",
        action="append",
        default=[],
        metavar="PATH",
        help="a sequence classifier whose rewards are reported; may be repeated",
    )
    parser.add_argument("--label", type=int, metavar="N", help="which logit is the reward, where there are several")
    parser.add_argument(
        "--reward-check",
        metavar="FILE",
        help="ranked responses on which reward models are checked (default: the references)",
    )


def reward_loaders(args: argparse.Namespace) -> dict[str, Callable[[], RewardModel]]:
    """Reward models by name: the last part of their path, or all of it where two would be called the same.

    Raises:
        ValueError: one that is given twice, or that cannot be used: all are probed before anything is answered.
    """
    paths = args.reward_model
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"--reward-model: expected each once, got {path!r} {paths.count(path)} times")
    short = [os.path.basename(path.rstrip("/")) or path for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    settings = {"label": args.label, "device": args.device, "dtype": args.dtype}
    for path in paths:
        probe_reward_model(path, **settings)
    return {
        name: functools.partial(load_reward_model, path, **settings) for name, path in zip(names, paths, strict=True)
    }


def refuse_unused(
    args: argparse.Namespace, parser: argparse.ArgumentParser, reasons: Mapping[str, Sequence[str]]
) -> None:
    """ValueError for an option that is given and would not be used; `reasons`: why not -> options."""
    for why, names in reasons.items():
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')}: expected none {why}, got {getattr(args, name)!r}")


def without_judge(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """For `refuse_unused`: what is about reward models, where there are none."""
    return {} if args.reward_model else {"without a --reward-model": _OF_REWARD_MODELS}


def without_models(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """For `refuse_unused`: how models run, where none does."""
    return {} if getattr(args, "model", None) or args.reward_model else {"without a model": _RUNNING}


def reward_check_of(args: argparse.Namespace) -> list[RankedRecord] | None:
    """The records on which reward models are checked, None for the references."""
    if args.reward_check is None:
        return None
    if not args.reward_model:
        raise ValueError("--reward-check: expected a --reward-model that it is for, got none")
    return read(args, args.reward_check)


def evaluate(words: Sequence[str]) -> int:
    """`clha-fast eval`: the exit status.

    Raises:
        ValueError, OSError: a user error, in one sentence. ImportError: a package of the extra `eval` is missing.
    """
    parser = Parser(prog="clha-fast eval", description=DESCRIPTION, epilog=COLUMNS_HELP)
    parser.add_argument("answers", metavar="ANSWERS", nargs="?", help="a file of `clha-fast generate`, or like one")
    add_reward_arguments(parser)
    parser.add_argument("--model", metavar="PATH", help="a causal language model to measure, and to answer")
    parser.add_argument("--out", metavar="FILE.json", help="write everything here, prompt by prompt (for compare)")
    parser.add_argument(
        "--reward-margin", type=float, default=PUBLISHED.reward_margin, metavar="R", help="of kept pairs (default 3)"
    )
    parser.add_argument("--noise-rule", choices=get_args(NoiseRule), default=PUBLISHED.noise_rule, help="of kept pairs")
    add_model_arguments(parser)
    parser.add_argument(
        "--layout",
        choices=LAYOUT_CHOICES,
        default="padded",
        help="of the rows in which --model's likelihood is measured: padded (default), packed, shared (a prompt once "
        "before its responses), or auto (shared where the model computes it and it pays)",
    )
    words, columns = take_columns(words)
    args = parser.parse_args(with_dashes(words))
    check_positive(args, ("limit", "batch_size"))
    reasons = {**without_judge(args), **without_models(args)}
    if args.answers is not None:
        reasons["beside ANSWERS, which are measured as they are"] = _ANSWERING
    if args.model is None:
        reasons["without --model"] = _OF_THE_MODEL
    refuse_unused(args, parser, reasons)
    return guarded("eval", lambda: _run(args, columns))


def _run(args: argparse.Namespace, columns: dict[str, Any] | None) -> int:
    # What is missing or wrong is said before a model is loaded.
    check_extra()
    CLHAOptions(reward_margin=args.reward_margin)
    if args.references is None:
        raise ValueError("--references: expected a file of ranked responses to measure against, got none")
    if args.answers is None and args.model is None:
        raise ValueError("ANSWERS: expected a file of answers, or --model that answers first, got neither")
    made = _answers_path(args) if args.answers is None and args.out is not None else None
    check_out(args)
    loaders, check = reward_loaders(args), reward_check_of(args)
    records: Sequence[RankedRecord] = read(args, args.references, args.format, columns)[: args.limit]
    given = None if args.answers is None else read_answers(args.answers)
    print(f"references    {args.references}: {len(records):,} prompts", flush=True)
    model: dict[str, Any] = {}
    about: dict[str, Any] = {"references": args.references, "answers": args.answers, "model": args.model}
    if args.model is not None:
        settings = settings_of(args, args.model)
        backend = load_backend(args.model, device=args.device, dtype=args.dtype)
        print(f"model         {model_text(backend.model, args.model)}", flush=True)
        model = {"model": backend.model, "tokenizer": backend.tokenizer}
        about["answer_prefix"] = settings.answer_prefix
        model |= {"max_prompt_length": args.max_prompt_length, "answer_prefix": settings.answer_prefix}
        model["layout"] = args.layout
        limits = {"max_length": backend.max_positions, "max_prompt_length": args.max_prompt_length}
        collator = RankedCollator(backend.tokenizer, **limits)
        answered = {one.prompt_hash for one in given or ()}

        def tokenised(record: RankedRecord) -> None:
            if given is not None and prompt_hash(record) not in answered:
                return  # the model does not read it
            collator.tokenize_behind(record, settings.answer_prefix)
            if given is None:
                encode_prompts([record], backend.tokenizer, settings, backend.max_positions)

        records = readable(args, args.references, records, tokenised)
        if given is not None:
            say_prefix(args, settings)
        else:
            found = answer(args, backend, args.references, records, settings, made)
            given = found.answers
            about |= {"answers": made, "generation": vars(found.settings), "prompts_cut": found.cut}
    evaluation = report.evaluate(
        records,
        given,
        reward_models=loaders,
        reward_check=check,
        noise_rule=args.noise_rule,
        reward_margin=args.reward_margin,
        batch_size=args.batch_size,
        progress=True,
        about=about,
        **model,
    )
    figures = evaluation.figures()
    print(f"\n{report.evaluation_table(evaluation, figures)}")
    if args.out is not None:
        write_json(args.out, evaluation.as_dict(figures))
        print(f"\nall figures   {args.out}")
    return 0


def check_out(args: argparse.Namespace) -> None:
    """What --out demands before hours of work, and what is about it alone.

    Raises:
        ValueError: --resume or --overwrite without it. OSError: as `check_destination`.
    """
    if args.out is not None:
        check_destination(args.out, resume=True, overwrite=args.overwrite)
        return
    for name in ("resume", "overwrite"):
        if getattr(args, name, False):
            raise ValueError(f"--{name}: expected --out, whose files it is about, got none")


def _answers_path(args: argparse.Namespace) -> str:
    path = f"{args.out.removesuffix('.json')}.answers.jsonl"
    if os.path.isfile(path) and not args.overwrite:
        raise FileExistsError(f"{path}: holds answers already; give it as ANSWERS to measure it, or overwrite=True")
    check_destination(path, resume=args.resume, overwrite=args.overwrite)
    return path


def evaluation_of(
    answers: Sequence[Answer],
    records: Sequence[RankedRecord],
    args: argparse.Namespace,
    check: Sequence[RankedRecord] | None,
    checks: Mapping[str, Mapping[str, Any]],
) -> report.Evaluation:
    """Answers measured with `add_reward_arguments`' options; `check` as `reward_check_of`, `checks` as `evaluate`."""
    return report.evaluate(
        records,
        answers,
        reward_models=reward_loaders(args),
        reward_check=check,
        checks=checks,
        batch_size=args.batch_size,
        progress=True,
        about={"references": args.references},
    )
