"""`model_init_kwargs` of a run from files: what `from_pretrained` is given beside what the run has options for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from clha_fast.models.loading import load_model

# What is said elsewhere, or cannot be said for the weights alone, with the way.
_ELSEWHERE = {
    **dict.fromkeys(("dtype", "torch_dtype"), "--dtype"),
    "attn_implementation": "--attn_implementation",
    "revision": "--model DIR after `hf download NAME --revision REVISION --local-dir DIR`, which has its tokenizer too",
    "subfolder": "--model with the path of that folder",
    "config": "--model with a folder whose config.json says it, or the configuration's fields themselves",
    "load_in_4bit": "--model_init_kwargs.quantization_config '{load_in_4bit: true}'",
    "load_in_8bit": "--model_init_kwargs.quantization_config '{load_in_8bit: true}'",
    **dict.fromkeys(("option", "output_loading_info", "state_dict", "adapter_kwargs"), "not to be set"),
}


def check_init_kwargs(given: Any, loads: bool) -> dict[str, Any]:
    """The arguments, a copy; {} for None.

    Args:
        loads: whether a model is loaded with them.

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
    for name in given:
        if name in _ELSEWHERE:
            raise ValueError(f"model_init_kwargs: expected no {name}, which here is {_ELSEWHERE[name]}")
    return dict(given)


def load_with(
    given: Mapping[str, Any], name: str, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """`load_model` with more arguments of `from_pretrained`.

    Raises:
        ValueError: as `load_model`; an argument that neither from_pretrained nor the model's configuration has.
    """
    try:
        return load_model(name, dtype, attn_implementation, **given)
    except TypeError as error:
        if not given:
            raise
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ValueError(
            "model_init_kwargs: expected arguments of from_pretrained or fields of the model's configuration, got "
            f"{dict(given)} ({reason})"
        ) from error
