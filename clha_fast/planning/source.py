"""What a folder or a name on the Hub holds, by its configurations alone: a model, a reward model or an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from clha_fast.models.adapters import import_peft
from clha_fast.models.loading import load_config, load_tokenizer


class Source(NamedTuple):
    """A model's configuration, peft's of the adapter on it or None, and whether it is a classifier's.

    `quantised` is how the model's weights are kept in its files, for people; None where each is a number of its own.
    """

    config: Any
    adapter: Any
    is_classifier: bool
    quantised: str | None = None


def read_source(name: str) -> Source:
    """Of an adapter's folder the base model's configuration, with as many words as the folder's tokenizer has.

    Raises:
        ValueError: nothing is there, or an encoder-decoder; an adapter of none, or of no causal language model.
        ImportError: an adapter, and peft is not installed.
    """
    if not os.path.isfile(os.path.join(name, "adapter_config.json")):
        config = load_config(name)
        classifies = any("ForSequenceClassification" in kind for kind in config.architectures or ())
        return Source(config, None, classifies, _quantised(config))
    adapter = import_peft().PeftConfig.from_pretrained(name)
    if adapter.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"model: expected an adapter of a causal language model, got {name} for {adapter.task_type}")
    if not adapter.base_model_name_or_path:
        raise ValueError(f"model: expected an adapter that names its base model, got {name}, which names none")
    config = load_config(adapter.base_model_name_or_path)
    if os.path.isfile(os.path.join(name, "tokenizer_config.json")):
        part = config.get_text_config()
        part.vocab_size = max(part.vocab_size, len(load_tokenizer(name, "model")))
    return Source(config, adapter, False, _quantised(config))


def _quantised(config: Any) -> str | None:
    """The method and, where the configuration says them, the bits of a weight."""
    parts = (config, config.get_text_config())
    names = ("quantization_config", "compression_config")  # the second is an older name
    given = next(filter(None, (getattr(part, name, None) for part in parts for name in names)), None)
    if given is None:
        return None
    said = given if isinstance(given, Mapping) else given.to_dict()
    in_bits = [bits for bits in (4, 8) if said.get(f"load_in_{bits}bit")]
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method") or ""))
    method = method or ("bitsandbytes" if in_bits else "an unnamed method")
    bits = next(iter(in_bits), said.get("bits"))
    return method if bits is None else f"{method}, {bits} bits"
