"""The library's messages in the words of the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from clha_fast.messages import nearest
from clha_fast.processes import joined


class Parser(argparse.ArgumentParser):
    """One whose errors are a sentence each, with the option that may have been meant."""

    def error(self, message: str) -> NoReturn:
        """As `argparse.ArgumentParser`, without the usage in front."""
        unknown = message.removeprefix("unrecognized arguments: ") if message.startswith("unrecognized") else ""
        name = next((word[2:].partition("=")[0] for word in unknown.split() if word.startswith("--")), "")
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        hint = nearest(name, known).replace("'", "'--", 1) if name else ""
        self.exit(2, f"{self.prog}: {message}{hint} ({self.prog} --help says more)\n")


def with_dashes(words: Sequence[str]) -> list[str]:
    """The words with dashes in options' names, as argparse knows them: `--batch_size=4` is `--batch-size=4`."""
    found, plain = [], False
    for word in words:
        plain = plain or word == "--"
        if word.startswith("--") and not plain:
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        found.append(word)
    return found


def as_flags(text: str) -> str:
    """A message of the library in the words of the command line: `overwrite=True` is ``--overwrite`` there."""
    return re.sub(r"\b(resume|overwrite)=True\b", r"--\1", text)


def rows_text(asked: str | None, layout: str) -> str:
    """Of which layout rows are, behind a model's name; "" where none was asked for."""
    if asked in (None, "padded"):
        return ""
    return ", shared or padded rows, as counted" if layout == "auto" else f", {layout} rows"


def complain(command: str, text: str) -> None:
    """Print an error as one sentence of a command, unless another of its processes has printed the same."""
    if joined().first_to_say(text):
        line = "\n" if joined().rank else ""  # the first process's bar may stand in this one
        print(f"{line}clha-fast {command}: {as_flags(' '.join(text.split()))}", file=sys.stderr, flush=True)
