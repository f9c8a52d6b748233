"""Prompts as the tokens that training gives them, what an answer begins with, and what ends it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from clha_fast.batching.chat import render_chat
from clha_fast.batching.collator import RankedCollator
from clha_fast.data.prompts import Prompted, PromptRecord, prompt_hash
from clha_fast.data.records import RankedRecord
from clha_fast.generation.backend import EncodedPrompt, GenerationSettings

# Turns of either speaker in a text, and as `plain_template` writes messages.
TEXT_STOPS = ("Human:", "Assistant:")
PLAIN_STOPS = ("System:", "User:", *TEXT_STOPS)
# What stands for a response where a file has none.
_RESPONSE = "response"
# A prompt keeps this part of the model's positions (one in so many), whatever an answer may need.
_PROMPT_SHARE = 4
COH_MARKER = "A helpful answer:"


@dataclass(frozen=True)
class EncodedPrompts:
    """prompts, in order. cut: how many have lost tokens on the left. settings: with the lengths that are in force."""

    prompts: list[EncodedPrompt]
    cut: int
    settings: GenerationSettings


def encode_prompts(
    records: Sequence[Prompted],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
    positions: int | None = None,
) -> EncodedPrompts:
    """Prompts rendered and tokenised as `RankedCollator` does it for training.

    An answer ends with EOS and with whatever special token closes a response of the data. Beside these end it: the
    text with which a chat template closes a turn, where that is no special token; the names of both speakers for text
    prompts and for messages without a chat template; or `settings.stop` in their place.

    Args:
        positions: of the model. Prompts leave room for an answer, but keep a quarter of the positions: what is then
            missing is taken from `max_new_tokens`, for all prompts alike.

    Raises:
        RecordError: as `RankedCollator.tokenize_record`. ValueError: the prefix leaves no position for an answer.
    """
    ranked = [record.ranked(_RESPONSE) if isinstance(record, PromptRecord) else record for record in records]
    whole = RankedCollator(tokenizer)
    prefixes: list[list[int]] = [[] for _ in ranked]
    if settings.answer_prefix:
        prefixes = [whole.tokenize_beginning(record, settings.answer_prefix) for record in ranked]
    settings = _lengths(settings, positions, max(map(len, prefixes), default=0))
    collator = RankedCollator(tokenizer, max_prompt_length=settings.max_prompt_length)
    counted = [collator.tokenize_counted(record) for record in ranked]
    ends = tuple(closing_tokens([feature for feature, _, _ in counted], tokenizer))
    prompts = [
        EncodedPrompt(
            (*feature["prompt_ids"], *prefix),
            _stops(record, tokenizer) if settings.stop is None else settings.stop,
            ends,
            _seed(settings.seed, record),
        )
        for record, prefix, (feature, _, _) in zip(ranked, prefixes, counted, strict=True)
    ]
    return EncodedPrompts(prompts, sum(cut for _, cut, _ in counted), settings)


def _lengths(settings: GenerationSettings, positions: int | None, prefix: int) -> GenerationSettings:
    if positions is None:
        return settings
    room = max(positions - prefix - settings.max_new_tokens, positions // _PROMPT_SHARE, 1)
    prompt = room if settings.max_prompt_length is None else min(room, settings.max_prompt_length)
    new = min(settings.max_new_tokens, positions - prefix - prompt)
    if new < 1:
        raise ValueError(
            f"answer_prefix: expected one that leaves an answer some of the model's {positions} positions, got "
            f"{prefix} tokens behind prompts of up to {prompt}"
        )
    return dataclasses.replace(settings, max_prompt_length=prompt, max_new_tokens=new)


def _stops(record: RankedRecord, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    if isinstance(record.prompt, str):
        return TEXT_STOPS
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN_STOPS
    chat = render_chat(record.prompt, [_RESPONSE], tokenizer, record.source, record.template)
    closing = chat.responses[0].partition(_RESPONSE)[2].strip()
    return () if chat.closed or not closing else (closing,)


def _seed(seed: int, record: RankedRecord) -> int:
    digest = hashlib.sha256(f"{seed}\n{prompt_hash(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: what a torch.Generator takes


def closing_tokens(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, model: Any = None
) -> list[int]:
    """What ends an answer: EOS, the model's own, and what closes a response of the data (a template's end of turn)."""
    ends = {tokenizer.eos_token_id, *([] if model is None else own_ends(model))}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for example in examples:
        for ids in example["completion_ids"]:
            for token in reversed(ids):
                if int(token) in special:
                    ends.add(int(token))
                # A newline may follow the end of turn.
                if int(token) in special or tokenizer.decode([int(token)]).strip():
                    break
    return sorted(ends)


def own_ends(model: Any) -> list[int]:
    """The tokens that the model's generation settings name as its end."""
    own = model.generation_config.eos_token_id
    return [] if own is None else [own] if isinstance(own, int) else list(own)


def trained_prefix(folder: str | os.PathLike[str]) -> str:
    """What answers of the model in `folder` must begin with; "" for a model that was not trained behind markers.

    Chain of Hindsight trains answers behind a marker of their quality, and is measured behind the good one. The
    objective stands in the run's `run.json`, in the folder itself or, for a checkpoint, in the one around it.
    """
    path = os.path.abspath(os.fspath(folder))
    for place in (path, os.path.dirname(path)):
        try:
            with open(os.path.join(place, "run.json"), encoding="utf-8") as file:
                settings = json.load(file)["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        objective = settings.get("objective")
        given: Mapping[str, Any] = {}
        if isinstance(objective, Mapping):
            given, objective = objective, objective.get("name")
        return str(given.get("good_marker", COH_MARKER)) if objective == "coh" else ""
    return ""
