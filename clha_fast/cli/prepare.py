"""`clha-fast prepare`."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.text import Parser, with_dashes
from clha_fast.data import hh, tldr
from clha_fast.data.extra import ExtraCandidates
from clha_fast.data.parts import split_files
from clha_fast.data.prepare import SUMMARY_FILE, UNRANKED, find_files, prepare

DESCRIPTION = "Make ranked records to train on, to choose by and to test on from the raw files of a data set."
_PARSES = {"clean": hh.read_clean, "published": hh.read_published}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="clha-fast prepare", description=DESCRIPTION, epilog=f"Of ranked: {COLUMNS_HELP}")
    parser.add_argument("data", choices=("hh-rlhf", "tldr", "ranked"), help="what the files are; ranked: any format")
    parser.add_argument(
        "sources", metavar="SRC", nargs="+", help="a folder as published, files, or a glob; of ranked, any format"
    )
    parser.add_argument("folder", metavar="OUT", help="the folder to write train.jsonl, dev.jsonl and test.jsonl to")
    parser.add_argument(
        "--parse",
        choices=tuple(_PARSES),
        help="of hh-rlhf: clean (default; whole turns, both transcripts the same before the last one) or published (as "
        "the paper's pipeline reads it: the first paragraph of each turn)",
    )
    parser.add_argument(
        "--dev",
        default="0.01",
        metavar="N",
        help="prompts of the training files to choose by: a fraction (default 0.01; at least one prompt) or how many; "
        "0 for none",
    )
    parser.add_argument("--test", type=float, metavar="N", help="of ranked: the fraction of the prompts to test on")
    parser.add_argument(
        "--extra-candidate",
        action="append",
        default=[],
        metavar="FILE[:NAME]",
        help="answers to the same prompts (prompt, answer), one more candidate of each; may be given several times",
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help="candidates of a record (default: 2 and one a FILE; ranked: all)"
    )
    parser.add_argument(
        "--rank-by-reward", action="store_true", help="of ranked: order responses by reward, highest first"
    )
    parser.add_argument("--keep-short", action="store_true", help="keep records that FILE has no candidate for")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in OUT")
    parser.elsewhere["skip-bad-records"] = "prepare always leaves bad records out, and counts them by reason"
    return parser


def run(words: Sequence[str]) -> int:
    """Writes the folder and prints the counts; returns the exit status."""
    words, columns = take_columns(words)
    given = _parser().parse_intermixed_args(with_dashes(words))
    if given.data == "ranked":
        return _ranked(given, columns)
    if columns is not None:
        raise ValueError(
            f"--columns.{next(iter(columns))}: expected none for {given.data}, whose columns are known, got one"
        )
    if given.test is not None:
        raise ValueError(f"--test: expected none for {given.data}, whose test files are its own, got {given.test}")
    if given.rank_by_reward:
        raise ValueError(f"--rank-by-reward: expected none for {given.data}, whose files have no rewards, got it")
    if given.data != "hh-rlhf" and given.parse is not None:
        raise ValueError(f"--parse: expected none for {given.data}, which is read in one way, got {given.parse}")
    parse = given.parse or "clean"
    known, expected, read, subsets = (
        (hh.known_file, hh.EXPECTED, _PARSES[parse], tuple(dict.fromkeys(hh.SUBSETS.values())))
        if given.data == "hh-rlhf"
        else (tldr.known_file, tldr.EXPECTED, tldr.read, (tldr.SUBSET,))
    )
    files, others = find_files(given.sources, known, expected)
    settings = {"data": given.data, **({"parse": parse} if given.data == "hh-rlhf" else {}), "ignored": others}
    summary = prepare(
        files,
        read,
        given.folder,
        dev=_number(given.dev),
        extras=[ExtraCandidates(path) for path in given.extra_candidate],
        length=given.length,
        keep_short=given.keep_short,
        overwrite=given.overwrite,
        settings=settings,
        track=_bar,
    )
    print("\n".join(_lines(summary, given.folder, subsets, others)))
    return 0


def _ranked(given: argparse.Namespace, columns: Mapping[str, Any] | None) -> int:
    others = {"--parse": given.parse, "--extra-candidate": given.extra_candidate, "--keep-short": given.keep_short}
    for flag, value in others.items():
        if value:
            raise ValueError(f"{flag}: expected none for ranked files, got some")
    if given.test is None:
        raise ValueError("--test: expected the fraction of the prompts to test on, such as 0.2, got none")
    summary = split_files(
        given.sources,
        given.folder,
        dev=_number(given.dev),
        test=given.test,
        length=given.length,
        columns=columns,
        rank_by_reward=given.rank_by_reward,
        overwrite=given.overwrite,
        track=_bar,
    )
    print("\n".join(_lines(summary, given.folder, (), ())))
    return 0


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"--dev: expected a fraction or a number of prompts, got {text!r}") from None


def _bar(rows: Iterable[Any], name: str) -> Iterable[Any]:
    tqdm = importlib.import_module("tqdm").tqdm  # it ships no types
    bar: Iterable[Any] = tqdm(rows, desc=name, unit=" records", leave=False, disable=None)
    return bar


def _lines(summary: Mapping[str, Any], folder: str, subsets: Sequence[str], others: Sequence[str]) -> list[str]:
    lines = []
    reasons: dict[str, int] = {}
    for subset, splits in summary["counts"].items():
        parts = [f"{split} {count['kept']:,} of {count['read']:,} records kept" for split, count in splits.items()]
        lines.append(f"{subset:<18} {'; '.join(parts)}")
        for count in splits.values():
            for reason, number in count["dropped"].items():
                reasons[reason] = reasons.get(reason, 0) + number
    if reasons:
        lines.append(f"\nleft out           {sum(reasons.values()):,} records")
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1]):
            first = summary["first"].get(reason)
            lines.append(f"{number:>17,}  {reason}{f' (first: {first})' if first else ''}")
    for extra in summary["extra_candidates"]:
        lines.append(
            f"\ncandidates         {extra['name']}: {extra['used']:,} used, {extra['repeated']:,} the same as another, "
            f"{extra['empty']:,} empty; {extra['prompts_matched']:,} of its {extra['prompts']:,} prompts are here"
        )
    missing = [
        f"{subset} {split}"
        for subset in subsets
        for split in ("train", "test")
        if split not in summary["counts"].get(subset, ())
    ]
    if missing:
        lines.append(f"\nno files of        {', '.join(missing)}")
    if others:
        lines.append(f"\nnot read           {len(others):,} other files: {', '.join(others[:3])}")
    lines.append("")
    for name, counts in summary["written"].items():
        path = os.path.join(folder, name)
        lines.append(f"written            {path}: {counts['records']:,} records, {counts['prompts']:,} prompts")
    lines.append(f"all figures        {os.path.join(folder, SUMMARY_FILE)}")
    unranked = [name for name in summary["written"] if UNRANKED in name]
    if unranked:
        lines.append("\nThe new candidates stand last and are not ranked yet. To rank all by a reward model:")
        for name in unranked:
            paths = (os.path.join(folder, part) for part in (name, name.replace(UNRANKED, "")))
            source, destination = map(shlex.quote, paths)
            lines.append(f"  clha-fast score {source} {destination} --reward-model PATH --rank-by-reward")
    return lines
