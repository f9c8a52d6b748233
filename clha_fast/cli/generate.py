"""`clha-fast generate`: what it takes and what it prints; its options are those of `clha-fast eval --model` too."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from clha_fast.cli.chat import check_chat, converse
from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.guard import guarded, launched, parse
from clha_fast.cli.reading import add_skip_argument, read_asked, use
from clha_fast.cli.text import Parser, check_positive, size_text
from clha_fast.data import FORMATS
from clha_fast.data.prompts import Prompted
from clha_fast.files import check_destination
from clha_fast.generation.answers import Generation, generate_answers
from clha_fast.generation.backend import GenerationSettings
from clha_fast.generation.chat import Chat
from clha_fast.generation.hf import TransformersBackend, load_backend
from clha_fast.generation.prompts import encode_prompts, trained_lead, trained_prefix
from clha_fast.models.adapters import base_model
from clha_fast.models.loading import DTYPES
from clha_fast.processes import ALONE, Processes, joined

DESCRIPTION = "Answer prompts with a causal language model; one JSON object a line, in the order of the prompts."
PLAIN = GenerationSettings()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of how a model answers."""
    parser.add_argument(
        "--backend", choices=["hf"], default="hf", help="what runs the model (others: docs/evaluation.md)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=PLAIN.max_new_tokens, metavar="N", help="of an answer (default 128)"
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        default=PLAIN.max_prompt_length,
        metavar="N",
        help="tokens of a prompt, cut on the left behind its BOS (default 384)",
    )
    parser.add_argument("--temperature", type=float, default=PLAIN.temperature, metavar="T", help="0 (default): greedy")
    parser.add_argument(
        "--top-p", type=float, default=PLAIN.top_p, metavar="P", help="nucleus to draw from (default 1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws, with each prompt's own text (default 0)")
    parser.add_argument(
        "--answer-prefix",
        metavar="TEXT",
        help="what answers begin with, not returned (default: the good marker of a run of `coh`, else nothing)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends an answer, may be repeated (default: the chat template's end of turn, or both speakers' names)",
    )
    parser.add_argument(
        "--lead",
        metavar="TEXT",
        help="what prompts of messages end with, behind the chat template's generation prompt: '' is as a server asks "
        "(default: what the model's run trained behind; where none is known, as training on the prompt's own responses "
        "has it, or nothing)",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""variables of the chat template for what is asked, as '{"enable_thinking": false}'; a row's own win""",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts a batch (default 8)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts alone")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU where there is one), cpu, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)} (auto: the checkpoint's own)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from its .partial file")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def check_lead(lead: str | None) -> None:
    """ValueError for line breaks that a shell has left as backslashes."""
    if lead is not None and "\\n" in lead:
        raise ValueError(
            f"--lead: expected line breaks as they are, in a shell $'...\\n...', got a backslash and an n: {lead}"
        )


def settings_of(args: argparse.Namespace, model: str) -> GenerationSettings:
    """The settings of these options; prefix and lead are by default those of the run which trained the model.

    Raises:
        ValueError: a value out of range.
    """
    check_positive(args, ("batch_size", "limit"))
    if args.seed is not None and not args.temperature:
        raise ValueError(f"--seed: expected none with temperature 0, which draws nothing, got {args.seed}")
    check_lead(args.lead)
    return GenerationSettings(
        max_new_tokens=args.max_new_tokens,
        max_prompt_length=args.max_prompt_length,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed or 0,
        answer_prefix=trained_prefix(model) if args.answer_prefix is None else args.answer_prefix,
        stop=None if args.stop is None else tuple(args.stop),
        lead=trained_lead(model) if args.lead is None else args.lead,
        chat_template_kwargs=_variables(args.chat_template_kwargs),
    )


def _variables(given: str | None) -> dict[str, Any]:
    try:
        found = {} if given is None else json.loads(given)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"""--chat-template-kwargs: expected a JSON object such as '{{"name": 1}}', got {given!r}""")
    return found


def model_text(model: Any, path: str) -> str:
    """A line for a model that is used as it is."""
    size = sum(weight.numel() for weight in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{path}: {type(base_model(model)).__name__}, {size_text(size)} parameters, {dtype} on {model.device}"


def answer(
    args: argparse.Namespace,
    backend: TransformersBackend,
    path: str,
    records: Sequence[Prompted],
    settings: GenerationSettings,
    destination: str | None,
    processes: Processes = ALONE,
) -> Generation:
    """`generate_answers` to the records of the file `path`, with what is to be said before and after."""
    how = f"temperature {settings.temperature:g}, seed {settings.seed}" if settings.temperature else "greedy"
    print(f"answers       {how}, at most {settings.max_new_tokens:,} tokens")
    say_prefix(args, settings)
    how_run = {name: getattr(args, name) for name in ("batch_size", "resume", "overwrite")}
    found = use(
        args,
        path,
        records,
        lambda records: generate_answers(records, backend, destination, settings, processes=processes, **how_run),
        lambda record: encode_prompts([record], backend.tokenizer, settings, backend.max_positions),
    )
    place = "written" if destination else "not kept"
    where = destination or "for want of --out"
    print(f"{place:<14}{where}: {_result_text(found, settings)}", flush=True)
    if found.said:
        print(f"template      {found.said}", flush=True)
    return found


def say_prefix(args: argparse.Namespace, settings: GenerationSettings) -> None:
    """A line for what answers begin with, where it is anything."""
    if settings.answer_prefix:
        why = " (the model was trained behind it)" if args.answer_prefix is None else ""
        print(f"prefix        every answer begins with {settings.answer_prefix!r}{why}", flush=True)


def _result_text(found: Generation, asked: GenerationSettings) -> str:
    used = found.settings
    parts = [f"{len(found.answers):,} answers, {found.empty:,} empty, {found.unfinished:,} that nothing ended"]
    if found.cut:
        parts.append(f"{found.cut:,} prompts were cut to {used.max_prompt_length:,} tokens")
    if used.max_new_tokens != asked.max_new_tokens:
        parts.append(f"the model's positions left {used.max_new_tokens:,} new tokens")
    if found.resumed:
        parts.append(f"{found.resumed:,} prompts had been answered before")
    return "; ".join(parts)


def _chat(args: argparse.Namespace) -> int:
    processes = joined().world
    if processes != 1:
        raise ValueError(f"--chat: expected one process, got {processes} (WORLD_SIZE)")
    settings = settings_of(args, args.model)
    backend = load_backend(args.model, device=args.device, dtype=args.dtype)
    chat = Chat(backend, settings, args.system, not args.no_history)
    print(f"model         {model_text(backend.model, args.model)}", file=sys.stderr)
    return converse(chat)


def generate(words: Sequence[str]) -> int:
    """`clha-fast generate`: the exit status.

    Raises:
        ValueError, OSError: a user error, in one sentence.
    """
    parser = Parser(prog="clha-fast generate", description=DESCRIPTION, epilog=COLUMNS_HELP)
    parser.add_argument("model", metavar="MODEL", help="a causal language model or adapter: its folder, or a name")
    parser.add_argument(
        "prompts", metavar="PROMPTS", nargs="?", help="ranked responses in any known format, or prompts alone"
    )
    parser.add_argument("destination", metavar="OUT", nargs="?", help="the JSON Lines file to write")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="talk to the model instead: a line, an answer as it is written, a line, ... (answers to standard output)",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="of --chat: the conversation's first message")
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="of --chat: each line is a text prompt of its own, for a model that was trained on prompts as texts",
    )
    parser.add_argument("--format", default="auto", help=f"auto (default), {', '.join(FORMATS)}")
    add_skip_argument(parser)
    add_model_arguments(parser)
    parser.set_defaults(max_prompt_length=None)
    with launched() as processes:
        words, columns = take_columns(words)
        args = parse(parser, words)
        check_chat(args, parser, columns)
        if args.max_prompt_length is None and not args.chat:  # a conversation may be as long as the model's positions
            args.max_prompt_length = PLAIN.max_prompt_length

        def work() -> int:
            if args.chat:
                return _chat(args)
            settings = settings_of(args, args.model)
            check_destination(args.destination, resume=args.resume, overwrite=args.overwrite)
            processes.choose_device(args.device)
            records = read_asked(args, args.prompts, columns)[: args.limit]
            backend = load_backend(args.model, device=args.device, dtype=args.dtype)
            print(f"model         {model_text(backend.model, args.model)}")
            print(f"prompts       {args.prompts}: {len(records):,}")
            answer(args, backend, args.prompts, records, settings, args.destination, processes)
            return 0

        return guarded("generate", work)
