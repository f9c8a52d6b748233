"""`model_init_kwargs`: what `from_pretrained` is given for a model that is named, and for its reference."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from clha_fast.data.records import shorten
from clha_fast.models.adapters import base_model
from clha_fast.models.loading import DTYPES, check_reachable, load_model

logger = logging.get_logger(__name__)

# What means something else to the functions on the way to from_pretrained.
_NEVER = dict.fromkeys(
    ("option", "base", "base_option", "output_loading_info", "state_dict", "adapter_kwargs"), "not to be set"
)
_REVISION = "after `hf download NAME --revision REVISION --local-dir DIR`, which has its tokenizer too"
# What is said elsewhere, with the way, for a run from files.
_ELSEWHERE = {
    **dict.fromkeys(("dtype", "torch_dtype"), "--dtype"),
    "attn_implementation": "--attn_implementation",
    "revision": f"--model DIR {_REVISION}",
    "subfolder": "--model with the path of that folder",
    "config": "--model with a folder whose config.json says it, or the configuration's fields themselves",
    "load_in_4bit": "--model_init_kwargs.quantization_config '{load_in_4bit: true}'",
    "load_in_8bit": "--model_init_kwargs.quantization_config '{load_in_8bit: true}'",
    **_NEVER,
}
# The same for a trainer that is given a name.
_IN_PYTHON = {
    "revision": f"model=DIR {_REVISION}",
    "subfolder": "model= with the path of that folder",
    "load_in_4bit": "model_init_kwargs={'quantization_config': {'load_in_4bit': True}}",
    "load_in_8bit": "model_init_kwargs={'quantization_config': {'load_in_8bit': True}}",
    **_NEVER,
}
# What a model was loaded with, for as long as there is that model.
_LOADED_WITH: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def check_init_kwargs(given: Any, loads: bool, *, in_python: bool = False) -> dict[str, Any]:
    """The arguments, a copy; {} for None.

    Args:
        loads: whether a model is loaded with them.
        in_python: of a trainer that is given a model's name, where `dtype` (or `torch_dtype`), `attn_implementation`
            and `config` have no options of their own.

    Raises:
        ValueError: no mapping; none is loaded; an argument that is an option of the run, or has another way.
    """
    if not given:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"model_init_kwargs: expected a mapping, arguments of from_pretrained, got {given!r}")
    if not loads:
        raise ValueError(
            f"model_init_kwargs: expected none beside model_config, of which a model is made, not loaded, got {given}; "
            "its settings are entries of model_config"
        )
    elsewhere = _IN_PYTHON if in_python else _ELSEWHERE
    for name in given:
        if name in elsewhere:
            raise ValueError(f"model_init_kwargs: expected no {name}, which here is {elsewhere[name]}")
    return dict(given)


def take_dtype(given: dict[str, Any]) -> torch.dtype | str:
    """Removes `dtype` and `torch_dtype`, two names of one, and returns what they say; float32 where there is neither.

    Raises:
        ValueError: an unknown dtype, or two different ones.
    """
    found: dict[str, torch.dtype | str] = {}
    for name in ("dtype", "torch_dtype"):
        if name not in given:
            continue
        value = given.pop(name)
        if not isinstance(value, torch.dtype):
            if value not in DTYPES:
                raise ValueError(f"model_init_kwargs: expected {name} to be one of {', '.join(DTYPES)}, got {value!r}")
            value = value if value == "auto" else getattr(torch, value)
        found[name] = value
    if len(set(found.values())) > 1:
        raise ValueError(
            f"model_init_kwargs: expected one of dtype and torch_dtype, which mean the same, got {found['dtype']} and "
            f"{found['torch_dtype']}"
        )
    return next(iter(found.values()), torch.float32)


def load_with(
    given: Mapping[str, Any], name: str, dtype: torch.dtype | str, attn_implementation: str | None = None
) -> PreTrainedModel:
    """`load_model` with more arguments of `from_pretrained`, which `load_like` will load a reference with.

    Raises:
        ValueError: as `load_model`; an argument that neither from_pretrained nor the model's configuration has.
    """
    # A copy, for transformers changes mappings that it is given.
    again = {key: copy.deepcopy(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    try:
        model = load_model(name, dtype, attn_implementation, **given)
    except TypeError as error:
        if not given:
            raise
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(
            "model_init_kwargs: expected arguments of from_pretrained or fields of the model's configuration, got "
            f"{shorten(dict(given))} ({reason})"
        ) from error
    _LOADED_WITH[model] = (
        again if attn_implementation is None else {**again, "attn_implementation": attn_implementation}
    )
    return model


def load_like(model: nn.Module, name: str, option: str) -> PreTrainedModel:
    """The model of a folder or name, as `model` was: in its dtype, with its attention and what `load_with` gave it.

    Args:
        option: what errors call it.

    Raises:
        ValueError: as `load_model`; one that cannot be loaded with these arguments.
    """
    given = _LOADED_WITH.get(model, {})
    dtype: Any = getattr(model, "dtype", None)
    check_reachable(option, name)
    try:
        loaded = load_model(name, dtype, option=option, **given)
    except (TypeError, ValueError) as error:
        if not given:
            raise
        reason = " ".join(str(error).split()).removesuffix(".").removeprefix(f"{option}: ")
        raise ValueError(
            f"{option}: expected a model that loads with what the one that trains was loaded with, "
            f"{shorten(given)}, got {name} ({reason}); {option}='copy' takes a frozen copy of that one, and ref_model= "
            "of the trainer any model"
        ) from error
    ours: Any = base_model(model)
    theirs: Any = base_model(loaded)
    attention = getattr(getattr(ours, "config", None), "_attn_implementation", None)
    if type(ours) is type(theirs) and attention not in (None, theirs.config._attn_implementation):
        theirs.set_attn_implementation(attention)
    if _is_quantised(ours) and not _is_quantised(theirs):
        logger.warning(
            f"{option}: {name} is loaded in {dtype}, while the model that trains, which the trainer was given, is "
            f"quantised; ref_model= takes one that is quantised as well, {option}='copy' a frozen copy"
        )
    return loaded


def _is_quantised(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None
