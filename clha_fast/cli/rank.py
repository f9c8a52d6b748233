"""`clha-fast rank`: what it takes and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.generate import model_text
from clha_fast.cli.guard import guarded, launched, parse
from clha_fast.cli.text import Parser, rows_text
from clha_fast.data import FORMATS, read_records
from clha_fast.files import check_destination
from clha_fast.models.layouts import LAYOUT_CHOICES
from clha_fast.models.loading import DTYPES, is_classifier
from clha_fast.processes import Processes
from clha_fast.rewards.policy import Policy, load_policy
from clha_fast.rewards.ranking import RankResult, rank_file
from clha_fast.rewards.reward_model import RewardModel, load_reward_model

DESCRIPTION = (
    "Put the answers to each prompt in order, best first: by the log-probability a token that a causal language model "
    "gives them, or by a reward model's rewards. One JSON object a line: the record in its new order, the scores "
    "(mean_logps, or rewards), and the places that the answers had before (order)."
)
_LENGTHS = ("max_length", "max_prompt_length", "max_completion_length")


def rank(words: Sequence[str]) -> int:
    """`clha-fast rank`: the exit status.

    Raises:
        ValueError, OSError: a user error, in one sentence.
    """
    parser = Parser(prog="clha-fast rank", description=DESCRIPTION, epilog=COLUMNS_HELP)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a causal language model, an adapter, or a reward model (a sequence classifier, by its configuration): "
        "its folder, or a name",
    )
    parser.add_argument("source", metavar="FILE", help="prompts with their answers, in any known format and any order")
    parser.add_argument("destination", metavar="OUT", help="the JSON Lines file to write")
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    parser.add_argument("--label", type=int, metavar="N", help="of a reward model with several logits: the reward's")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers a forward pass (default 16)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of prompt and answer, cut as in training (default: no limit; a reward model's own)",
    )
    parser.add_argument("--max-prompt-length", type=int, metavar="N", help="of a language model: as in training")
    parser.add_argument("--max-completion-length", type=int, metavar="N", help="of a language model: as in training")
    parser.add_argument(
        "--layout",
        choices=LAYOUT_CHOICES,
        default="padded",
        help="padded (default), a row an answer; packed, all in one; shared, a prompt once before its answers; auto, "
        "shared where the model computes it and it pays",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from OUT.partial")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT (and, without --resume, OUT.partial)")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU where there is one), cpu, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)} (default auto: the checkpoint's own)")
    with launched() as processes:
        words, columns = take_columns(words)
        parser.set_defaults(columns=columns)
        args = parse(parser, words)
        return guarded("rank", lambda: _rank(args, processes))


def _rank(args: argparse.Namespace, processes: Processes) -> int:
    for name in ("batch_size", *_LENGTHS):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive whole number, got {value}")
    check_destination(args.destination, resume=args.resume, overwrite=args.overwrite)
    processes.choose_device(args.device)
    records = read_records(args.source, args.format, columns=args.columns)
    judge = _load(args)
    kind = "policy" if isinstance(judge, Policy) else "reward model"
    print(f"{kind:<14}{model_text(judge.model, args.model)}{rows_text(args.layout, judge.layout)}")
    answers = sum(len(record.completions) for record in records)
    print(f"source        {args.source}: {len(records):,} prompts, {answers:,} answers", flush=True)
    result = rank_file(
        records,
        args.destination,
        judge,
        batch_size=args.batch_size,
        **{name: getattr(args, name) for name in _LENGTHS},
        resume=args.resume,
        overwrite=args.overwrite,
        processes=processes,
    )
    print(f"written       {args.destination}: {_result_text(result)}", flush=True)
    return 0


def _load(args: argparse.Namespace) -> Policy | RewardModel:
    if is_classifier(args.model):
        for name in _LENGTHS[1:]:
            value = getattr(args, name)
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected none with a reward model, got {value}")
        return load_reward_model(args.model, label=args.label, device=args.device, dtype=args.dtype, layout=args.layout)
    if args.label is not None:
        raise ValueError(f"--label: expected none with a language model, got {args.label}")
    return load_policy(args.model, device=args.device, dtype=args.dtype, layout=args.layout, option="model")


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
