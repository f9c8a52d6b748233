"""`clha-fast plan`: what it takes and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from clha_fast.batching.segments import LAYOUTS
from clha_fast.cli.text import Parser, with_dashes
from clha_fast.models.loading import load_config
from clha_fast.planning.plan import GIB, Load, Plan, table, ways_to_fit
from clha_fast.planning.plan import plan as count
from clha_fast.planning.step import OPTIMIZERS, Switches

DESCRIPTION = (
    "What a training step needs on one device, before there is one: counted operator by operator from the model's "
    "configuration, without its weights. With --memory also which options would make it fit."
)
NOT_COUNTED = (
    "not counted: what the allocator and the driver keep for themselves, memory inside operators, and attention that "
    "takes a mask [tokens, tokens] (a byte an element)"
)
FLAGS = {
    "layout=shared": "--layout shared",
    "checkpointing": "without --no-checkpointing",
    "tiled_mlp": "--tiled-mlp",
    "offload": "--offload",
    "lora_rank=16": "--lora-rank 16",
}


def plan(words: Sequence[str]) -> int:
    """`clha-fast plan`: the exit status.

    Raises:
        ValueError, OSError, ImportError: a user error, in one sentence.
    """
    parser = Parser(prog="clha-fast plan", description=DESCRIPTION)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a folder with config.json, or a name on the Hub"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="scored tokens of a micro-batch (or --response)")
    parser.add_argument("--candidates", type=int, default=4, metavar="N", help="responses a prompt (default 4)")
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (default: as a response)")
    parser.add_argument("--response", type=int, metavar="N", help="tokens of a response (default: from --tokens)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="prompts of a micro-batch (default: from --tokens, or 1)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="padded", help="of the rows (default padded)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="train adapters alone (default: all weights)")
    parser.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")
    parser.add_argument(
        "--tiled-mlp", nargs="?", type=int, const=True, default=False, metavar="ROWS", help="MLPs a tile at a time"
    )
    parser.add_argument("--offload", action="store_true", help="layer checkpoints in host memory")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="(default adamw)")
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton", help="of the loss (default triton)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of the device, e.g. 80")
    parser.add_argument("--json", action="store_true", help="print JSON, memory in bytes")
    args = parser.parse_args(with_dashes(words))
    load, switches = _load(args), _switches(args)
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory: expected a positive number of GiB, got {args.memory}")
    config = load_config(args.model)
    found = count(config, load, switches)
    way: tuple[list[str], Plan] | None = None
    if args.memory is not None and found.memory.total > args.memory * GIB:
        way = ways_to_fit(config, load, switches, int(args.memory * GIB))
    if args.json:
        print(json.dumps(_as_dict(args, found, way), indent=2))
    else:
        print(_text(args, found, way))
    return 0


def _load(args: argparse.Namespace) -> Load:
    response, prompts = args.response, args.prompts
    if args.tokens is None and response is None:
        raise ValueError("--tokens: expected the scored tokens of a micro-batch, or --response, got neither")
    if args.candidates < 1:
        raise ValueError(f"--candidates: expected a positive whole number, got {args.candidates}")
    if args.tokens is not None:
        if response is not None and prompts is not None:
            raise ValueError("--tokens: expected two of --tokens, --response and --prompts at the most, got all three")
        known = args.candidates * (response or prompts or 1)
        if args.tokens < 1 or known < 1 or args.tokens % known:
            raise ValueError(
                f"--tokens: expected a positive multiple of {args.candidates} candidates"
                f"{f' of {response} tokens' if response else f' of {prompts} prompts' if prompts else ''}, "
                f"got {args.tokens}"
            )
        if response is None:
            response = args.tokens // known
        else:
            prompts = args.tokens // known
    prompt = response if args.prompt is None else args.prompt
    return Load(1 if prompts is None else prompts, args.candidates, prompt, response, args.layout)


def _switches(args: argparse.Namespace) -> Switches:
    if args.lora_rank is not None and args.lora_rank < 1:
        raise ValueError(f"--lora-rank: expected a positive whole number, got {args.lora_rank}")
    if args.offload and args.no_checkpointing:
        raise ValueError(
            "--offload: expected gradient checkpointing, whose checkpoints it offloads, got --no-checkpointing"
        )
    return Switches(
        dtype=getattr(torch, args.dtype),
        lora_rank=args.lora_rank,
        checkpointing=not args.no_checkpointing,
        tiled_mlp=args.tiled_mlp,
        offload=args.offload,
        optimizer=args.optimizer,
        backend=args.backend,
    )


def _as_dict(args: argparse.Namespace, found: Plan, way: tuple[list[str], Plan] | None) -> dict[str, object]:
    said: dict[str, object] = {"model": args.model, **found.as_dict()}
    if args.memory is not None:
        said |= {"memory": int(args.memory * GIB), "fits": found.memory.total <= args.memory * GIB}
    if way is not None:
        names, changed = way
        fits = changed.memory.total <= args.memory * GIB
        said["with"] = {"options": [FLAGS[name] for name in names], "fits": fits, **changed.as_dict()}
    return said


def _text(args: argparse.Namespace, found: Plan, way: tuple[list[str], Plan] | None) -> str:
    load, rows = found.load, found.load.rows
    lines = [
        f"{args.model}: {found.parameters:,} weights in {args.dtype}, of which {found.trained:,} train",
        f"{load.prompts} x {load.candidates} candidates of {load.response:,} tokens behind prompts of {load.prompt:,}: "
        f"{rows.scored:,} scored tokens; {load.layout}: {rows.rows} x {rows.width:,} tokens run",
        "",
        table(found),
        "",
    ]
    if args.memory is not None:
        verdict = "fits" if found.memory.total <= args.memory * GIB else "does not fit"
        lines.append(f"{verdict} in {args.memory:g} GiB")
    if way is not None:
        names, changed = way
        options = ", ".join(FLAGS[name] for name in names) or "no option of this list"
        most, host = (f"{size / GIB:.2f} GiB" for size in (changed.memory.total, changed.memory.host))
        most += f", and {host} in host memory" if changed.memory.host else ""
        if changed.memory.total <= args.memory * GIB:
            lines.append(f"fits with {options}: {most}")
        else:
            lines.append(f"with {options} still {most}: fewer tokens a micro-batch, or more devices")
    return "\n".join([*lines, NOT_COUNTED])
