"""What a comparison starts from: a base language model and reward models, loaded, or first made from its own data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PrinterCallback

from clha_fast.data.records import RankedRecord
from clha_fast.data.rendering import plain_template
from clha_fast.data.split import split_records
from clha_fast.data.writing import write_records
from clha_fast.experiments.cells import MODEL
from clha_fast.experiments.comparison import Comparison
from clha_fast.experiments.contents import data_hash, digest, with_contents
from clha_fast.experiments.going_on import prepared
from clha_fast.experiments.reading import read_file, reading_of
from clha_fast.experiments.reward_run import RewardRun, RewardRunOptions
from clha_fast.experiments.run import Run, RunOptions, with_defaults
from clha_fast.files import write_json
from clha_fast.messages import check_keys
from clha_fast.training.config import CLHAConfig
from clha_fast.training.reward_trainer import RewardConfig
from clha_fast.training.switches import idle_settings

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
    read = reading_of(comparison.run)
    identity = {"pretrain": with_contents(given), "train": [data_hash(path) for path in trains]}
    identity |= {"read": read} if read else {}
    folder = os.path.join(comparison.output_dir, "base", digest(identity))
    model = os.path.join(folder, MODEL)
    if os.path.isfile(os.path.join(folder, _DONE)):
        return model
    say(f"base model: a language model of {', '.join(map(os.path.basename, trains))}")
    os.makedirs(folder, exist_ok=True)
    parts = [os.path.join(folder, f"{name}.jsonl") for name in ("texts", "held_out")]
    write_texts(trains, given.pop("eval_fraction", 0.02), parts[0], parts[1], read)
    fields = ("model_config", "build_tokenizer", "tokenizer", "model", "dtype", "attn_implementation")
    options = RunOptions(
        train_file=parts[0], eval_file=parts[1], **{name: given.pop(name) for name in fields if name in given}
    )
    settings: dict[str, Any] = {"objective": {"name": "sft", "form": "token_mean"}, **given, "output_dir": model}
    run = prepared(lambda **how: Run(dataclasses.replace(options, **how), settings), model)
    finish(run)
    nll = {name: found.get("eval_sft_loss") for name, found in (("before", run.before), ("after", run.after))}
    write_json(os.path.join(folder, _DONE), {**identity, "held_out_nll": nll, "steps": run.trainer.state.global_step})
    say(f"base model: {nll['before']:.3g} -> {nll['after']:.3g} nats a token, held out")
    return model


def write_texts(trains: Sequence[str], fraction: float, train: str, held_out: str, options: Mapping[str, Any]) -> None:
    """One record a (prompt, response), without a prompt: the whole conversation is the response.

    Args:
        fraction: of the prompts, whose conversations are held out. options: of `read_file`.
    """
    records = [record for path in trains for record in read_file(path, options)]
    for path, part in zip((train, held_out), split_records(records, fraction, seed=0), strict=True):
        texts = dict.fromkeys(text for record in part for text in conversation_texts(record))
        write_records((RankedRecord("", (text,)) for text in texts), path)


def conversation_texts(record: RankedRecord) -> list[str]:
    """The prompt, as the plain template writes it, and each response behind it."""
    prompt = record.prompt if isinstance(record.prompt, str) else plain_template(record.prompt)
    return [prompt + completion for completion in record.completions]


def idle_of_bases(comparison: Comparison) -> list[str]:
    """As `cells.idle_of`, of the trainings that come before the methods'."""
    whole: dict[str, tuple[type[Any], Mapping[str, Any]]] = {"base.pretrain": (CLHAConfig, comparison.pretrain or {})}
    for role, value in comparison.reward_models.items():
        if isinstance(value, Mapping):
            whole[f"reward_models.{role}.train"] = (RewardConfig, value["train"])
    return [
        f"Unused by {name}: {sentence}."
        for name, (config, given) in whole.items()
        for sentence in idle_settings(with_defaults(given, config), config).values()
    ]


def ready_reward_models(comparison: Comparison, base: str, say: Callable[[str], None]) -> dict[str, str]:
    """ "label" and "evaluation" -> folder or name, for those that the comparison has; `train` trains one first.

    Unless the configuration says otherwise, one that is trained starts from the base model, on the first ranking
    length's training file, which it reads as the methods do, and where both are trained, each on its own half of the
    prompts.
    """
    found = {}
    both = sum(isinstance(value, Mapping) for value in comparison.reward_models.values()) == 2
    for half, role in enumerate(("label", "evaluation")):
        value = comparison.reward_models.get(role)
        if isinstance(value, Mapping):
            given = {**({"half": half} if both else {}), **value["train"]}
            found[role] = _trained_reward_model(comparison, role, given, base, say)
        elif value is not None:
            found[role] = value
    return found


def _trained_reward_model(
    comparison: Comparison, role: str, given: dict[str, Any], base: str, say: Callable[[str], None]
) -> str:
    if "train_file" not in given:
        given = {**reading_of(comparison.run), **given, "train_file": next(iter(comparison.data.values())).train}
    if not {"model", "model_config"} & set(given):
        given["model"] = base
    identity = {"reward_model": with_contents(given)}
    folder = os.path.join(comparison.output_dir, "reward_models", f"{role}-{digest(identity)}")
    model = os.path.join(folder, MODEL)
    if os.path.isfile(os.path.join(folder, _DONE)):
        return model
    say(f"{role} reward model: pairs of {os.path.basename(given['train_file'])}")
    os.makedirs(folder, exist_ok=True)
    fields = {f.name for f in dataclasses.fields(RewardRunOptions)} - {"resume", "overwrite"}
    options = RewardRunOptions(**{name: entry for name, entry in given.items() if name in fields})
    settings = {name: entry for name, entry in given.items() if name not in fields}
    check_keys(f"reward_models.{role}.train", settings, [f.name for f in dataclasses.fields(RewardConfig) if f.init])
    settings["output_dir"] = model
    run = prepared(lambda **how: RewardRun(dataclasses.replace(options, **how), settings), model)
    assert isinstance(run, RewardRun)
    finish(run)
    write_json(os.path.join(folder, _DONE), {"given": given, **identity, "found": run.description()})
    return model


def finish(run: Run) -> None:
    """All stages of a prepared run.

    Raises:
        KeyboardInterrupt: it was interrupted; what was saved goes on from there.
    """
    run.trainer.remove_callback(PrinterCallback)
    run.evaluate_before()
    run.train()
    if run.interrupted:
        raise KeyboardInterrupt
    run.report()
