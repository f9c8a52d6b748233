"""The command line: `clha-fast train | demo | env | convert | score`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence

USAGE = """\
usage: clha-fast COMMAND ...

  train    train a causal language model on ranked responses (clha-fast train --help)
  demo     the same on the bundled data, in a few minutes on a CPU
  env      versions, devices, and which backend would run
  convert  rewrite a file of ranked responses as canonical JSON Lines
  score    add a reward model's rewards to a file of responses, and measure the noise

Any command with --traceback shows where an error came from.
"""
PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "datasets", "flash-attn", "matplotlib")
USER_ERROR = 2


def _convert(words: Sequence[str]) -> int:
    from clha_fast.data import FORMATS, convert

    parser = argparse.ArgumentParser(
        prog="clha-fast convert", description="Rewrite ranked responses as canonical JSON Lines."
    )
    parser.add_argument("source", metavar="SRC", help="JSON Lines, a JSON list (either may be .gz), or .parquet")
    parser.add_argument("destination", metavar="DST", help="the JSON Lines file to write")
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    parser.add_argument(
        "--rank-by-reward", "--rank_by_reward", action="store_true", help="order responses by reward, highest first"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    given = parser.parse_args(words)
    counts = convert(given.source, given.destination, given.format, given.rank_by_reward, overwrite=given.overwrite)
    print(
        f"{given.destination}: {counts.records:,} records, {counts.completions:,} responses, "
        f"{counts.with_rewards:,} records with rewards"
    )
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _env(words: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="clha-fast env", description="Versions, devices, backend.").parse_args(words)
    import torch

    from clha_fast import __version__
    from clha_fast.cli.train import backend_text, device_text

    lines = {"clha-fast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    lines |= {name: _version(name) for name in PACKAGES}
    lines["torch"] = torch.__version__  # the build, too: a package's own version may leave out +cu130
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines["device"] = device_text(device)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        lines[f"cuda:{number}"] = f"{name}, sm_{major}{minor}, {free >> 20:,} of {total >> 20:,} MiB free"
    lines["backend"] = backend_text("auto", device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print("\n".join(f"{name:<13} {text}" for name, text in lines.items()))
    return 0


def _train(words: Sequence[str]) -> int:
    from clha_fast.cli import train as cli_train

    return cli_train.train(words)


def _demo(words: Sequence[str]) -> int:
    from clha_fast.cli import train as cli_train

    return cli_train.demo(words)


def _score(words: Sequence[str]) -> int:
    from clha_fast.cli import score as cli_score

    return cli_score.score(words)


COMMANDS = {"train": _train, "demo": _demo, "env": _env, "convert": _convert, "score": _score}


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
    from clha_fast.evaluation.tables import as_flags

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
