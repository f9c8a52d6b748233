"""How a long command ends: done, failed or interrupted, with a sentence that says what is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable

from clha_fast.cli.text import as_flags
from clha_fast.generation.answers import GenerationError, GenerationInterrupted
from clha_fast.rewards.scoring import ScoringError, ScoringInterrupted

FAILED = 1
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def guarded(command: str, work: Callable[[], int]) -> int:
    """`work()`; 1 where it failed while running, 130 where it was interrupted. User errors are raised."""
    try:
        return work()
    except (GenerationError, ScoringError) as error:
        print(f"clha-fast {command}: {as_flags(str(error))}", file=sys.stderr)
        return FAILED
    except (GenerationInterrupted, ScoringInterrupted) as error:
        print(f"clha-fast {command}: {as_flags(str(error))}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"clha-fast {command}: interrupted before anything was done", file=sys.stderr)
        return INTERRUPTED
