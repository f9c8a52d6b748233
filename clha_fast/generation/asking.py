"""Messages without a response as the tokens that the model is asked with."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from clha_fast.batching.chat import render_chat, with_response
from clha_fast.data.prompts import Prompted
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.rendering import apply_template, render_messages

# What stands for a response where there is none.
RESPONSE = "response"


class Question(NamedTuple):
    """A prompt of messages, to be answered.

    Attributes:
        text: what the model reads: the template's generation prompt, and the lead that was asked for.
        lead: what the template itself puts between generation prompt and a response; "" where it puts nothing, or
            writes prompt and response otherwise than the prompt alone.
        before: blanks with which it begins a response. closing: what it writes behind one, up to and with its end of
            turn. closed: whether that is a special token.
        added: whether `text` is longer than the generation prompt.
    """

    text: str
    lead: str
    before: str
    closing: str
    closed: bool
    added: bool


def question(record: Prompted, tokenizer: PreTrainedTokenizerBase, lead: str | None = None) -> Question:
    """The record's messages behind which an answer begins, whether or not the template could write a response there.

    Its responses play no part. `lead` None is "", and for a template that has no generation prompt the beginning that
    it gives the assistant's turn. A final message of the assistant's is continued, without a lead.

    Raises:
        RecordError: the template refuses the messages.
    """
    messages = record.prompt
    assert not isinstance(messages, str)
    turns, start = render_messages(messages, tokenizer, record.source, record.template)
    try:
        chat = render_chat(messages, [RESPONSE], tokenizer, record.source, record.template)
    except RecordError:  # thoughts that it begins for a prompt and leaves out of an answer, say
        own = before = ""
        closing, closed = closing_of(record, tokenizer)
    else:
        own, closed = chat.lead, chat.closed
        before, _, closing = chat.responses[0].partition(RESPONSE)
    if lead is None:
        lead = "" if not own or _applied(turns, record, tokenizer) != start else own
    added = bool(lead) and messages[-1]["role"] != "assistant" and not start.endswith(lead)
    return Question(start + lead if added else start, own, before, closing, closed, added)


def _applied(messages: list[Any], record: Prompted, tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages as the template writes them, "" where it refuses them."""
    try:
        return apply_template(messages, tokenizer, record.source, "prompt", record.template)
    except RecordError:
        return ""


def closing_of(record: Prompted, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """(What the template writes behind a response, up to a special token; whether there is that token).

    Where the response begins does not matter here. ("", False) where the template refuses one, or writes none of it.
    """
    assert not isinstance(record.prompt, str)
    stand_in = RESPONSE
    while any(stand_in in str(message) for message in record.prompt):
        stand_in += "0"
    try:
        turns, _ = render_messages(record.prompt, tokenizer, record.source, record.template)
    except RecordError:
        return "", False
    _, found, rest = _applied(with_response(turns, stand_in), record, tokenizer).rpartition(stand_in)
    if not found:
        return "", False
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [rest.find(token) + len(token) for token in special if token in rest]
    return (rest[: min(ends)], True) if ends else (rest.rstrip(), False)


def encode_question(
    found: Question, tokenizer: PreTrainedTokenizerBase, limit: int | None, source: str
) -> tuple[list[int], bool]:
    """(its tokens, whether some were cut): on the left behind BOS, as `RankedCollator` cuts them.

    Raises:
        RecordError: no token; a limit that leaves none of its own.
    """
    ids = list(tokenizer(found.text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
    if not ids:
        raise RecordError.of(source, "prompt", "at least one token", found.text)
    front = int(ids[0] == tokenizer.bos_token_id)
    if limit is None or len(ids) <= limit:
        return ids, False
    if limit <= front:
        expected = f"at least {front + 1} tokens for this prompt"
        raise RecordError.of(source, "max_prompt_length", expected, limit)
    return ids[:front] + ids[len(ids) - (limit - front) :], True


def usual_closing(tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """`closing_of` any conversation, for texts that the chat template has rendered beforehand."""
    if not getattr(tokenizer, "chat_template", None):
        return "", False
    return closing_of(RankedRecord(({"role": "user", "content": "Hi"},), (RESPONSE,)), tokenizer)
