"""`clha-fast rank`: what it takes and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.generate import model_text
from clha_fast.cli.guard import guarded, launched, parse
from clha_fast.cli.reading import read, use
from clha_fast.cli.scoring import LIMITS, add_scoring_arguments, read_alone
from clha_fast.cli.text import Parser, check_positive, rows_text
from clha_fast.files import check_destination
from clha_fast.generation.prompts import trained_prefix
from clha_fast.models.loading import is_classifier
from clha_fast.processes import Processes
from clha_fast.rewards.policy import Policy, load_policy
from clha_fast.rewards.ranking import RankResult, rank_file
from clha_fast.rewards.reward_model import RewardModel, load_reward_model

DESCRIPTION = (
    "Put the answers to each prompt in order, best first: by the log-probability a token that a causal language model "
    "gives them, or by a reward model's rewards. One JSON object a line: the record in its new order, the scores "
    "(mean_logps, or rewards), and the places that the answers had before (order)."
)


def rank(words: Sequence[str]) -> int:
    """`clha-fast rank`: the exit status.

    Raises:
        ValueError, OSError: a user error, in one sentence.
    """
    parser = Parser(prog="clha-fast rank", description=DESCRIPTION, epilog=COLUMNS_HELP)
    parser.also["reward_model"] = "MODEL"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a causal language model, an adapter, or a reward model (a sequence classifier, by its configuration): "
        "its folder, or a name",
    )
    parser.add_argument("source", metavar="FILE", help="prompts with their answers, in any known format and any order")
    parser.add_argument("destination", metavar="OUT", help="the JSON Lines file to write")
    add_scoring_arguments(parser, "answer", "OUT", "a language model", "default auto: the checkpoint's own")
    parser.add_argument(
        "--answer-prefix",
        metavar="TEXT",
        help="what a language model's answers begin with, read and not scored (default: the good marker of a run of "
        "`coh`, else nothing)",
    )
    with launched() as processes:
        words, columns = take_columns(words)
        parser.set_defaults(columns=columns)
        args = parse(parser, words)
        return guarded("rank", lambda: _rank(args, processes))


def _rank(args: argparse.Namespace, processes: Processes) -> int:
    check_positive(args, ("batch_size", *LIMITS))
    check_destination(args.destination, resume=args.resume, overwrite=args.overwrite)
    processes.choose_device(args.device)
    records = read(args, args.source, args.format, args.columns)
    judge = _load(args)
    kind = "policy" if isinstance(judge, Policy) else "reward model"
    print(f"{kind:<14}{model_text(judge.model, args.model)}{rows_text(args.layout, judge.layout)}")
    answers = sum(len(record.completions) for record in records)
    print(f"source        {args.source}: {len(records):,} prompts, {answers:,} answers", flush=True)
    prefix = args.answer_prefix or ""
    if isinstance(judge, Policy) and args.answer_prefix is None:
        prefix = trained_prefix(args.model)
    if prefix:
        why = " (the model was trained behind it)" if args.answer_prefix is None else ""
        print(f"prefix        every answer begins with {prefix!r}{why}", flush=True)
    limits = {name: getattr(args, name) for name in LIMITS}
    how = {name: getattr(args, name) for name in ("batch_size", "resume", "overwrite")}
    how |= {**limits, "answer_prefix": prefix, "processes": processes}
    result = use(
        args,
        args.source,
        records,
        lambda records: rank_file(records, args.destination, judge, **how),
        read_alone(judge, limits, prefix),
    )
    print(f"written       {args.destination}: {_result_text(result)}", flush=True)
    return 0


def _load(args: argparse.Namespace) -> Policy | RewardModel:
    how = {"device": args.device, "dtype": args.dtype or "auto", "layout": args.layout or "padded"}
    if is_classifier(args.model):
        for name in (*LIMITS[1:], "answer_prefix"):
            value = getattr(args, name)
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected none with a reward model, got {value}")
        return load_reward_model(args.model, label=args.label, **how)
    if args.label is not None:
        raise ValueError(f"--label: expected none with a language model, got {args.label}")
    return load_policy(args.model, **how, option="model")


def _result_text(result: RankResult) -> str:
    parts = [f"{result.candidates:,} answers, best first"]
    if result.truncated:
        parts.append(f"{result.truncated:,} prompts had something cut")
    if result.resumed:
        parts.append(f"{result.resumed:,} answers had been scored before")
    for by_reward, what in ((False, "as in the file"), (True, "as the file's rewards say")):
        same, pairs = result.agreement(by_reward)
        if pairs:
            parts.append(f"{100 * same / pairs:.1f}% of the pairs stand {what}")
    return "; ".join(parts)
