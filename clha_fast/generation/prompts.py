"""Prompts as the tokens that training gives them, what an answer begins with, and what ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from clha_fast.batching.chat import render_chat
from clha_fast.batching.collator import RankedCollator
from clha_fast.data.bars import LARGE
from clha_fast.data.prompts import Prompted, PromptRecord, prompt_hash
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.rendering import render_prompt
from clha_fast.files import CHECKPOINT
from clha_fast.generation.asking import RESPONSE, closing_of, encode_question, question, usual_closing
from clha_fast.generation.backend import EncodedPrompt, GenerationSettings

# Turns of either speaker in a text, and as `plain_template` writes messages.
TEXT_STOPS = ("Human:", "Assistant:")
PLAIN_STOPS = ("System:", "User:", *TEXT_STOPS)
# A prompt keeps this part of the model's positions (one in so many), whatever an answer may need.
_PROMPT_SHARE = 4
COH_MARKER = "A helpful answer:"


@dataclass(frozen=True)
class EncodedPrompts:
    """prompts, in order. cut: how many have lost tokens on the left. settings: with the lengths that are in force.

    said: where prompts end otherwise than a server's, or than training would have them; "" where neither is.
    """

    prompts: list[EncodedPrompt]
    cut: int
    settings: GenerationSettings
    said: str = ""


def encode_prompts(
    records: Sequence[Prompted],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
    positions: int | None = None,
    *,
    progress: bool = False,
) -> EncodedPrompts:
    """Prompts rendered and tokenised as `RankedCollator` does it for training.

    What a chat template puts between its generation prompt and a response ("<think>\\n\\n</think>\\n\\n"), training
    has in the prompt. Here `settings.lead` decides; where it is None, a record with responses is asked as training on
    it has it, and messages alone with the template's own generation prompt, as a server asks. Messages whose responses
    the template cannot write behind the prompt are asked so too.

    An answer ends with EOS and with whatever special token closes a response of the data, or a template's turn. Beside
    these end it: the text with which a chat template closes a turn, where that is no special token; the names of both
    speakers for text prompts and for messages without a chat template; or `settings.stop` in their place.

    Args:
        positions: of the model. Prompts leave room for an answer, but keep a quarter of the positions: what is then
            missing is taken from `max_new_tokens`, for all prompts alike.
        progress: show a bar for more than 2000 records.

    Raises:
        RecordError: as `RankedCollator.tokenize_record`; a text prompt with `settings.chat_template_kwargs`.
        ValueError: the prefix leaves no position for an answer.
    """
    reader = _Reader(tokenizer, settings)
    given = [reader.given(record) for record in records]
    prefixes: list[list[int]] = [[] for _ in given]
    if settings.answer_prefix:
        prefixes = [reader.prefix(record) for record in given]
    settings = _lengths(settings, positions, max(map(len, prefixes), default=0))
    reader.limit(settings.max_prompt_length)
    quiet = not progress or len(given) <= LARGE
    # Closed before an interruption is said.
    with logging.tqdm(given, desc="Tokenising", unit=" prompts", disable=quiet) as shown:
        read = [reader.read(record) for record in shown]
    ends = tuple(sorted(reader.ends))
    prompts = [
        EncodedPrompt(
            (*one.ids, *prefix),
            one.stops if settings.stop is None else settings.stop,
            ends,
            _seed(settings.seed, record),
        )
        for record, prefix, one in zip(records, prefixes, read, strict=True)
    ]
    return EncodedPrompts(prompts, sum(one.cut for one in read), settings, _said(read, settings.lead))


class _Read(NamedTuple):
    """A prompt's tokens, whether some were cut, stop texts.

    lead: what the template puts in front of a response. behind: whether that, or the lead asked for, is in `ids`
    and no server's. rendered: by a chat template.
    """

    ids: tuple[int, ...]
    cut: bool
    stops: tuple[str, ...]
    lead: str = ""
    behind: bool = False
    rendered: bool = False


class _Reader:
    """Reads records one by one, as `encode_prompts` describes it.

    Of the responses that a record has, and of what closes them, it keeps the token alone that ends an answer (`ends`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.collator = RankedCollator(tokenizer)
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._special = _special(tokenizer)
        self.ends = {tokenizer.eos_token_id}
        self._numbers: dict[int, int] = {}  # each token's, once: a tokenizer makes a new one every time, 32 bytes

    def given(self, record: Prompted) -> Prompted:
        """The record with the settings' variables of the template beside its own."""
        variables = self.settings.chat_template_kwargs
        return dataclasses.replace(record, template={**variables, **record.template}) if variables else record

    def prefix(self, record: Prompted) -> list[int]:
        text, source = self.settings.answer_prefix, record.source
        if not self._alone(record):
            try:
                return self.collator.tokenize_beginning(_ranked(record), text)
            except RecordError:
                if not self._rendered(record):
                    raise
        before = question(record, self.tokenizer).before
        as_text = RankedRecord("prompt", (RESPONSE,), source=source)
        return self.collator.tokenize_beginning(as_text, before + (text.lstrip() if before else text))

    def limit(self, tokens: int | None) -> None:
        """Of prompts that are read from now on."""
        self.collator = RankedCollator(self.tokenizer, max_prompt_length=tokens)

    def read(self, record: Prompted) -> _Read:
        if not self._alone(record):
            try:
                return self._as_trained(record)
            except RecordError:
                if not self._rendered(record):
                    raise
        asked = question(record, self.tokenizer, self.settings.lead)
        ids, cut = encode_question(asked, self.tokenizer, self.collator.max_prompt_length, record.source)
        closing = asked.closing.strip()
        stops = () if asked.closed or not closing else (closing,)
        lead = (self.settings.lead or asked.lead) if asked.added else asked.lead
        return self._found(ids, cut, [self._encode(asked.closing)], stops, lead, asked.added, True)

    def _found(self, ids: Sequence[int], cut: bool, closings: Iterable[Sequence[int]], *rest: Any) -> _Read:
        self.ends.update(_closers(closings, self.tokenizer, self._special))
        return _Read(tuple(map(self._numbers.setdefault, ids, ids)), cut, *rest)

    def _as_trained(self, record: Prompted) -> _Read:
        ranked = _ranked(record)
        feature, cut, _ = self.collator.tokenize_counted(ranked)
        ids, closings = feature["prompt_ids"], list(feature["completion_ids"])
        if isinstance(ranked.prompt, str):
            closing, closed = self._usual_closing
            if closed and not self._special.isdisjoint(ids[1:]):  # rendered beforehand
                closings.append(self._encode(closing))
            plain = () if closed or not closing.strip() or closing.strip() not in ranked.prompt else (closing.strip(),)
            return self._found(ids, bool(cut), closings, (*TEXT_STOPS, *plain))
        if not self.templated:
            return self._found(ids, bool(cut), closings, PLAIN_STOPS)
        chat = render_chat(ranked.prompt, ranked.completions, self.tokenizer, record.source, record.template)
        closing = "" if chat.closed else closing_of(record, self.tokenizer)[0].strip()
        return self._found(ids, bool(cut), closings, (closing,) if closing else (), chat.lead, bool(chat.lead), True)

    def _rendered(self, record: Prompted) -> bool:
        return self.templated and not isinstance(record.prompt, str)

    def _alone(self, record: Prompted) -> bool:
        """Whether responses of the record's, if it has any, play no part in how it is asked."""
        return self._rendered(record) and (isinstance(record, PromptRecord) or self.settings.lead is not None)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @functools.cached_property
    def _usual_closing(self) -> tuple[str, bool]:
        return usual_closing(self.tokenizer)


def _ranked(record: Prompted) -> RankedRecord:
    return record.ranked(RESPONSE) if isinstance(record, PromptRecord) else record


def _said(read: Sequence[_Read], lead: str | None) -> str:
    behind = [one.lead for one in read if one.behind]
    without = [one.lead for one in read if one.lead and not one.behind]
    found = []
    if behind:
        found.append(
            f"{len(behind):,} of {len(read):,} prompts end with {behind[0]!r}; a server's do not, unless its "
            "chat_template_kwargs or its request say so"
        )
    plain = sum(not one.rendered for one in read)
    if lead and plain:
        found.append(f"{plain:,} of {len(read):,} prompts go through no chat template and are asked without {lead!r}")
    if without and lead is None:
        found.append(
            f"{len(without):,} of {len(read):,} prompts are asked as a server asks, without {without[0]!r}, which the "
            "chat template writes in front of a response; for a model that was trained behind that, give it as lead, "
            "or chat_template_kwargs that make the template write it"
        )
    return "; ".join(found)


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


def _seed(seed: int, record: Prompted) -> int:
    digest = hashlib.sha256(f"{seed}\n{prompt_hash(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: what a torch.Generator takes


def closing_tokens(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, model: Any = None
) -> list[int]:
    """What ends an answer: EOS, the model's own, and what closes a response of the data (a template's end of turn)."""
    ends = {tokenizer.eos_token_id, *([] if model is None else own_ends(model))}
    special = _special(tokenizer)
    for example in examples:
        ends.update(_closers(example["completion_ids"], tokenizer, special))
    return sorted(ends)


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _closers(
    responses: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, special: Container[int]
) -> Iterator[int]:
    """The special token that closes each response, of those that one closes."""
    for ids in responses:
        for token in map(int, reversed(ids)):
            if token in special:
                yield token
            # A newline may follow the end of turn.
            if token in special or tokenizer.decode([token]).strip():
                break


def own_ends(model: Any) -> list[int]:
    """The tokens that the model's generation settings name as its end."""
    own = model.generation_config.eos_token_id
    return [] if own is None else [own] if isinstance(own, int) else list(own)


def trained_prefix(folder: str | os.PathLike[str]) -> str:
    """What answers of the model in `folder` must begin with; "" for a model that was not trained behind markers.

    Chain of Hindsight trains answers behind a marker of their quality, and is measured behind the good one. The
    objective stands in the run's `run.json`, in the folder itself or, for a checkpoint, in the one around it; a run of
    rollouts, which goes on with such a model, has the marker there as `answer_prefix`.
    """
    run = _run_of(folder)
    settings, noted = run.get("settings"), run.get("answer_prefix")
    if isinstance(noted, str):
        return noted
    objective = settings.get("objective") if isinstance(settings, Mapping) else None
    given: Mapping[str, Any] = {}
    if isinstance(objective, Mapping):
        given, objective = objective, objective.get("name")
    return str(given.get("good_marker", COH_MARKER)) if objective == "coh" else ""


def trained_lead(folder: str | os.PathLike[str]) -> str | None:
    """What prompts of messages ended with in the run that trained the model in `folder`, for `GenerationSettings.lead`.

    "" where that was the template's generation prompt alone; None where no run is known, or one without messages or
    with prompts that differ in it. It stands in the run's `run.json`, as for `trained_prefix`.
    """
    lead = _run_of(folder).get("lead")
    return lead if isinstance(lead, str) else None


def _run_of(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not os.path.isdir(folder):  # a name on the Hub
        return {}
    path = os.path.realpath(folder)
    above = [os.path.dirname(path)] if CHECKPOINT.fullmatch(os.path.basename(path)) else []
    for place in (path, *above):
        try:
            with open(os.path.join(place, "run.json"), encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            continue
        if isinstance(found, Mapping) and "settings" in found:
            return found
    return {}


def lead_of(records: Sequence[RankedRecord], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What training on these records has between generation prompt and responses, the same for all of them.

    The generation prompt is the one without variables of a record's own, for a prompt alone has none. None where they
    differ in it, and without messages that go through a chat template. Of these 256 are looked at, evenly spread;
    what the template refuses does not count, nor do prompts that end in an answer's beginning.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [
        record for record in records if not isinstance(record.prompt, str) and record.prompt[-1]["role"] != "assistant"
    ]
    found = set()
    for record in messages[:: -(-len(messages) // 256) or 1]:
        with contextlib.suppress(RecordError):
            assert not isinstance(record.prompt, str)
            chat = render_chat(record.prompt, record.completions, tokenizer, record.source, record.template)
            plain = {name: value for name, value in record.template.items() if name == "tools"}
            start, _ = render_prompt(record.prompt, tokenizer, record.source, plain)
            found.add(chat.prompt[len(start) :] if chat.prompt.startswith(start) else chat.lead)
    return found.pop() if len(found) == 1 else None
