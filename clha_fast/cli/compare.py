"""`clha-fast compare`: what it takes and what it prints."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from clha_fast.cli.evaluate import (
    add_reward_arguments,
    check_out,
    evaluation_of,
    refuse_unused,
    reward_check_of,
    without_judge,
    without_models,
)
from clha_fast.cli.guard import guarded
from clha_fast.cli.reading import read
from clha_fast.cli.text import Parser, check_positive, with_dashes
from clha_fast.evaluation.comparison import compare as compare_evaluations
from clha_fast.evaluation.comparison import comparison_table
from clha_fast.evaluation.intervals import check_extra
from clha_fast.evaluation.report import Evaluation
from clha_fast.files import write_json
from clha_fast.generation.answers import read_answers

# Options of what is measured; a file of metrics has been.
_MEASURING = (
    *("references", "format", "skip_bad_records", "reward_model", "label", "reward_check"),
    *("batch_size", "device", "dtype"),
)
DESCRIPTION = (
    "A against B on the prompts that both have: win rate by reward, and every figure's difference, paired. "
    "Needs the eval extra: pip install 'clha-fast[eval]'."
)


def compare(words: Sequence[str]) -> int:
    """`clha-fast compare`: the exit status.

    Raises:
        ValueError, OSError: a user error, in one sentence. ImportError: a package of the extra `eval` is missing.
    """
    parser = Parser(prog="clha-fast compare", description=DESCRIPTION)
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="what `clha-fast eval --out` wrote, or a file of answers")
    add_reward_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows a forward pass (default 8)")
    parser.add_argument("--device", default="auto", help="of reward models (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="of reward models (default: the checkpoint's own)")
    parser.add_argument("--out", metavar="FILE.json", help="write everything here")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.json")
    args = parser.parse_args(with_dashes(words))
    return guarded("compare", lambda: _run(args, parser))


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    check_out(args)
    check_positive(args, ("batch_size",))
    measured = {path: _read(path) for path in (args.a, args.b)}
    answers = [path for path, found in measured.items() if found is None]
    if answers and args.references is None:
        if os.path.isfile(os.path.join(answers[0], "config.json")):
            raise ValueError(
                f"{answers[0]}: expected a file of answers or figures, got a model; clha-fast eval --model "
                f"{answers[0]} --references FILE --out FILE.json makes both"
            )
        raise ValueError(f"--references: expected a file to measure the answers in {answers[0]} against, got none")
    if not answers:
        refuse_unused(args, parser, {"beside two files of metrics, which are compared as they are": _MEASURING})
    else:
        refuse_unused(args, parser, {**without_judge(args), **without_models(args)})
        check_extra()
        records = read(args, args.references, args.format)
        check = reward_check_of(args)
        checks: dict[str, Any] = {}  # one check of a reward model does for both
        given = {path: read_answers(path) for path in answers}  # what is wrong is said before a model is loaded
        for path in answers:
            measured[path] = found = evaluation_of(given[path], records, args, check, checks)
            checks = found.checks
    both = compare_evaluations(*(measured[path] for path in (args.a, args.b)))  # type: ignore[arg-type]
    print(f"A             {args.a}\nB             {args.b}\n{comparison_table(both)}")
    if args.out is not None:
        write_json(args.out, {"a": args.a, "b": args.b, **both.as_dict()})
        print(f"\nall figures   {args.out}")
    return 0


def _read(path: str) -> Evaluation | None:
    """The metrics in a file; None for anything else, which must be answers in some form that `read_answers` takes."""
    if not os.path.isfile(path):  # a glob, a folder, a data set's name
        return None
    with open(path, "rb") as file:
        if file.read(1) != b"{":
            return None
        file.seek(0)
        try:
            found = json.load(file)
        except ValueError:  # one object a line
            return None
    return Evaluation.from_dict(found, path) if "values" in found else None
