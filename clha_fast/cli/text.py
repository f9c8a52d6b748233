"""The library's messages in the words of the command line."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from clha_fast.cli.values import twice
from clha_fast.messages import nearest
from clha_fast.processes import joined

# A setting with its value as Python writes it, not inside a call or a path, and the flag in a bracket behind it.
# JSON and other mappings stay as they are, and so does a text that somebody gave.
_GIVEN = r"\bgot (?:'[^']*'|\"[^\"]*\")"
_SETTING = r"(?<![\w./=-])(?<!\w\()({names})=(True|'[^'\s]*'|-?\d+(?:\.\d+)?)(?![\w/-]|\.\w)( \(--[\w-]+\))?"
# (option by the library's name of the setting, whether options are spelled otherwise than settings).
Spelling = Callable[[], tuple[Mapping[str, str], bool]]


def _as_they_are() -> tuple[dict[str, str], bool]:
    return {}, False


_options: Spelling = _as_they_are


def speak(options: Spelling = _as_they_are) -> None:
    """Whose options messages name from now on, those of the command that this process runs."""
    global _options
    _options = options


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Once(argparse.Action):
    """Of an option that is given twice argparse takes the last; `action="append"` is for those that may be."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is not None:
            parser.note(self.dest, option_string, option_string if self.nargs == 0 else _word(values))
        super().__call__(parser, namespace, values, option_string)


class _Store(_Once, argparse._StoreAction):
    pass


class _True(_Once, argparse._StoreTrueAction):
    pass


class _False(_Once, argparse._StoreFalseAction):
    pass


class Parser(argparse.ArgumentParser):
    """One for one command line: errors are a sentence each, with the option that may have been meant.

    An option that is given twice is refused, unless its action is "append".

    Attributes:
        also: what else the library calls an option or an argument, with the words for it.
        elsewhere: options of other commands that have no place in this one, with the reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.also: dict[str, str] = {}
        self.elsewhere: dict[str, str] = {}
        self._given: dict[str, str] = {}
        for name, action in {None: _Store, "store": _Store, "store_true": _True, "store_false": _False}.items():
            self.register("action", name, action)
        speak(self._spelled)

    def _spelled(self) -> tuple[dict[str, str], bool]:
        found = dict(self.also)
        for action in self._actions:  # of two options that set one thing (--x, --no-x) the first
            metavar = action.metavar if isinstance(action.metavar, str) else action.dest
            found.setdefault(action.dest, action.option_strings[0] if action.option_strings else metavar)
        return found, True

    def note(self, setting: str, option: str, value: str) -> None:
        """Note that an option is given.

        Raises:
            OptionError: it, or another one for the same setting, was given before.
        """
        if setting in self._given:
            raise twice(option, self._given[setting], value)
        self._given[setting] = value

    def error(self, message: str) -> NoReturn:
        """As `argparse.ArgumentParser`, without the usage in front."""
        unknown = message.removeprefix("unrecognized arguments: ") if message.startswith("unrecognized") else ""
        name = next((word[2:].partition("=")[0] for word in unknown.split() if word.startswith("--")), "")
        if name in self.elsewhere:
            self.exit(2, f"{self.prog}: --{name}: expected none, for {self.elsewhere[name]}; leave it out\n")
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
    """A message of the library in the words of the running command.

    `overwrite=True` is ``--overwrite`` there, `layout='shared'` is ``--layout shared``. Where options are spelled
    otherwise than settings, a setting in front of the message, and one in a bracket or behind
    "give", is an option, too: `max_length: expected ...` is about ``--max-length``.
    """
    spelled, otherwise = _options()
    flags = {name: flag for name, flag in spelled.items() if flag.startswith("-")}

    def option(found: re.Match[str]) -> str:
        file = not found.start() and text.startswith(":", found.end())
        if found[1] is None or file:
            return found[0]
        flag, value, said = flags[found[1]], found[2].strip("'"), found[3] or ""
        said = "" if said[2:-1].replace("_", "-") == flag.replace("_", "-") else said
        return f"{flag}{said}" if value == "True" else f"{flag} {value}{said}"

    if flags:
        setting = _SETTING.format(names="|".join(map(re.escape, flags)))
        text = re.sub(f"{_GIVEN}|{setting}", option, text)
    if otherwise:
        name, colon, rest = text.partition(":")
        text = spelled.get(name, name) + colon + rest
        # Elsewhere the word may be the user's own, such as a column's: only the library's hints have it so.
        names = "|".join(map(re.escape, flags))
        hint = rf"(?<=\()({names})(?=\)| was )|(?<= give )({names})\b"
        text = re.sub(hint, lambda found: flags[found[1] or found[2]], text)
    return text


def ways_to_need_less() -> str:
    """The part of a sentence about those of the running command's options that save memory; "" of none."""
    spelled, _ = _options()
    ways = {
        "per_device_train_batch_size": "smaller batches (per_device_train_batch_size)",
        "batch_size": "smaller batches (batch_size)",
        "max_length": "shorter limits (max_length)",
        "max_new_tokens": "shorter answers (max_new_tokens)",
        "layout": "layout='shared'",
        "dtype": "dtype='bfloat16'",
    }
    found = ", ".join(way for name, way in ways.items() if name in spelled)
    return f"{found}: each takes less; " if found else ""


def check_positive(args: argparse.Namespace, names: Sequence[str]) -> None:
    """ValueError for an option of these that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive whole number, got {value}")


def size_text(count: int) -> str:
    """How many weights, in millions where there are enough of them for two digits to say it."""
    return f"{count / 1e6:,.2f} M" if count >= 100_000 else f"{count:,}"


def rows_text(asked: str | None, layout: str) -> str:
    """Of which layout rows are, behind a model's name; "" where none was asked for."""
    if asked in (None, "padded"):
        return ""
    return ", shared or padded rows, as counted" if layout == "auto" else f", {layout} rows"


class _Said(logging.Handler):
    """Warnings of the library on standard error, in the words of the running command."""

    def emit(self, record: logging.LogRecord) -> None:
        print(as_flags(self.format(record)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_as_flags() -> Iterator[None]:
    """The library's warnings name options as the command spells them, where no handler of the caller's takes them."""
    logger, said = logging.getLogger("clha_fast"), _Said(logging.WARNING)
    if logger.hasHandlers():
        yield
        return
    logger.addHandler(said)
    try:
        yield
    finally:
        logger.removeHandler(said)


def complain(command: str, text: str) -> None:
    """Print an error as one sentence of a command, unless another of its processes has printed the same."""
    if joined().first_to_say(text):
        line = "\n" if joined().rank else ""  # the first process's bar may stand in this one
        print(f"{line}clha-fast {command}: {as_flags(' '.join(text.split()))}", file=sys.stderr, flush=True)
