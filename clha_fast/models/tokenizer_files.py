"""A tokenizer's files, read as transformers' own class also where another package could take them over; its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# With mistral-common installed, AutoTokenizer gives this class for folders that hold tekken.json. It has no chat
# template that can be read and no `added_tokens_decoder`. What asks AutoTokenizer for the other one came with
# transformers 5.15; before that the word itself is an error.
MISTRAL_COMMON = "MistralCommonBackend"


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained(name)`, from tokenizer.json where mistral-common would take tekken.json.

    Raises:
        ValueError: tekken.json without a tokenizer.json. Else as transformers.
    """
    found = AutoTokenizer.from_pretrained(name)
    if type(found).__name__ != MISTRAL_COMMON:
        return found
    try:
        found = PreTrainedTokenizerFast.from_pretrained(name)
    except (KeyError, OSError, ValueError):
        found = None
    # transformers makes a tokenizer of tekken.json alone too: without special tokens and chat template.
    if found is None or found.eos_token is None:
        raise ValueError(f"tokenizer.json is expected beside tekken.json, which is not read here, got none in {name}")
    return found


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what makes tokens of texts and of messages, whatever the folder it came from."""
    rules: Any = getattr(tokenizer, "backend_tokenizer", None)
    if rules is None:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        # How the last call cut and padded stands there too.
        rules = {k: v for k, v in json.loads(rules.to_str()).items() if k not in ("truncation", "padding")}
    told = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
