"""An adapter merged into its base model: one whole model, with its card, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import warnings
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig

from clha_fast.files import sync, write_json
from clha_fast.generation.prompts import trained_lead, trained_prefix
from clha_fast.models.adapters import base_model, import_peft
from clha_fast.models.loading import DTYPES, load_adapter, load_tokenizer
from clha_fast.training import card


class Merged(NamedTuple):
    """What was merged.

    Attributes:
        model: in memory, as it was written. kind: of the adapter, such as LORA. base: the base model's folder or name.
        untied: whether the head has weights of its own now, which it shared with the input embedding before.
        uncarded: why the card of the adapter's folder was not taken along; "" where it was, or there is none.
    """

    model: Any
    kind: str
    base: str
    untied: bool
    uncarded: str


def merge_adapter(
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "auto",
) -> Merged:
    """Write the adapter of a folder, merged into its base model, to a new folder, which appears complete or not at all.

    It holds what `from_pretrained` reads: weights as safetensors, configuration, generation settings and tokenizer (of
    the adapter's folder where they are there, else the base's); the model card of the adapter's folder, as one of a
    whole model; and, of a run, how the model is asked (`generation.prompts`). An adapter that changes head or input
    embedding alone parts the two, where the base model shares one weight between them.

    Args:
        adapter: a folder with adapter_config.json. base: a folder or name, where it is not the one that the adapter
            names (it may have moved).
        dtype: in which weights are added and written; "auto" is the base checkpoint's own. In half precision the sum
            is rounded, so merged logits differ from the adapter's by as much.

    Raises:
        ValueError: no adapter there, or one that cannot be merged (virtual tokens); a base model that is missing or
            quantised; as `load_model`.
        FileExistsError: `destination` exists. OSError: it cannot be written.
        ImportError: peft is not installed.
    """
    adapter, out = os.fspath(adapter), os.path.normpath(os.fspath(destination))
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        what = "one without adapter_config.json" if os.path.isdir(adapter) else "no such folder"
        if os.path.isfile(os.path.join(adapter, "config.json")):
            what = "a whole model, which needs no merge: every command and from_pretrained take it as it is"
        raise ValueError(f"adapter: expected a folder that holds an adapter of peft's, got {adapter}, {what}")
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: exists already; expected a new folder")
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise FileNotFoundError(f"{out}: expected a folder in one that exists, there is no {os.path.dirname(out)}")
    kind = _kind(adapter)
    model: Any = load_adapter(adapter, "adapter", base=base, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    named = base or model.active_peft_config.base_model_name_or_path
    if getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"model: expected a base model with plain weights, got {named}, which is quantised; give the one that it "
            "was made of"
        )
    whole, untied = _merge(model, kind)
    tokenizer = load_tokenizer(
        adapter if os.path.isfile(os.path.join(adapter, "tokenizer_config.json")) else str(named), "model"
    )
    if os.path.isfile(os.path.join(adapter, "generation_config.json")):
        whole.generation_config = GenerationConfig.from_pretrained(adapter)
    staged = f"{out}.{os.getpid()}.partial"
    try:
        whole.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        _take_along(adapter, staged)
        uncarded = _write_card(adapter, staged, os.path.basename(os.path.abspath(out)), kind)
        sync(staged)
        os.rename(staged, out)
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise OSError(f"{out}: could not be written ({' '.join(str(error).split())})") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Merged(whole, kind, str(named), untied, uncarded)


def _take_along(adapter: str, folder: str) -> None:
    """What the adapter's run says of how its model is asked: generation and evaluation look for it beside the model."""
    prefix, lead = trained_prefix(adapter), trained_lead(adapter)
    if prefix or lead is not None:
        settings = {"objective": {"name": "coh", "good_marker": prefix}} if prefix else {}
        note = {} if lead is None else {"lead": lead}
        write_json(os.path.join(folder, "run.json"), {"settings": settings, "data": {}, **note})


def _write_card(adapter: str, folder: str, name: str, kind: str) -> str:
    """Why no card was written, where there is one; the model is whole without it."""
    try:
        text = card.merged_card(adapter, name, kind)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    if text is not None:
        card.write(folder, text)
    return ""


def _kind(adapter: str) -> str:
    try:
        config = import_peft().PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError) as error:  # a damaged file, or a kind that this peft does not know
        raise ValueError(
            f"adapter: expected a configuration of peft's in {adapter}, got one it refuses ({error})"
        ) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter: expected one that changes weights, got {kind}, which puts virtual tokens in front of the text"
        )
    return kind


def _merge(model: Any, kind: str) -> tuple[Any, bool]:
    inner: Any = base_model(model)
    text = inner.config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    if tied:
        _part(inner)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's about tied weights, which have been parted
            whole = model.merge_and_unload(safe_merge=True)
    except NotImplementedError as error:
        raise ValueError(f"adapter: expected one that peft can merge, got {kind} ({error})") from error
    except ValueError as error:  # weights that are not finite
        raise ValueError(f"adapter: could not be merged ({error})") from error
    if not tied:
        return whole, False
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    same = torch.equal(embedding.weight, head.weight)
    if same:
        head.weight = embedding.weight
    for config in (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = same  # peft may have changed it, seeing two weights
    return whole, not same


def _part(model: Any) -> None:
    """Give the head a weight of its own: added to the one of both, an adapter of one would change the other, too."""
    head = model.get_output_embeddings()
    head = getattr(head, "token_adapter", head)  # peft's trainable_token_indices: the wrapper shows no layer below
    while hasattr(head, "base_layer"):
        head = head.base_layer
    if hasattr(head, "token_adapter"):
        raise ValueError(
            "adapter: expected a tied head that is trained in one way, got trainable_token_indices below a layer of "
            "target_modules on it, which peft does not merge; the adapter itself answers and ranks as it is"
        )
    if not hasattr(head, "original_module"):  # peft's modules_to_save: a copy already
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
