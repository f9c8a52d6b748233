"""What a folder or a name on the Hub holds, by its configurations alone: a model, a reward model or an adapter."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from clha_fast.models.adapters import import_peft
from clha_fast.models.loading import load_config, load_tokenizer


class Source(NamedTuple):
    """A model's configuration, peft's of the adapter on it or None, and whether it is a classifier's."""

    config: Any
    adapter: Any
    is_classifier: bool


def read_source(name: str) -> Source:
    """Of an adapter's folder the base model's configuration, with as many words as the folder's tokenizer has.

    Raises:
        ValueError: nothing is there, or an encoder-decoder; an adapter of none, or of no causal language model.
        ImportError: an adapter, and peft is not installed.
    """
    if not os.path.isfile(os.path.join(name, "adapter_config.json")):
        config = load_config(name)
        return Source(config, None, any("ForSequenceClassification" in kind for kind in config.architectures or ()))
    adapter = import_peft().PeftConfig.from_pretrained(name)
    if adapter.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"model: expected an adapter of a causal language model, got {name} for {adapter.task_type}")
    if not adapter.base_model_name_or_path:
        raise ValueError(f"model: expected an adapter that names its base model, got {name}, which names none")
    config = load_config(adapter.base_model_name_or_path)
    if os.path.isfile(os.path.join(name, "tokenizer_config.json")):
        part = config.get_text_config()
        part.vocab_size = max(part.vocab_size, len(load_tokenizer(name, "model")))
    return Source(config, adapter, False)
