"""`clha-fast table2`, `ablate` and `noise`: what they take and what they print."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from clha_fast.cli.options import merge
from clha_fast.cli.text import Parser, with_dashes
from clha_fast.cli.values import OptionError, read_mapping, read_value, twice
from clha_fast.evaluation import comparison_plots, plots
from clha_fast.experiments.claims import SHOWN, Claim, ablation, noise, write_differences
from clha_fast.experiments.comparison import Comparison, parse_comparison
from clha_fast.experiments.table import Table

FAILED = 1
INTERRUPTED = 130
TITLES = {
    "table2": "Compare methods at several ranking lengths: train, answer, evaluate; a table with intervals.",
    "ablate": "Take CLHA apart: without rescoring, margin, SFT; sweeps of its margins.",
    "noise": "What noise in rewards or ranks does to the noise rules (or to any methods).",
}
HELP = """\
Every cell lies in a folder named by a hash of its configuration: the same command goes on where it was stopped, and
ends in the same bytes. A cell that fails is named below the table, the others are there. docs/table2.md has the keys of
the configuration.
"""


def _parser(command: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"clha-fast {command}", description=TITLES[command], epilog=HELP)
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML file")
    parser.add_argument("--output-dir", metavar="DIR", help="in place of the file's")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an entry in place of the file's, such as seeds=[1,2] or settings.per_device_train_batch_size=2",
    )
    parser.add_argument("--ray", action="store_true", help="run cells as Ray tasks (the ray extra)")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster; none starts one on this machine")
    return parser


def read(path: str, changes: Sequence[str], output_dir: str | None) -> dict[str, Any]:
    """The configuration of a file, with the changes of the command line.

    Raises:
        OptionError: as `read_mapping`; a change without a key, or two of one key. OSError: the file cannot be read.
    """
    found = read_mapping(path)
    changed: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise OptionError(f"--set: expected KEY=VALUE, got {change!r}")
        value = read_value(text, f"--set {key}")
        for name in reversed(key.split(".")):
            value = {name: value}
        changed = _merge(changed, value, "--set ")
    found = _merge(found, changed)
    if output_dir is not None and "output_dir" in changed:
        raise twice("--output-dir", str(changed["output_dir"]), output_dir)
    return merge(found, {} if output_dir is None else {"output_dir": output_dir})


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], once: str | None = None) -> dict[str, Any]:
    """As `options.merge`, however deep; what both have is refused behind `once`, where that is given.

    An empty mapping has no entries to merge: it takes the other's place.
    """
    merged = dict(base)
    for name, value in over.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict) and value and (before or once is None):
            merged[name] = _merge(before, value, once if once is None else f"{once}{name}.")
            continue
        if name in merged and once is not None:
            raise twice(f"{once}{name}", str(before), str(value))
        merged[name] = value
    return merged


def table2(words: Sequence[str]) -> int:
    """`clha-fast table2`: the exit status."""
    return _run("table2", words)


def ablate(words: Sequence[str]) -> int:
    """`clha-fast ablate`: the exit status."""
    return _run("ablate", words)


def noise_command(words: Sequence[str]) -> int:
    """`clha-fast noise`: the exit status."""
    return _run("noise", words)


def _run(command: str, words: Sequence[str]) -> int:
    """0 done, 1 a cell failed, 130 interrupted.

    Raises:
        ValueError, OSError, ImportError: a user error, in one sentence.
    """
    args = _parser(command).parse_args(with_dashes(words))
    given = read(args.config, args.set, args.output_dir)
    claim: Claim | None = None
    if command == "table2":
        comparison = parse_comparison(given)
        if not comparison.methods:
            raise ValueError("methods: expected a list of methods, such as [sft, clha], got none")
    else:
        claim = ablation(given) if command == "ablate" else noise(given)
        comparison = claim.comparison
    started = time.monotonic()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()

    def say(line: str) -> None:
        print(f"{line}  ({time.monotonic() - started:.0f} s)", flush=True)

    table = Table(comparison, say, ray=args.ray, address=args.ray_address)
    try:
        table.run()
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on with what is in {comparison.output_dir}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if bars:
            logging.enable_progress_bar()
    return _finish(table, comparison, claim)


def _finish(table: Table, comparison: Comparison, claim: Claim | None) -> int:
    found = table.write()
    folder = comparison.output_dir
    names = ["table.md", "table.csv", "table.json"]
    if claim is not None:
        write_differences(table, claim)
        names += ["differences.md", "differences.json"]
    if plots.can_plot():
        names += draw(table, found["rows"], folder)
    else:
        print("\nnot drawn: the plot extra (matplotlib) is not installed")
    for name in ("table.md", "differences.md"):
        if name in names:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                print(f"\n{file.read()}", end="")
    print(f"\nin {folder}: {', '.join(names)}")
    failed = [row for row in found["rows"] if "error" in row]
    if failed:
        text = f"{len(failed)} of {len(found['rows'])} rows lack cells, named below the table"
        print(f"clha-fast: {text}; the same command tries them again", file=sys.stderr)
        return FAILED
    return 0


def draw(table: Table, rows: Sequence[Mapping[str, Any]], folder: str) -> list[str]:
    """The names of the pictures written: figures with intervals, and the training curves of each ranking length.

    One of an earlier call that there is nothing to draw for any more is removed, for it would show other rows.
    """
    names = ["figures.png"]
    if not comparison_plots.figure_bars(rows, SHOWN, os.path.join(folder, names[0])):
        _remove(folder, names.pop())
    for length in table.comparison.data:
        trained = {
            row.method.label: row.outcomes[0].trained
            for row in table.rows
            if row.cell.length == length and row.cell.corruption is None and row.method.trains and row.outcomes
        }
        logs = {label: found["log"] for label, found in trained.items()}
        ranking = [label for label, found in trained.items() if found.get("kept_share") is not None]
        name = f"curves-n{length}.png"
        if not logs:
            _remove(folder, name)
            continue
        comparison_plots.training_curves(logs, os.path.join(folder, name), ranking)
        names.append(name)
    return names


def _remove(folder: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, name))
