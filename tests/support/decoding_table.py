"""How each causal language model of transformers answers: with its cache, without it, one prompt a batch, or refused.

``python -m tests.support.decoding_table --write PATH`` walks `MODEL_FOR_CAUSAL_LM_MAPPING`, tiny and random, and
renders the list as Markdown; ``--types llama moshi`` takes some. What is said is what `Decoding` says of rollouts.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clha_fast.generation.decoding import Decoding
from tests.support.architecture_configs import FREE_TOKENS, shrink
from tests.support.architectures import SECONDS, build

SETTING = "batch_size"
NEW = 16
# Alone, and beside a shorter one; longer than the windows of the tiny models.
PROMPTS = ((17,), (24, 3))


def verdict(model: object, sizes: tuple[int, ...]) -> str:
    """What is decided of prompts of these sizes."""
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(*FREE_TOKENS, (size,), generator=draw).tolist() for size in sizes]
    decoding = Decoding(SETTING, trained=True)
    asked = {"ends": [], "pad": 0, "max_new_tokens": NEW, "temperature": 1.0, "seeds": range(len(sizes))}
    try:
        decoding.answer(model, prompts, **asked)  # type: ignore[arg-type]
    except ValueError as error:
        if str(error).startswith(f"{SETTING}: expected 1"):
            return "one prompt a batch"
        if str(error).startswith("model: expected one whose answers"):
            return "refused"
        return f"{type(error).__name__} of transformers"
    except Exception as error:  # whatever transformers raises is the answer
        return f"{type(error).__name__} of transformers"
    return "cache" if all(tried.use_cache for tried in decoding.tried.values()) else "no cache"


def _child(model_type: str, connection: Connection) -> None:
    logging.getLogger("clha_fast").setLevel(logging.ERROR)
    try:
        model = build(shrink(model_type, tied=False))
    except Exception:  # `architectures` says why
        connection.send(("not buildable",) * len(PROMPTS))
        return
    connection.send(tuple(verdict(model, sizes) for sizes in PROMPTS))


def walk(types: list[str]) -> dict[str, tuple[str, ...]]:
    """By model type what is decided of each of `PROMPTS`, every type in a process of its own."""
    context = multiprocessing.get_context("fork")
    build(shrink("llama", tied=False))  # imports what every model imports
    found: dict[str, tuple[str, ...]] = {}
    for model_type in types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(model_type, sender))
        process.start()
        sender.close()
        try:
            found[model_type] = receiver.recv() if receiver.poll(SECONDS) else ("too slow",) * len(PROMPTS)
        except EOFError:
            found[model_type] = ("its process died",) * len(PROMPTS)
        process.kill()
        process.join()
        print(f"{model_type:25} {' | '.join(found[model_type])}", flush=True)
    return found


def render(found: dict[str, tuple[str, ...]]) -> str:
    """The list as Markdown."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for model_type, verdicts in sorted(found.items()):
        groups[verdicts].append(model_type)
    most = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [f"| {alone} | {padded} | {len(types)} | {', '.join(types)} |" for (alone, padded), types in most]
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}"
    ((one,), (long, short)) = PROMPTS
    return f"""# How models answer

Written by `python -m tests.support.decoding_table --write docs/decoding.md` with
{versions}: what rollouts decide of {len(found)} model types, tiny and random, in float32 on
the CPU, for {NEW} tokens behind a prompt of {one}, and behind prompts of {long} and {short} in one batch
([why, and what is compared](evaluation.md#answers-that-are-the-models-own)).

- *cache*: answers are made with transformers' cache, and are the model's own.
- *no cache*: with the cache they are others; they are made without, which takes longer, and that is said.
- *one prompt a batch*: beside a longer prompt the model reads padding as text; more than one a batch is refused.
- *refused*: neither way are they drawn from what the forward of a whole text gives. `clha-fast generate`, `--chat` and
  samples answer all the same, and say so.
- An error of transformers may be one of the tiny configuration.

| a prompt alone | beside another length | number | types |
|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--write", type=Path, help="render the list as Markdown there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = walk(arguments.types)
    if arguments.write:
        arguments.write.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
