"""Messages and their responses as the chat template writes them: where a response begins, and what closes it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from clha_fast.data.records import Message, RecordError
from clha_fast.data.rendering import apply_template, content_as, render_messages

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN = 60  # characters of a rendering in an error
# Of tokenizers as they were: how many tokens and which special ones by name, and a pattern of all special ones.
_PATTERNS: weakref.WeakKeyDictionary[Any, tuple[Any, re.Pattern[str]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ChatTexts:
    """One prompt and its responses, to be tokenised apart.

    Attributes:
        prompt: everything before the responses: the generation prompt is its end.
        responses: each response's own text and what closes it, up to and with the template's end of turn.
        closed: whether the template has an end of turn; otherwise an EOS token must follow.
        lead: the end of `prompt` that the template's own generation prompt does not have, "" where it has all.
    """

    prompt: str
    responses: tuple[str, ...]
    closed: bool
    lead: str = ""


@dataclass(frozen=True)
class _Turn:
    """What the template writes around the text of a response.

    Attributes:
        lead: between generation prompt and response, not the response's own (an empty block of thoughts, say).
        closing: directly after the response, scored. end_of_turn: the special token in it, "" where there is none.
        rest: all that follows the response, scored or not.
        before: all before the lead: the prompt, or what the template leaves of it before a response.
        opening: all between `before` and the response: the lead, and blanks.
    """

    lead: str
    closing: str
    end_of_turn: str
    rest: str
    before: str
    opening: str


def render_chat(
    messages: Sequence[Message],
    completions: Sequence[str],
    tokenizer: Any,
    source: str,
    template: Mapping[str, Any] | None = None,
    field: str = "completions",
    sampled: bool = False,
) -> ChatTexts:
    r"""Where the responses begin and end is learnt from the template itself, with a text that stands for any response.

    The prompt is the rendering with the generation prompt. What the template puts between that and the response goes
    to the prompt when it is more than blanks and the same for all ("<think>\n\n</think>\n\n"); blanks go to the
    response, whose first token they are part of ("[/INST] Yes"). A response ends with the first special token behind
    it ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>"), and what the template writes after that is left out.
    Where the template marks `{% generation %}`, the mark decides, only never without the end of turn. A final
    assistant message is continued by the responses. `template` is `RankedRecord.template`; `field` names the responses
    in errors. `sampled` responses are a model's own words, no data to find fault with: one that the template refuses,
    or does not write as it is, stands as it is where the template writes any other, and may be empty.

    Raises:
        RecordError: as `render_messages`; the template's rendering of prompt and response does not begin with the
            prompt's, or does not end as with another response; it leaves out some of a response's text.
    """
    given = template or {}
    messages, start = render_messages(messages, tokenizer, source, given)
    turn = _learn_turn(messages, start, tokenizer, source, given)
    bodies = []
    for number, completion in enumerate(completions):
        try:
            bodies.append(_body(messages, completion, turn, start, tokenizer, source, f"{field}[{number}]", given))
        except RecordError:
            if not sampled:
                raise
            bodies.append(turn.opening + completion)
    lead = turn.lead if all(body.startswith(turn.lead) for body in bodies) else ""
    responses = []
    for number, body in enumerate(bodies):
        own = _unclosed(body[len(lead) :], turn)
        if not own and not sampled:
            expected = "a response with at least one token"
            raise RecordError.of(source, f"{field}[{number}]", expected, completions[number])
        responses.append(own + turn.closing)
    return ChatTexts(start + lead, tuple(responses), bool(turn.end_of_turn), lead)


def _body(
    messages: Sequence[Message],
    completion: str,
    turn: _Turn,
    start: str,
    tokenizer: Any,
    source: str,
    name: str,
    given: Mapping[str, Any],
) -> str:
    """What the template writes of a response between `turn.before` and `turn.rest`."""
    whole = apply_template(with_response(messages, completion), tokenizer, source, name, given)
    if not whole.startswith(turn.before):
        raise _broken(source, name, start, whole)
    if len(whole) < len(turn.before) + len(turn.rest) or not whole.endswith(turn.rest):
        expected = f"a chat template that ends this response as any other, with {turn.rest!r}"
        raise RecordError.of(source, name, expected, whole[-_SHOWN:])
    body = whole[len(turn.before) : len(whole) - len(turn.rest)]
    if _squeezed(completion) not in _squeezed(body):
        raise RecordError.of(source, name, "a chat template that keeps the whole text of a response", body)
    return body


def _learn_turn(
    messages: Sequence[Message], start: str, tokenizer: Any, source: str, template: Mapping[str, Any]
) -> _Turn:
    stand_in = "response"
    while stand_in in start:
        stand_in += "0"
    chat = with_response(messages, stand_in)
    whole = apply_template(chat, tokenizer, source, "prompt", template)
    if not whole.startswith(start):
        written, start = start, _without_system(messages, start, whole[: whole.rfind(stand_in)])
        if not start:
            raise _broken(source, "prompt", written, whole)
    at = whole.find(stand_in, len(start))
    if at < 0:
        raise RecordError.of(source, "prompt", "a chat template that writes the response's text", whole[-_SHOWN:])
    before, rest = whole[len(start) : at], whole[at + len(stand_in) :]
    found = _special_tokens(tokenizer).search(rest)
    end = len(rest.rstrip()) if found is None else found.end()
    lead = before if before.strip() else ""
    span = _generation_span(chat, tokenizer, at, template)
    if span is not None:
        lead = before[: max(span[0] - len(start), 0)]
        end = max(end, span[1] - at - len(stand_in))
    return _Turn(lead, rest[:end], "" if found is None else found[0], rest, start, before)


def with_response(messages: Sequence[Message], text: str) -> list[Message]:
    """`render_messages`' messages with an answer, or with the rest of the one that they end in."""
    last = messages[-1]
    parts = not isinstance(last["content"], str)
    if last["role"] == "assistant":
        before = last["content"][-1]["text"] if parts else last["content"]
        return [*messages[:-1], {**last, "content": content_as(before + text, parts)}]
    return [*messages, {"role": "assistant", "content": content_as(text, parts)}]


def _broken(source: str, field: str, start: str, whole: str) -> RecordError:
    expected = (
        "a chat template whose rendering of prompt and response begins with that of the prompt "
        f"(which ends with {start[-_SHOWN:]!r}), or prompt and responses as rendered texts"
    )
    same = next((k for k, pair in enumerate(zip(start, whole, strict=False)) if pair[0] != pair[1]), len(whole))
    return RecordError.of(source, field, expected, whole[max(same - _SHOWN // 2, 0) : same + _SHOWN // 2])


def _without_system(messages: Sequence[Message], start: str, whole: str) -> str:
    """`whole`, the text before a response, where it is `start` without the system text, but for blanks; else "".

    Some templates write that text into the last turn alone, where it is the user's: before a response it is gone.
    Generation begins with the prompt that has it, and the response is the same.
    """
    first = messages[0]
    system = _squeezed(str(first["content"])) if first["role"] == "system" else ""
    if not system or _squeezed(start).replace(system, "", 1) != _squeezed(whole):
        return ""
    same = whole.rstrip() + start[len(start.rstrip()) :]
    return same if whole.startswith(same) else ""


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    named = tuple(map(str, tokenizer.all_special_tokens))
    key = (len(tokenizer), named)
    found = _PATTERNS.get(tokenizer)
    if found is None or found[0] != key:
        # Thousands of added tokens (Gemma's) take longer to be listed than a record takes to be tokenised.
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {*named}
        pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
        found = _PATTERNS[tokenizer] = key, pattern
    return found[1]


def _generation_span(
    messages: list[Message], tokenizer: Any, at: int, given: Mapping[str, Any]
) -> tuple[int, int] | None:
    """The characters that the template marks as generated around position `at`, if it marks any there."""
    template = tokenizer.get_chat_template(tools=given.get("tools"))
    if not _GENERATION.search(template):
        return None
    _, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **given},
    )
    return next(((start, end) for start, end in spans[0] if start <= at < end), None)


def _unclosed(text: str, turn: _Turn) -> str:
    """The text without an end of turn of its own, which would double the template's."""
    trimmed = text.rstrip()
    for ending in (turn.closing, turn.end_of_turn):
        if ending.strip() and trimmed.endswith(ending):
            return trimmed.removesuffix(ending)
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split())
