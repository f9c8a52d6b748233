"""The command line: `clha-fast COMMAND ...`, the commands being those of `COMMANDS`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from clha_fast.cli import names
from clha_fast.cli.text import complain, speak, warnings_as_flags, ways_to_need_less
from clha_fast.messages import nearest
from clha_fast.version import __version__

FAILED, USER_ERROR = 1, 2


class Command(NamedTuple):
    """Where a command is, imported when it is asked for.

    Attributes:
        checked: misspelled options are found before seconds of imports. shared: a launcher's processes share its work;
            of any other, each would do all of it, and write the same files.
    """

    module: str
    function: str
    help: str
    checked: bool = False
    shared: bool = False


COMMANDS = {
    "train": Command("train", "train", "train a causal language model on ranked responses", True, True),
    "demo": Command("demo", "demo", "the same on the bundled data, in a few minutes on a CPU", True, True),
    "prepare": Command("prepare", "run", "raw HH-RLHF or TL;DR to ranked train, dev and test files"),
    "inspect": Command("inspect", "inspect", "what a file of ranked responses holds, as a model will read it"),
    "convert": Command("data", "convert", "rewrite a file of ranked responses as canonical JSON Lines"),
    "reward-model": Command("reward_model", "reward_model", "train a reward model on ranked responses", shared=True),
    "score": Command("score", "score", "add rewards, or a model's log-probabilities, to a file", shared=True),
    "rlhf": Command("rlhf", "rlhf", "train a model on answers of its own that a reward model judges"),
    "generate": Command("generate", "generate", "answer prompts with a model", shared=True),
    "rank": Command("rank", "rank", "put answers in order, best first, by a model's scores", shared=True),
    "merge": Command("merge", "merge", "merge an adapter into its base model"),
    "eval": Command("evaluate", "evaluate", "measure answers, or a model, against ranked references"),
    "compare": Command("compare", "compare", "two sets of answers, prompt by prompt"),
    "table2": Command("experiments", "table2", "methods x ranking lengths x seeds, trained and measured alike"),
    "ablate": Command("experiments", "ablate", "CLHA without each of its parts, and with other margins"),
    "noise": Command("experiments", "noise_command", "what noise in rewards or ranks does to methods"),
    "plan": Command("plan", "plan", "what a training step would need in memory, before there is one"),
    "env": Command("env", "env", "versions, devices, and which backend would run", shared=True),
}


def usage() -> str:
    """What `clha-fast --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: clha-fast COMMAND ...",
            "",
            *lines,
            "",
            "clha-fast COMMAND --help says more, clha-fast --version which this is; any command with --traceback shows "
            "where an error came from.\n",
        ]
    )


def run(name: str, words: Sequence[str]) -> int:
    """The exit status of a command, given what stands behind its name."""
    command = COMMANDS[name]
    processes = os.environ.get("WORLD_SIZE", "1")
    if not command.shared and processes != "1":
        raise ValueError(
            f"{name}: expected one process, got {processes} (WORLD_SIZE), each of which would do all of the work and "
            "write the same files; start it without torchrun or accelerate launch"
        )
    if command.checked:
        names.check_names(words)
    module = importlib.import_module(f"clha_fast.cli.{command.module}")
    return int(getattr(module, command.function)(words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed while running, 2 a user error (one sentence), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if words else USER_ERROR
    if words == ["--version"]:
        print(f"clha-fast {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(
            f"clha-fast: expected a command ({', '.join(COMMANDS)}), got {name!r}{nearest(name, COMMANDS)}",
            file=sys.stderr,
        )
        return USER_ERROR
    speak()  # until the command has options
    show = "--traceback" in rest
    rest = [word for word in rest if word != "--traceback"]
    # What a user can cause has a message that is a whole sentence; anything else is a bug and keeps its traceback.
    from clha_fast.errors import BackendError, out_of_memory
    from clha_fast.processes import ProcessError, waited_for_another

    try:
        with warnings_as_flags():
            return run(name, rest)
    except (ValueError, OSError, ImportError, BackendError) as error:
        if show:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        complain(name, text)
        return USER_ERROR
    except (MemoryError, RuntimeError) as error:
        ended = str(error) if isinstance(error, ProcessError) else waited_for_another(error)
        if show or not (ended or out_of_memory(error)):
            raise
        if ended:
            complain(name, ended)
            return FAILED
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        complain(
            name,
            f"out of memory ({reason}); {ways_to_need_less()}`clha-fast plan` says what a step needs; what was saved "
            "is still there",
        )
        return FAILED
    except KeyboardInterrupt:
        complain(name, "interrupted before anything was done")
        return 130


if __name__ == "__main__":
    sys.exit(main())
