"""`--columns.FIELD COLUMN`, for the commands whose other options are argparse's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clha_fast.cli.values import read_value, twice

COLUMNS_HELP = (
    "Columns of other names: --columns.prompt question --columns.completions '[response_a, response_b]' "
    "--columns.rewards '[score.a, score.b]' --columns.group_by id; dots lead into nested columns."
)


def take_columns(words: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The words without `--columns.FIELD COLUMN` and `--columns.FIELD=COLUMN`, and the mapping that these give.

    Raises:
        ValueError: a flag without a value, or a field twice.
    """
    rest: list[str] = []
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, text = word.partition("=")
        if not flag.startswith("--columns."):
            rest.append(word)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"{flag}: expected a column, got none")
            text = left.pop(0)
        field = flag.removeprefix("--columns.").replace("-", "_")
        if field in found:
            raise twice(flag, str(found[field]), text)
        found[field] = read_value(text, flag)
    return rest, found or None
