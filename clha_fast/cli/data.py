"""`clha-fast convert`."""

from __future__ import annotations

from collections.abc import Sequence

from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.reading import add_skip_argument
from clha_fast.cli.text import Parser, with_dashes
from clha_fast.data import FORMATS, RecordError
from clha_fast.data import convert as convert_file
from clha_fast.data.records import SKIPS


def convert(words: Sequence[str]) -> int:
    """Rewrites a file of ranked responses; returns the exit status."""
    parser = Parser(
        prog="clha-fast convert", description="Rewrite ranked responses as canonical JSON Lines.", epilog=COLUMNS_HELP
    )
    parser.add_argument(
        "source", metavar="SRC", help="JSON Lines, a JSON list, csv, tsv, parquet or arrow, a glob or a folder"
    )
    parser.add_argument("destination", metavar="DST", help="the JSON Lines file to write")
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    parser.add_argument("--rank-by-reward", action="store_true", help="order responses by reward, highest first")
    add_skip_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    words, columns = take_columns(words)
    given = parser.parse_args(with_dashes(words))
    errors: list[RecordError] | None = [] if given.skip_bad_records else None
    try:
        counts = convert_file(
            given.source,
            given.destination,
            given.format,
            given.rank_by_reward,
            overwrite=given.overwrite,
            errors=errors,
            columns=columns,
        )
    except RecordError as error:
        raise error if errors is not None else error.advised(SKIPS) from None
    print(
        f"{given.destination}: {counts.records:,} records, {counts.completions:,} responses, "
        f"{counts.with_rewards:,} records with rewards"
    )
    if counts.reversed_pairs:
        print(f"{counts.reversed_pairs:,} of {counts.pairs:,} pairs are ranked against their rewards")
    if errors:
        print(f"{len(errors):,} bad records left out, the first: {errors[0]}")
    return 0
