"""`clha-fast plan`: what it takes and what it prints."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from clha_fast.batching.segments import LAYOUTS, RowTokens
from clha_fast.cli.text import Parser, with_dashes
from clha_fast.cli.values import read_value, twice
from clha_fast.models.loading import adapter_config
from clha_fast.planning.plan import GIB, Load, Plan, table, ways_to_fit
from clha_fast.planning.plan import plan as count
from clha_fast.planning.source import Source, read_source
from clha_fast.planning.step import BACKENDS, OPTIMIZERS, Switches

DESCRIPTION = (
    "What a training step needs on one device, before there is one: counted operator by operator from the model's "
    "configuration, without its weights. With --memory also which options would make it fit."
)
EPILOG = (
    "--peft_config.KEY VALUE counts an adapter as train makes it. Options that train has too may have its names: "
    "--max_prompt_length, --max_completion_length, --per_device_train_batch_size, --gradient_checkpointing (or "
    "--activation_checkpointing), --activation_checkpointing_kwargs.offload, --optim."
)
NOT_COUNTED = (
    "not counted: what the allocator and the driver keep for themselves, memory inside operators, attention that takes "
    "a mask [tokens, tokens] (a byte an element), and the frozen model of an objective with a reference (a copy's is "
    "the weights' memory once more)"
)
FLAGS = {
    "layout=shared": "--layout shared",
    "checkpointing": "--checkpointing true",
    "tiled_mlp": "--tiled-mlp",
    "offload": "--offload",
    "lora_rank=16": "--lora-rank 16",
}
TRAIN_PROMPTS = 8  # a step of training has so many unless told
# What `clha-fast train` calls it, beside the name here.
TRAIN_NAMES = {
    "--prompt": ("--max-prompt-length",),
    "--response": ("--max-completion-length",),
    "--prompts": ("--per-device-train-batch-size",),
    "--checkpointing": ("--gradient-checkpointing", "--activation-checkpointing"),  # an older and a newer transformers
    "--offload": ("--activation-checkpointing-kwargs.offload",),
    "--optimizer": ("--optim",),
}
_ADAPTER, _INIT = "--peft-config.", "--model-init-kwargs."


class _Parser(Parser):
    """With the names that train has beside each option's own."""

    def option(self, name: str, **settings: Any) -> None:
        self.add_argument(name, *TRAIN_NAMES.get(name, ()), dest=name[2:].replace("-", "_"), **settings)


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _tile(text: str) -> bool | int:
    return _switch(text) if text.lower() in ("true", "false") else int(text)


def _optimizer(text: str) -> str:
    """A key of `OPTIMIZERS`, or the name that transformers has for what keeps as much."""
    if text not in OPTIMIZERS and "adamw" in text:
        return "adamw_8bit" if "8bit" in text else "adamw"
    return text


def parser() -> _Parser:
    """The options of `clha-fast plan`, but for `--peft_config.KEY VALUE`."""
    made = _Parser(prog="clha-fast plan", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    option, switch = made.option, {"type": _switch, "nargs": "?", "const": True, "metavar": "true|false"}
    option(
        "--model", required=True, metavar="NAME", help="a folder with config.json or an adapter, or a name on the Hub"
    )
    option("--tokens", type=int, metavar="N", help="scored tokens of a micro-batch (or --response)")
    option("--candidates", type=int, default=4, metavar="N", help="responses a prompt (default 4)")
    option("--prompt", type=int, metavar="N", help="tokens of a prompt (default: as a response)")
    option("--response", type=int, metavar="N", help="tokens of a response (default: from --tokens)")
    option("--prompts", type=int, metavar="N", help="prompts of a micro-batch (default: from --tokens, or 1)")
    option(
        "--layout",
        choices=(*LAYOUTS, "auto"),
        default="padded",
        help="of the rows (default padded); auto: shared or padded, as training counts",
    )
    option("--sequence-parallel-size", type=int, default=1, metavar="N", help="processes that share each row's tokens")
    option("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights")
    option(
        "--lora-rank", type=int, metavar="R", help="train adapters alone (default: all weights, or a folder's adapter)"
    )
    option("--reward-model", **switch, help="of a reward model on --model (default: where it is one)")
    option("--checkpointing", default=True, **switch, help="gradient checkpointing (default true)")
    made.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="the same as false")
    option(
        "--tiled-mlp", nargs="?", type=_tile, const=True, default=False, metavar="ROWS", help="MLPs a tile at a time"
    )
    option("--offload", default=False, **switch, help="layer checkpoints in host memory")
    option("--optimizer", type=_optimizer, choices=tuple(OPTIMIZERS), default="adamw", help="(default adamw)")
    option("--backend", choices=BACKENDS, help="of the loss (default auto: what training takes on a GPU of --memory)")
    option("--workspace-mb", type=int, metavar="MIB", help="of the loss's logits, as in training (default: chosen)")
    option("--memory", type=float, metavar="GIB", help="of the device, e.g. 80")
    option("--json", action="store_true", help="print JSON, memory in bytes")
    return made


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The options; `peft_config` holds what stands behind `--peft_config.KEY`."""
    rest: list[str] = []
    adapter: dict[str, Any] = {}
    left = with_dashes(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name.startswith(_INIT):
            raise ValueError(
                f"--model_init_kwargs: expected none, for weights are counted in --dtype, whole, and the model as its "
                f"config.json has it, got --{name[2:].replace('-', '_')}; a folder with another "
                "config.json is enough"
            )
        if not name.startswith(_ADAPTER):
            rest.append(name + equals + value)
            continue
        if not equals and not left:
            raise ValueError(f"{name}: expected a value, got none")
        text, key = value if equals else left.pop(0), name[len(_ADAPTER) :].replace("-", "_")
        flag = f"--peft_config.{key}"
        if key in adapter:
            raise twice(flag, str(adapter[key]), text)
        adapter[key] = read_value(text, flag)
    args = parser().parse_args(rest)
    args.peft_config = adapter
    return args


def plan(words: Sequence[str]) -> int:
    """`clha-fast plan`: the exit status.

    Raises:
        ValueError, OSError, ImportError: a user error, in one sentence.
    """
    args = _parse(words)
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory: expected a positive number of GiB, got {args.memory}")
    load = _load(args)
    source = read_source(args.model)
    switches = _switches(args, source)
    config = source.config
    found = count(config, load, switches)
    way: tuple[list[str], Plan] | None = None
    if args.memory is not None and found.memory.total > args.memory * GIB:
        way = ways_to_fit(config, load, switches, int(args.memory * GIB))
    if args.json:
        more = {"train": _train_options(args, found), "quantised": source.quantised}
        print(json.dumps({**_as_dict(args, found, way), **more}, indent=2))
    else:
        print("\n".join([_text(args, found, way), *_beyond(config, load), *_said_of_weights(source, args.dtype)]))
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
    layout = RowTokens.of([(prompt, [response] * args.candidates)]).layout if args.layout == "auto" else args.layout
    size = args.sequence_parallel_size
    return Load(1 if prompts is None else prompts, args.candidates, prompt, response, layout, size)


def _switches(args: argparse.Namespace, source: Source) -> Switches:
    if args.lora_rank is not None and args.lora_rank < 1:
        raise ValueError(f"--lora-rank: expected a positive whole number, got {args.lora_rank}")
    if args.offload and not args.checkpointing:
        raise ValueError(
            "--offload: expected gradient checkpointing, whose checkpoints it offloads, got --no-checkpointing"
        )
    if args.workspace_mb is not None and args.workspace_mb < 1:
        raise ValueError(f"--workspace-mb: expected a positive number of MiB, got {args.workspace_mb}")
    reward = source.is_classifier if args.reward_model is None else args.reward_model
    if source.is_classifier and not reward:
        raise ValueError(f"--reward-model: expected true for a classifier, which {args.model} is, got false")
    for name in ("backend", "workspace_mb"):
        if reward and getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}: expected none for a reward model, whose loss has no vocabulary, got {getattr(args, name)}"
            )
    if reward and args.tiled_mlp is not False:
        raise ValueError(f"--tiled-mlp: expected none for a reward model, whose trainer has none, got {args.tiled_mlp}")
    adapter = source.adapter
    if adapter is not None:
        given = [
            f"--{name}"
            for name in ("lora-rank", "peft_config", "reward-model")
            if getattr(args, name.replace("-", "_"))
        ]
        if given:
            raise ValueError(f"{given[0]}: expected a whole model for it, got {args.model}, an adapter's folder")
    elif args.peft_config:
        if args.lora_rank is not None:
            raise ValueError("--lora-rank: expected one of it and --peft_config.r, got both")
        adapter = adapter_config({"task_type": "SEQ_CLS" if reward else "CAUSAL_LM", **args.peft_config})
    return Switches(
        dtype=getattr(torch, args.dtype),
        lora_rank=args.lora_rank,
        adapter=adapter,
        reward_model=reward,
        checkpointing=args.checkpointing,
        tiled_mlp=args.tiled_mlp,
        offload=args.offload,
        optimizer=args.optimizer,
        backend=args.backend or "auto",
        memory=None if args.memory is None else int(args.memory * GIB),
        workspace_bytes=None if args.workspace_mb is None else args.workspace_mb << 20,
    )


def _as_dict(args: argparse.Namespace, found: Plan, way: tuple[list[str], Plan] | None) -> dict[str, object]:
    said: dict[str, object] = {"model": args.model, **found.as_dict()}
    if args.memory is not None:
        said |= {"memory": int(args.memory * GIB), "fits": found.memory.total <= args.memory * GIB}
    if way is not None:
        names, changed = way
        fits = changed.memory.total <= args.memory * GIB
        said["with"] = {
            "options": [FLAGS[name] for name in names],
            "train": _train_options(args, changed),
            "fits": fits,
            **changed.as_dict(),
        }
    return said


def _train_options(args: argparse.Namespace, found: Plan) -> list[str]:
    """What training has to be given for what is counted, whose defaults are others; lengths are the data's."""
    load, switches = found.load, found.switches
    options = []
    if switches.dtype != torch.float32:
        options.append(f"--dtype {str(switches.dtype).removeprefix('torch.')}")
    if switches.offload:
        options += ["--activation_checkpointing true", "--activation_checkpointing_kwargs.offload true"]
    elif switches.checkpointing:
        options.append("--gradient_checkpointing true")
    if load.prompts != TRAIN_PROMPTS:
        options.append(f"--per_device_train_batch_size {load.prompts}")
    if load.layout != "padded":
        options.append(f"--layout {load.layout}")
    if switches.tiled_mlp is not False:
        options.append(f"--tiled_mlp {str(switches.tiled_mlp).lower()}")
    if switches.lora_rank is not None:
        options.append(f"--peft_config.r {switches.lora_rank} --peft_config.target_modules all-linear")
    if args.peft_config:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in args.peft_config.items()}
        options.append(" ".join(f"--peft_config.{key} {shlex.quote(text)}" for key, text in texts.items()))
    if switches.optimizer != "adamw":
        options.append(f"--optim {switches.optimizer}")
    if switches.backend != "auto":
        options.append(f"--backend {switches.backend}")
    if args.workspace_mb is not None:
        options.append(f"--workspace_mb {args.workspace_mb}")
    if load.sequence_parallel_size > 1:
        options.append(f"--sequence_parallel_size {load.sequence_parallel_size}")
    return options


def _in_train(args: argparse.Namespace, found: Plan) -> list[str]:
    options = _train_options(args, found)
    if not options:
        return []
    return [
        f"counted is training with {' '.join(options)}: its defaults are float32, no checkpointing and "
        f"{TRAIN_PROMPTS} prompts"
    ]


def _beyond(config: Any, load: Load) -> list[str]:
    """A line for texts that are longer than the model has positions for."""
    longest, limit = load.prompt + load.response, getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or not 0 < limit < longest:
        return []
    return [f"texts of {longest:,} tokens are beyond the model's {limit:,} positions: training cuts, warns or refuses"]


def _said_of_weights(source: Source, dtype: str) -> list[str]:
    """A line for weights that are quantised in their files."""
    if source.quantised is None:
        return []
    whose = "the base model's" if source.adapter is not None else "the model's"
    return [
        f"{whose} files hold quantised weights ({source.quantised}), which are counted in {dtype}, as they are once "
        "dequantised; kept as they are they need less, and only an adapter trains"
    ]


def _kind(found: Plan) -> str:
    kind = "a reward model" if found.switches.reward_model else "a language model"
    adapter = found.switches.adapter
    return kind if adapter is None else f"{kind} with an adapter ({adapter.peft_type.value})"


def _text(args: argparse.Namespace, found: Plan, way: tuple[list[str], Plan] | None) -> str:
    load, rows = found.load, found.load.rows
    lines = [
        f"{args.model}, {_kind(found)}: {found.parameters:,} weights in {args.dtype}, of which {found.trained:,} train",
        f"{load.prompts} x {load.candidates} candidates of {load.response:,} tokens behind prompts of {load.prompt:,}: "
        f"{rows.scored:,} scored tokens; {load.layout}: {rows.rows} x {rows.width:,} tokens run"
        + (f", {load.slices.width:,} of each row in a process" if load.sequence_parallel_size > 1 else ""),
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
            lines.append(f"fits with {options}: {most}; in training {' '.join(_train_options(args, changed))}")
        else:
            lines.append(f"with {options} still {most}: fewer tokens a micro-batch, or more devices")
    if found.switches.backend == "auto" and found.switches.memory is None and found.backend:
        lines.append("the loss: as auto takes it on a GPU with room for it; --memory GIB says which it takes there")
    return "\n".join([*lines, *_in_train(args, found), NOT_COUNTED])
