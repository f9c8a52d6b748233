"""Settings under the names that TRL's `DPOConfig` has for them, where they mean the same; else refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from clha_fast.data.records import shorten
from clha_fast.models.adapters import base_model
from clha_fast.models.init_kwargs import check_init_kwargs, load_with, take_dtype
from clha_fast.models.loading import load_tokenizer
from clha_fast.training.objective import DEFAULT, as_mapping, settings_of

# TRL's losses of pairs that are an objective's for two responses.
LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo"}
# What `settle_names` writes into `objective`.
SETTLED = ("loss_type", "beta")
_CUTS = ("keep_start", "keep_end")


@dataclass
class TRLNames:
    """Fields of `CLHAConfig` that are spelled as in TRL's `DPOConfig`."""

    loss_type: str | None = field(default=None, metadata={"help": "TRL's name of an objective: sigmoid, hinge, ipo."})
    beta: float | None = field(default=None, metadata={"help": "Of an objective that has one."})
    truncation_mode: str | None = field(default=None, metadata={"help": "TRL's; taken where nothing is cut."})
    disable_dropout: bool = field(default=False, metadata={"help": "All dropout of the model is 0."})
    pad_token: str | None = field(default=None, metadata={"help": "The tokenizer pads with it."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained, where the trainer is given a model's name."}
    )


def settle_names(config: Any) -> None:
    """Puts `loss_type` and `beta` into `config.objective`.

    Raises:
        ValueError: a loss that is no objective here, another one than `objective` names, a `beta` for an objective
            without one or given twice, a way to cut that is not the one here.
    """
    if config.loss_type is not None:
        names = [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
        if len(names) != 1 or names[0] not in LOSSES:
            raise ValueError(f"loss_type: expected one of {', '.join(LOSSES)}, got {config.loss_type!r}")
        meant, given = LOSSES[names[0]], as_mapping(config.objective)
        if given["name"] not in (DEFAULT, meant) or (given["name"] == DEFAULT and len(given) > 1):
            raise ValueError(
                f"loss_type: expected none beside objective={given['name']!r}, got {names[0]!r}, which is {meant!r}"
            )
        config.objective = given if given["name"] == meant else {"name": meant}
        config.loss_type = names[0]
    if config.beta is not None:
        given = as_mapping(config.objective)
        if "beta" not in settings_of(given["name"]):
            raise ValueError(f"beta: expected none with objective={given['name']!r}, which has none, got {config.beta}")
        if given.setdefault("beta", config.beta) != config.beta:
            raise ValueError(f"beta: expected one value, got {config.beta}, and {given['beta']} in objective")
        config.objective = given
    if config.truncation_mode not in (None, *_CUTS):
        raise ValueError(f"truncation_mode: expected one of {', '.join(_CUTS)}, got {config.truncation_mode!r}")
    if config.truncation_mode is not None and config.max_length is not None:
        raise ValueError(
            f"truncation_mode: expected None beside max_length, got {config.truncation_mode!r}: prompts are cut on "
            "their left and responses on their right here, by max_length, max_prompt_length and max_completion_length"
        )


def as_model(
    model: Any, args: Any, processing_class: Any, collates: bool
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The model, loaded if it is a folder's or the Hub's name, and its tokenizer; `pad_token` put into that.

    Args:
        collates: whether the caller has a collator, and needs no tokenizer.

    Raises:
        ValueError: neither a module nor a name of a model that can be loaded; one that `torch.compile` has wrapped;
            `model_init_kwargs` for one that is there already, or that cannot be given here; a `pad_token` that is no
            token, or without a tokenizer.
    """
    if isinstance(model, str):
        settings = check_init_kwargs(args.model_init_kwargs, True, in_python=True)
        dtype = take_dtype(settings)
        if processing_class is None and not collates:
            processing_class = load_tokenizer(model, "model")
        attention = settings.pop("attn_implementation", None)
        model = load_with(settings, model, dtype, attention)
    elif not isinstance(model, nn.Module):
        raise ValueError(
            "model: expected a causal language model (AutoModelForCausalLM.from_pretrained loads one), or the name of "
            f"one, got {shorten(model)}"
        )
    elif isinstance(inner := base_model(model), torch._dynamo.OptimizedModule):
        raise ValueError(
            f"model: expected one that torch.compile has not wrapped, got a compiled {type(inner._orig_mod).__name__}; "
            "torch_compile=True compiles it, and so does model.compile(), which wraps nothing"
        )
    elif args.model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs: expected None beside a model that has been made already, got {args.model_init_kwargs}"
        )
    if args.pad_token is not None:
        known = isinstance(processing_class, PreTrainedTokenizerBase) and args.pad_token in processing_class.get_vocab()
        if not known:
            raise ValueError(f"pad_token: expected a token of the tokenizer (processing_class), got {args.pad_token!r}")
        processing_class.pad_token = args.pad_token
    return model, processing_class
