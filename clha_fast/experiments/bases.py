"""What a comparison starts from: a base language model and reward models, loaded, or first made from its own data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from clha_fast.data.readers import read_records
from clha_fast.data.records import RankedRecord
from clha_fast.data.rendering import plain_template
from clha_fast.experiments.cells import MODEL, content_hash, digest
from clha_fast.experiments.comparison import Comparison
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.files import write_json

_DONE = "done.json"


def ready_base(comparison: Comparison, say: Callable[[str], None]) -> str:
    """The base model's folder or name; with `pretrain` it is first trained on the texts of the training files.

    Prompts and responses are one text each there, all of whose tokens are scored: a language model, which knows
    nothing of ranks.
    """
    if comparison.base is not None:
        return comparison.base
    assert comparison.pretrain is not None
    given = dict(comparison.pretrain)
    trains = sorted({files.train for files in comparison.data.values()})
    identity = {"pretrain": given, "train": [content_hash(path) for path in trains]}
    folder = os.path.join(comparison.output_dir, "base", digest(identity))
    model = os.path.join(folder, MODEL)
    if os.path.isfile(os.path.join(folder, _DONE)):
        return model
    say(f"base model: a language model of {', '.join(map(os.path.basename, trains))}")
    os.makedirs(folder, exist_ok=True)
    texts = os.path.join(folder, "texts.jsonl")
    write_texts(trains, texts)
    fields = ("model_config", "build_tokenizer", "tokenizer", "model", "dtype", "attn_implementation")
    options = RunOptions(
        train_file=texts,
        eval_fraction=given.pop("eval_fraction", 0.02),
        resume=os.path.isdir(model) and bool(os.listdir(model)),
        **{name: given.pop(name) for name in fields if name in given},
    )
    settings: dict[str, Any] = {"objective": {"name": "sft", "form": "token_mean"}, **given, "output_dir": model}
    run = Run(options, settings).prepare()
    run.evaluate_before()
    run.train()
    if run.interrupted:
        raise KeyboardInterrupt
    run.report()
    nll = {name: found.get("eval_sft_loss") for name, found in (("before", run.before), ("after", run.after))}
    write_json(os.path.join(folder, _DONE), {**identity, "held_out_nll": nll, "steps": run.trainer.state.global_step})
    say(f"base model: {nll['before']:.3g} -> {nll['after']:.3g} nats a token, held out")
    return model


def write_texts(trains: list[str], path: str) -> None:
    """One record a (prompt, response), without a prompt: the whole conversation is the response."""
    seen: set[str] = set()
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for train in trains:
            for record in read_records(train):
                for text in conversation_texts(record):
                    if text not in seen:
                        seen.add(text)
                        line = {"prompt": "", "completions": [text]}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def conversation_texts(record: RankedRecord) -> list[str]:
    """The prompt, as the plain template writes it, and each response behind it."""
    prompt = record.prompt if isinstance(record.prompt, str) else plain_template(record.prompt)
    return [prompt + completion for completion in record.completions]


def ready_reward_models(comparison: Comparison, say: Callable[[str], None]) -> Mapping[str, str]:
    """ "label" and "evaluation" -> folder or name, for those that the comparison has."""
    raise NotImplementedError
