"""The command line: `clha-fast train | demo | env | convert | score | reward-model | rlhf`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clha_fast.cli import names
from clha_fast.cli.text import as_flags

USAGE = """\
usage: clha-fast COMMAND ...

  train    train a causal language model on ranked responses (clha-fast train --help)
  demo     the same on the bundled data, in a few minutes on a CPU
  env      versions, devices, and which backend would run
  convert  rewrite a file of ranked responses as canonical JSON Lines
  score    add a reward model's rewards to a file of responses, and measure the noise
  reward-model train
           make such a reward model from ranked responses
  rlhf     train a model on answers of its own that a reward model judges

Any command with --traceback shows where an error came from.
"""
USER_ERROR = 2


def _convert(words: Sequence[str]) -> int:
    from clha_fast.cli import data

    return data.convert(words)


def _env(words: Sequence[str]) -> int:
    from clha_fast.cli import env

    return env.env(words)


def _train(words: Sequence[str]) -> int:
    names.check_names(words)  # before seconds of imports
    from clha_fast.cli import train as cli_train

    return cli_train.train(words)


def _demo(words: Sequence[str]) -> int:
    names.check_names(words)
    from clha_fast.cli import train as cli_train

    return cli_train.demo(words)


def _score(words: Sequence[str]) -> int:
    from clha_fast.cli import score as cli_score

    return cli_score.score(words)


def _reward_model(words: Sequence[str]) -> int:
    from clha_fast.cli import reward_model as cli_reward_model

    return cli_reward_model.reward_model(words)


def _rlhf(words: Sequence[str]) -> int:
    from clha_fast.cli import rlhf as cli_rlhf

    return cli_rlhf.rlhf(words)


COMMANDS = {
    "train": _train,
    "demo": _demo,
    "env": _env,
    "convert": _convert,
    "score": _score,
    "reward-model": _reward_model,
    "rlhf": _rlhf,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed while running, 2 a user error (one sentence), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else USER_ERROR
    name, *rest = words
    if name not in COMMANDS:
        print(f"clha-fast: expected a command ({', '.join(COMMANDS)}), got {name!r}", file=sys.stderr)
        return USER_ERROR
    show = "--traceback" in rest
    rest = [word for word in rest if word != "--traceback"]
    # What a user can cause has a message that is a whole sentence; anything else is a bug and keeps its traceback.
    from clha_fast.errors import BackendError

    try:
        return COMMANDS[name](rest)
    except (ValueError, OSError, ImportError, BackendError) as error:
        if show:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"clha-fast {name}: {as_flags(' '.join(text.split()))}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"clha-fast {name}: interrupted before anything was done", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
