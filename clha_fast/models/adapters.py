"""What peft puts around a model and its head, seen through; peft is imported where an adapter is asked for, only there.

An object of peft's can exist only where peft has been imported, so `sys.modules` answers as well as an import.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn


def _peft() -> Any:
    return sys.modules.get("peft")


def is_adapted(model: nn.Module) -> bool:
    """Whether it is a PeftModel."""
    peft = _peft()
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def import_peft() -> Any:
    """The package, for an adapter that was asked for by name; ImportError says how to get it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("peft_config: peft is not installed; pip install 'clha-fast[peft]' brings it") from error


def with_adapter(model: nn.Module, config: Any) -> nn.Module:
    """`peft.get_peft_model(model, config)`.

    Raises:
        ValueError: `config` is none of peft's; the model has an adapter already.
        ImportError: peft is not installed.
    """
    peft = import_peft()
    if not isinstance(config, peft.PeftConfig):
        raise ValueError(f"peft_config: expected a configuration of peft's, such as LoraConfig, got {config!r}")
    if is_adapted(model) or getattr(model, "peft_config", None):
        raise ValueError("peft_config: expected None for a model that has an adapter, got one more")
    try:
        with warnings.catch_warnings():  # peft's, and nobody else's, to heed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"peft_config: {error}") from error
    return wrapped


def _prompt_config(model: nn.Module) -> Any:
    """The active configuration of a model with virtual tokens (prompt, prefix or p-tuning), else None."""
    config = getattr(model, "active_peft_config", None) if is_adapted(model) else None
    return config if getattr(config, "is_prompt_learning", False) else None


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model in a PeftModel; the PeftModel itself where it adds virtual tokens to what it is given."""
    if not is_adapted(model) or _prompt_config(model) is not None:
        return model
    tuner: Any = model.base_model
    return tuner.model


def virtual_tokens(model: nn.Module) -> int:
    """How many positions a PeftModel may put in front of the tokens it is given."""
    config = _prompt_config(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def active_module(head: nn.Module) -> nn.Module:
    """What peft's `modules_to_save` calls in the head's place now; any other head itself."""
    peft = _peft()
    if peft is None or not isinstance(head, peft.utils.ModulesToSaveWrapper):
        return head
    wrapper: Any = head
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def trained_beside_adapter(model: nn.Module) -> list[str]:
    """Names of a PeftModel's trained parameters that are no adapter's: they act with the adapter switched off, too."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    if _prompt_config(model) is not None or prefix is None:
        return []
    own = (prefix, "modules_to_save.", "trainable_tokens_")
    return [name for name, p in model.named_parameters() if p.requires_grad and not any(part in name for part in own)]


# Of an adapter that changes nothing yet all of these are zero; a kind that is not here is not taken to change nothing.
_ZERO_AT_FIRST = {
    "LORA": ("lora_B", "lora_embedding_A"),
    "ADALORA": ("lora_E",),
    "VERA": ("vera_lambda_b",),
    "LOHA": ("hada_w2_b",),
}
# Ways for LoRA to begin that leave the weights below the adapter as they are.
_KEEPS_WEIGHTS = ("gaussian", "eva", "orthogonal")


def changed_by_adapter(model: nn.Module, config: Any = None) -> str:
    """Why a model with its adapter switched off is not the one that training starts from; "" where it is.

    Args:
        model: a PeftModel, or one that gets an adapter. config: the adapter that it gets: training starts from the
            model without, and that is not there any more where the adapter takes its first weights out of the model's.
    """
    if config is not None:
        way = getattr(config, "init_lora_weights", True)
        moved = isinstance(way, str) and way.lower() not in _KEEPS_WEIGHTS
        return f"init_lora_weights={way!r} takes the adapter's first weights out of the model's" if moved else ""
    adapted: Any = model
    active = adapted.active_adapters
    for name in active:
        found = adapted.peft_config[name].peft_type
        kind = str(getattr(found, "value", found))
        if kind not in _ZERO_AT_FIRST:
            return f"the {kind} adapter {name!r} is not known to change nothing"
        for path, weight in model.named_parameters():
            parts = path.split(".")
            if name in parts and any(part in parts for part in _ZERO_AT_FIRST[kind]) and bool(weight.detach().any()):
                return f"the adapter {name!r} changes the model already ({path} is not zero)"
    return ""


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model that a PeftModel has been put around, as it was, in evaluation mode."""
    adapted: Any = model
    modes = [(module, module.training) for module in model.modules()]
    # Switched on again, peft's layers would all be trained.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with adapted.disable_adapter():
            yield adapted.get_base_model()
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needs in trained:
            parameter.requires_grad_(needs)
