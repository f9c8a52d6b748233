"""`clha-fast generate MODEL --chat`: a line in, an answer out, on a terminal or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator

from clha_fast.data.records import RecordError
from clha_fast.generation.chat import Chat, Reply

HELP = "/reset forgets the conversation, /quit or the end of the file ends it, Ctrl-C ends an answer"
_COMMANDS = ("/reset", "/quit", "/help")
# Options of whole files of prompts, by attribute.
_OF_FILES = ("prompts", "destination", "format", "skip_bad_records", "batch_size", "limit", "resume", "overwrite")


def check_chat(args: argparse.Namespace, parser: argparse.ArgumentParser, columns: object) -> None:
    """ValueError for options that a conversation does not have, and for its own without one."""
    if args.chat:
        given = [name for name in _OF_FILES if getattr(args, name) != parser.get_default(name)]
        if given or columns:
            name = {"prompts": "PROMPTS", "destination": "OUT"}.get(given[0], given[0]) if given else "columns"
            flag = name if name.isupper() else f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected none with --chat, which reads lines and writes no file")
        for name in ("system", "lead", "chat_template_kwargs") if args.no_history else ():
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected none with --no-history, got {getattr(args, name)!r}"
                )
        return
    for name in ("system", "no_history"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: expected none without --chat, got {getattr(args, name)!r}")
    if args.prompts is None or args.destination is None:
        name = "PROMPTS" if args.prompts is None else "OUT"
        raise ValueError(f"{name}: expected PROMPTS and OUT, two files, or --chat, got no {name}")


def converse(chat: Chat) -> int:
    """Answers go to standard output, all else to standard error; the exit status."""
    terminal, said = sys.stdin.isatty(), ""
    _note(HELP)
    for line in _lines(terminal):
        word = line.strip()
        if not word:
            continue
        if word == "/quit":
            break
        if word == "/reset":
            chat.reset()
            _note("(the conversation begins anew)")
        elif word.startswith("/") and " " not in word:
            _note(HELP if word == "/help" else f"{word}: expected one of {', '.join(_COMMANDS)}; nothing was sent")
        else:
            _answer(chat, line)
            if chat.said != said:
                said = chat.said
                if said:
                    _note(f"({said})")
    return 0


def _answer(chat: Chat, line: str) -> None:
    dropped = 0 if not chat.messages else None
    try:
        reply = chat.say(line, _show)
    except (RecordError, ValueError) as error:  # this line alone
        _note(f"({' '.join(str(error).split())})")
        return
    print(flush=True)
    _say_end(reply, dropped)


def _say_end(reply: Reply, dropped: int | None) -> None:
    if reply.finish == "length":
        _note("(cut: nothing ended it within --max-new-tokens, or the model's positions)")
    elif reply.finish == "interrupted":
        _note("(interrupted)")
    if not reply.text:
        _note("(an empty answer, which is not kept in the conversation)")
    if reply.cut:
        _note(f"(the line is too long: the model read the last {reply.cut:,} tokens)")
    if reply.dropped and dropped is None:
        _note(f"(the conversation is too long for the model: {reply.dropped:,} turns were left out)")


def _lines(terminal: bool) -> Iterator[str]:
    if terminal:
        with contextlib.suppress(ImportError):  # not on every system; input() then has no history
            importlib.import_module("readline")
    while True:
        try:
            if terminal:
                yield input("> ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
                yield line.rstrip("\n")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not terminal:
                return
            _note("\n(/quit ends)")


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
