"""How a long command ends, in each of its processes: done, failed or interrupted, and in a sentence what is kept."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from transformers.utils import logging

from clha_fast.cli.text import complain, with_dashes
from clha_fast.generation.answers import GenerationError, GenerationInterrupted
from clha_fast.processes import Processes, join, joined
from clha_fast.rewards.scoring import ScoringError, ScoringInterrupted

FAILED = 1
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def guarded(command: str, work: Callable[[], int]) -> int:
    """`work()`; 1 where it failed while running, 130 where it was interrupted. User errors are raised."""
    try:
        return work()
    except (GenerationError, ScoringError) as error:
        complain(command, str(error))
        return FAILED
    except (GenerationInterrupted, ScoringInterrupted) as error:
        complain(command, str(error))
        return INTERRUPTED
    except KeyboardInterrupt:
        complain(command, "interrupted before anything was done")
        return INTERRUPTED


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that `torchrun` or `accelerate launch` has started; all but the first print errors alone."""
    processes = join()
    if not processes.rank:
        yield processes
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield processes


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options, or argparse's end of the program, whose reason one of the processes prints."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(with_dashes(words))
    except SystemExit:
        if joined().first_to_say(said.getvalue()):
            print(said.getvalue(), end="", file=sys.stderr, flush=True)
        raise
