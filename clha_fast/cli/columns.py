"""`--columns.FIELD COLUMN` and `--columns MAPPING`, for the commands whose other options are argparse's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clha_fast.cli.values import OptionError, read_value, twice

COLUMNS_HELP = (
    "Columns of other names: --columns.prompt question --columns.completions '[response_a, response_b]' "
    "--columns.rewards '[score.a, score.b]' --columns.group_by id; dots lead into nested columns. All at once: "
    "--columns '{prompt: question, completions: [response_a, response_b]}'."
)


def take_columns(words: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The words without the flags of `columns`, as `clha-fast train` takes them, and the mapping that these give.

    Raises:
        OptionError: a flag without a value, no mapping, or a field twice.
    """
    rest: list[str] = []
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, text = word.partition("=")
        name, dot, field = flag.partition(".")
        if name != "--columns":
            rest.append(word)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise OptionError(f"{flag}: expected {'a column' if dot else 'a mapping'}, got none")
            text = left.pop(0)
        value = read_value(text, flag)
        if not dot and not isinstance(value, dict | None):
            raise OptionError(f"{flag}: expected a mapping, such as '{{prompt: question}}', got {text!r}")
        fields = {field.replace("-", "_"): value} if dot else value or {}
        for key, item in fields.items():
            if key in found:
                raise twice(f"--columns.{key}", str(found[key]), text if dot else str(item))
            found[key] = item
    return rest, found or None
