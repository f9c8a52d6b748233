"""`clha-fast convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clha_fast.cli.text import with_dashes
from clha_fast.data import FORMATS
from clha_fast.data import convert as convert_file


def convert(words: Sequence[str]) -> int:
    """Rewrites a file of ranked responses; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="clha-fast convert", description="Rewrite ranked responses as canonical JSON Lines."
    )
    parser.add_argument("source", metavar="SRC", help="JSON Lines, a JSON list (either may be .gz), or .parquet")
    parser.add_argument("destination", metavar="DST", help="the JSON Lines file to write")
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    parser.add_argument("--rank-by-reward", action="store_true", help="order responses by reward, highest first")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    given = parser.parse_args(with_dashes(words))
    counts = convert_file(
        given.source, given.destination, given.format, given.rank_by_reward, overwrite=given.overwrite
    )
    print(
        f"{given.destination}: {counts.records:,} records, {counts.completions:,} responses, "
        f"{counts.with_rewards:,} records with rewards"
    )
    return 0
