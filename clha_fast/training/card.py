"""The model card: what was trained on what, with which loss and which result."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import RepoCard

from clha_fast.objectives import CLHAOptions, Objective
from clha_fast.version import __version__

CARD_FILE = "README.md"
TAG = "preference-ranking"  # behind the objective's name
# A card that holds this line was written here and may be written again; any other is somebody's own.
MARK = "<!-- Written by clha-fast; edit it, and remove this line to keep what you wrote. -->"
_METRICS = {
    "rewards/accuracies": "ranking accuracy (kept pairs)",
    "kendall_tau": "Kendall's tau",
    "rewards/margins": "margin (nats a token)",
    "logps/chosen": "log-probability of the better side (nats a token)",
    "logps/rejected": "log-probability of the worse side (nats a token)",
    "kept_pair_share": "kept pairs",
    "loss": "loss",
    "rank_loss": "rank term",
    "sft_loss": "SFT term",
}
_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *(
        "gradient_accumulation_steps",
        "world_size",
        "normalizer",
        "temperature",
        "max_dropped_mass",
        "optim",
        "weight_decay",
    ),
    *("max_length", "max_prompt_length", "max_completion_length", "bf16", "fp16", "seed"),
)
_PACKAGES = ("transformers", "tokenizers", "accelerate", "datasets", "peft", "deepspeed")
CITATION = """\
@inproceedings{fang2024clha,
  title     = {{CLHA}: A Simple yet Effective Contrastive Learning Framework for Human Alignment},
  author    = {Fang, Feiteng and Zhu, Liang and Feng, Xi and Hou, Jinchang and Zhao, Qixuan and Li, Chengming
               and Hu, Xiping and Xu, Ruifeng and Yang, Min},
  booktitle = {Proceedings of LREC-COLING 2024},
  pages     = {3325--3334},
  year      = {2024},
  url       = {https://aclanthology.org/2024.lrec-main.295},
  note      = {arXiv:2403.16649}
}"""


def may_write(folder: str) -> bool:
    """Whether `folder` has no card, or one that was written here."""
    try:
        with open(os.path.join(folder, CARD_FILE), encoding="utf-8") as file:
            return MARK in file.read()
    except FileNotFoundError:
        return True


def write(folder: str, text: str) -> None:
    """Put the card in `folder`, complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = os.path.join(folder, CARD_FILE)
    os.makedirs(folder, exist_ok=True)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.partial", path)


def merged_card(adapter: str, name: str, kind: str) -> str | None:
    """The card of an adapter's folder, for the whole model that was made of it; None where the folder has none.

    The front matter tells the Hub of a model of transformers, trained from its base; figures stay as they are. In a
    card from here the heading and a sentence below it say what it is; somebody else's text is left alone.

    Args:
        name: of the model. kind: of the adapter, such as LORA.

    Raises:
        ValueError: it is no text, or its front matter is no YAML mapping. OSError: it cannot be read.
    """
    path = os.path.join(adapter, CARD_FILE)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        # `ModelCard` reads a field otherwise from release to release; this one has them as they stand.
        card = RepoCard(text if text.lstrip().startswith("---") else f"---\n\n---\n{text}")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected text behind front matter that is a YAML mapping ({error})") from error
    data: Any = card.data
    before = data.get("model_name")
    data["library_name"] = "transformers"
    own = [tag for tag in _several(data.get("tags")) if tag not in ("peft", kind.lower())]
    data["tags"] = [tag for tag in own if not str(tag).startswith("base_model:")] or None
    # A folder is refused by the Hub.
    bases = [base for base in _several(data.get("base_model")) if not os.path.exists(str(base))]
    if bases != _several(data.get("base_model")):
        data["base_model"] = bases or None
    # It would be told from the library, but for a card that says "adapter".
    data["base_model_relation"] = "finetune" if bases else None
    if any(language is False for language in _several(data.get("language"))):  # YAML 1.1's reading of Norwegian, no
        data["language"] = ["no" if language is False else language for language in _several(data["language"])]
    if MARK in text:
        data["model_name"] = name
        said = f"An adapter ({kind}), merged into its base model. Figures are those of the adapter, before that."
        card.text = card.text.replace(f"\n# {before}\n", f"\n# {name}\n\n{said}\n", 1)
    return str(card)


def _several(value: Any) -> list[Any]:
    """What a field of a front matter holds, once each, be it one value or a list of them."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [item for index, item in enumerate(values) if item not in values[:index]]


def model_card(
    name: str,
    options: Objective,
    settings: Any,
    log: Sequence[Mapping[str, Any]],
    *,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    library: str = "transformers",
    language: str | None = None,
    license: str | None = None,
    tasks: Sequence[str] = ("text-generation",),
    reference: str | None = None,
) -> str:
    """The card's text: YAML front matter, loss, metrics, settings, versions; of CLHA the citation, too.

    Args:
        options: of the loss. settings: the `CLHAConfig`. log: a trainer's `state.log_history`. reference: what the loss
            compares with.
        base_model: a name on the Hub. datasets: names or file names; those on the Hub also go into the front matter.
    """
    data = ModelCardData(
        base_model=base_model,
        # A front matter with what is no name on the Hub is refused by it.
        datasets=[name for name in datasets if _is_hub_name(name)] or None,
        language=language,
        library_name=library,
        license=license,
        model_name=name,
        pipeline_tag=tasks[0] if tasks else None,
        tags=list(dict.fromkeys((options.name, TAG, *tags))),
    )
    clha = isinstance(options, CLHAOptions)
    loss = "CLHA (a loss on ranked responses)" if clha else f"the objective {options.name} (on ranked responses)"
    named = {"preset": settings.preset} if clha else {"reference log-probabilities": reference}
    start = (
        f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "weights that have no name on the Hub"
    )
    data_text = f" on {', '.join(datasets)}" if datasets else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {name}",
        f"Trained from {start}{data_text}, with {loss}, by clha-fast {__version__}.",
        "## Loss\n\n" + _table(("option", "value"), _values({**_options(options), **named})),
    ]
    held_out = next((line for line in reversed(log) if "eval_rank_loss" in line), None)
    if held_out is not None:
        names = {**_METRICS, **{name: name for name in options.metric_names}}
        rows = {text: held_out[f"eval_{key}"] for key, text in names.items() if f"eval_{key}" in held_out}
        step = held_out.get("eval_step", held_out.get("step"))  # the former where an earlier step's weights are back
        parts.append(f"## Held out, after step {step}\n\n" + _table(("metric", "value"), _values(rows)))
    chosen = {name: getattr(settings, name) for name in _SETTINGS}
    if getattr(settings, "sequence_parallel_size", 1) > 1:
        chosen["sequence_parallel_size"] = settings.sequence_parallel_size
    chosen["lr_scheduler_type"] = getattr(chosen["lr_scheduler_type"], "value", chosen["lr_scheduler_type"])
    chosen["optim"] = getattr(chosen["optim"], "value", chosen["optim"])
    parts.append("## Training\n\n" + _table(("setting", "value"), _values(chosen)))
    parts.append("## Versions\n\n" + "\n".join(f"- {package} {version}" for package, version in _versions().items()))
    if clha:
        parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    return "\n\n".join(parts) + "\n"


def _options(options: Objective) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.init}


def _values(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in given.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [header, ("---", "---"), *rows])


def _is_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not os.path.exists(name) and not name.startswith((".", "/")) and "." not in name


def _versions() -> dict[str, str]:
    found = {"clha-fast": __version__, "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
