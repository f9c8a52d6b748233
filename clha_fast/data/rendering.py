"""A prompt as the text that a model reads."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clha_fast.data.fields import holds
from clha_fast.data.names import near
from clha_fast.data.records import SAID, Message, Prompt, RecordError, is_sequence, shorten

logger = logging.getLogger("clha_fast.data")

# Names of what was thought before a turn was said; templates that know one read all of them.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
# What templates raise on messages that they were not written for, beside their own `raise_exception`.
_RAISED = (TypeError, ValueError, LookupError, ArithmeticError)
_LONGEST_ERROR = 300
_SURE = 16  # letters of a content that stand in a text by no accident
_Render = Callable[[Sequence[Message]], str]


def plain_template(messages: Iterable[Message]) -> str:
    r"""The template for tokenizers that bring none: "System: ...\n\nUser: ...\n\nAssistant: ".

    Messages are separated by an empty line and the text ends with "Assistant: ", where the response begins,
    unless the last message is the assistant's own: then the response continues it.
    """
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    if not turns or not turns[-1].startswith("Assistant: "):
        turns.append("Assistant: ")
    return "\n\n".join(turns)


def render_prompt(
    prompt: Prompt, tokenizer: Any, source: str = "record", template: Mapping[str, Any] | None = None
) -> tuple[str, bool]:
    """The prompt's text, and whether it holds its own special tokens.

    Args:
        prompt: text, taken as it is; or messages, put through the tokenizer's chat template (with the
            generation prompt, or continuing a final assistant message), or `plain_template` where it has
            none.
        tokenizer: a transformers tokenizer.
        source: named in errors.
        template: as `RankedRecord.template`.

    Returns:
        (text, True when a chat template wrote it: the template writes BOS itself, so none must be added).

    Raises:
        RecordError: as `render_messages`; there is no chat template where `template` or a message needs it.
    """
    if isinstance(prompt, str):
        return prompt, False
    if getattr(tokenizer, "chat_template", None):
        return render_messages(prompt, tokenizer, source, template)[1], True
    if template:
        name = "tools" if "tools" in template else "chat_template_kwargs"
        raise RecordError.of(source, name, "a tokenizer with a chat template", type(tokenizer).__name__)
    for number, turn in enumerate(prompt):
        for key in SAID:
            if turn.get(key):
                expected = "a tokenizer with a chat template, which writes it (or the text in content)"
                raise RecordError.of(source, f"prompt[{number}].{key}", expected, turn[key])
    return plain_template(prompt), False


def render_messages(
    messages: Sequence[Message], tokenizer: Any, source: str = "record", template: Mapping[str, Any] | None = None
) -> tuple[list[Message], str]:
    """The messages in the form that the tokenizer's chat template reads, and their text.

    Contents are texts, or one part `{"type": "text", "text": ...}` each for a template that writes parts alone, as
    those of vision models do. Arguments of a call that are JSON text, as OpenAI has them, become objects for a template
    that refuses the text, quotes it once more or does not write it. That a template leaves out thoughts, or what an
    assistant said beside a call, is its way of writing earlier turns: it is said once where it never writes them.

    Raises:
        RecordError: the template refuses the messages (many demand strictly alternating roles), leaves one of them or a
            tool call out, or does not read a variable; it writes no tools; several templates and none is the default;
            a call in a message that the response continues.
    """
    given = template or {}
    _check_variables(given, tokenizer, source)
    last = messages[-1]
    continues = last["role"] == "assistant"
    for key in _CALLS:
        if continues and last.get(key):
            expected = "none in the message that the response continues (a call is over; the tool's answer follows it)"
            raise RecordError.of(source, f"prompt[{len(messages) - 1}].{key}", expected, last[key])

    def render(turns: Sequence[Message]) -> str:
        how = {"add_generation_prompt": not continues, "continue_final_message": continues}
        return apply_template(turns, tokenizer, source, "prompt", {**given, **how})

    texts: list[str] = []
    objects = [
        {key: _parsed(item, texts) if key in _CALLS else item for key, item in turn.items()} for turn in messages
    ]
    refused: RecordError | None = None
    try:
        found = _written(messages, render)
    except RecordError as error:
        if not texts:
            raise
        refused = error
    if refused is not None or any(_is_misread(own, found[1]) for own in texts):
        try:
            found = _written(objects, render)
        except RecordError:
            if refused is not None:
                raise refused from None
    turns, text, lost = found
    _check_written(messages, lost, tokenizer, source, given)
    return turns, text


def _written(messages: Sequence[Message], render: _Render) -> tuple[list[Message], str, set[tuple[int, str]]]:
    """The messages in the form that the template reads, but for arguments of calls; their text; what it leaves out."""
    turns = list(messages)
    try:
        text = render(turns)
    except RecordError as error:
        found = _in_parts(turns, render)
        if found is None:
            raise error
        turns, text = found
    lost = _lost(turns, text, render)
    told = {(number, "content") for number, turn in enumerate(messages) if turn["content"].strip()}
    if told and told <= lost and (found := _in_parts(turns, render)) is not None:
        turns, text = found
        lost = _lost(turns, text, render)
    return turns, text, lost


def _parsed(calls: Any, texts: list[str]) -> Any:
    """A call, or a list of them, whose arguments are objects; `texts` gets those that were one as JSON."""
    if is_sequence(calls):
        return [_parsed(call, texts) for call in calls]
    if not isinstance(calls, Mapping):
        return calls
    if isinstance(calls.get("function"), Mapping):
        return {**calls, "function": _parsed(calls["function"], texts)}
    text = calls.get("arguments")
    if not isinstance(text, str):
        return calls
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError:
        return calls
    if not isinstance(found, dict):
        return calls
    texts.append(text)
    return {**calls, "arguments": found}


def _is_misread(arguments: str, text: str) -> bool:
    """Whether a template has not written the JSON text of a call's arguments, or as a JSON text of that text."""
    return _squeezed(arguments) not in _squeezed(text) or json.dumps(arguments, ensure_ascii=False) in text


def _in_parts(messages: Sequence[Message], render: _Render) -> tuple[list[Message], str] | None:
    """The messages with their contents as parts and their text, None where the template reads texts, or neither."""
    word = "neutralword"
    with contextlib.suppress(RecordError):
        if word in render([{**turn, "content": word} for turn in messages]).lower():
            return None
    turns = [{**turn, "content": content_as(turn["content"], parts=True)} for turn in messages]
    try:
        text = render(turns)
    except RecordError:
        return None
    # A template that takes them for a text writes them as Python or JSON does.
    return None if re.search(r"""["']type["']: ["']text["']""", text) else (turns, text)


def content_as(text: str, parts: bool) -> str | list[dict[str, str]]:
    """A message's content: the text, or the one part that it is."""
    return [{"type": "text", "text": text}] if parts else text


def apply_template(
    messages: Sequence[Message], tokenizer: Any, source: str, field: str, variables: Mapping[str, Any]
) -> str:
    """`tokenizer.apply_chat_template`, whose errors are the record's: RecordError of `field`, in one line."""
    from jinja2 import TemplateError  # transformers needs jinja2 for chat templates only

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **variables))
    except (TemplateError, *_RAISED) as error:
        if variables.get("continue_final_message") and isinstance(error, ValueError):
            expected = "a final assistant message that the chat template writes as it is, for responses to continue it"
            got = messages[-1]["content"]
            raise RecordError.of(source, f"{field}[{len(messages) - 1}]", expected, got) from error
        why = " ".join(str(error).split())
        if isinstance(error, _RAISED) and any(message.get(key) for message in messages for key in _CALLS):
            why += " (of a tool call's arguments some templates want an object, others JSON text)"
        message = f"{source}: {field}: the tokenizer's chat template refuses these messages: {why[:_LONGEST_ERROR]}"
        raise RecordError(message, source=source, field=field) from error


def _check_variables(given: Mapping[str, Any], tokenizer: Any, source: str) -> None:
    template = _template_text(given, tokenizer, source)
    for name, value in given.items():
        if not holds(value) or re.search(rf"\b{re.escape(name)}\b", template):
            continue
        if name == "tools":
            message = f"{source}: tools: expected a chat template that writes tools, got one that does not"
            raise RecordError(message, source=source, field="tools")
        message = (
            f"{source}: chat_template_kwargs: expected variables that the tokenizer's chat template reads, got {name!r}"
            + near(name, set(re.findall(r"\w+", template)))
        )
        raise RecordError(message, source=source, field="chat_template_kwargs")


def read_variables(given: Mapping[str, Any], tokenizer: Any, source: str = "record") -> Mapping[str, Any]:
    """`RankedRecord.template` for a model that it was not written for: the variables that this chat template reads.

    What is left out is said once. Tools stay, for they are part of what is asked: `render_prompt` refuses them.

    Raises:
        RecordError: several templates and none is the default.
    """
    template = _template_text(given, tokenizer, source) if getattr(tokenizer, "chat_template", None) else ""
    unread = [name for name in given if name != "tools" and not re.search(rf"\b{re.escape(name)}\b", template)]
    if held := [name for name in unread if holds(given[name])]:
        _say(
            f"chat_template_kwargs: the reward model's chat template does not read {', '.join(sorted(held))}; it is "
            "asked without"
        )
    return {name: value for name, value in given.items() if name not in unread}


def _template_text(given: Mapping[str, Any], tokenizer: Any, source: str) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=given.get("tools")))
    except ValueError as error:
        expected = "a tokenizer with one chat template, or with one of several named 'default'"
        raise RecordError.of(source, "prompt", expected, sorted(tokenizer.chat_template)) from error


def _lost(turns: Sequence[Message], text: str, render: _Render) -> set[tuple[int, str]]:
    """(place, key) of contents and calls that are not in the text.

    A long content that stands there as it is, as often as messages hold it, needs no more. Others get a mark at their
    end, and are looked for in one more rendering: a template may trim, quote or shorten what it writes, and short words
    are there by accident.
    """
    letters, contents = _squeezed(text), [_squeezed(_text_of(turn["content"])) for turn in turns]
    said = "\n".join(contents)
    places: list[tuple[int, str]] = []
    for number, (turn, own) in enumerate(zip(turns, contents, strict=True)):
        if own and (len(own) < _SURE or letters.count(own) < said.count(own)):
            places.append((number, "content"))
        places += [(number, key) for key in _CALLS if turn.get(key)]
    if not places:
        return set()
    stem = "mark"
    while stem in text:
        stem += "q"
    marked = [dict(turn) for turn in turns]
    marks = [f"{stem}{place}end" for place in range(len(places))]
    for (number, key), mark in zip(places, marks, strict=True):
        value = marked[number][key]
        if key == "content":
            marked[number][key] = content_as(f"{_text_of(value)} {mark}", parts=not isinstance(value, str))
        else:
            marked[number][key] = _named(value, mark)
    try:
        found = render(marked).lower()
    except RecordError:  # it looks into what is no longer as it was: nothing is known
        return set()
    return {
        (number, key)
        for (number, key), mark in zip(places, marks, strict=True)
        if found.count(mark) < (1 if key == "content" else str(marked[number][key]).count(mark))
    }


def _named(calls: Any, mark: str) -> Any:
    """A call, or a list of them, with a mark at the end of each function's name."""
    if is_sequence(calls):
        return [_named(call, mark) for call in calls]
    if not isinstance(calls, Mapping):
        return calls
    if isinstance(calls.get("function"), Mapping):
        return {**calls, "function": _named(calls["function"], mark)}
    return {**calls, "name": f"{calls.get('name', '')}{mark}"}


def _text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_written(
    messages: Sequence[Message],
    lost: set[tuple[int, str]],
    tokenizer: Any,
    source: str,
    given: Mapping[str, Any],
) -> None:
    template = _template_text(given, tokenizer, source)
    for number, turn in enumerate(messages):
        for key in SAID:
            if not turn.get(key):
                continue
            if key in _THOUGHTS:
                if "</think>" not in template and not any(name in template for name in _THOUGHTS):
                    _say(f"prompt: {key}: the tokenizer's chat template does not write it; it is left out")
            elif (number, key) in lost or key not in template:
                expected = "a chat template that writes it (or the text in content)"
                raise RecordError.of(source, f"prompt[{number}].{key}", expected, turn[key])
        if (number, "content") not in lost:
            continue
        if turn["role"] == "assistant":
            beside = next((f" beside {key}" for key in _CALLS if turn.get(key)), "")
            _say(f"prompt: the tokenizer's chat template leaves out what an assistant's message says{beside}")
        else:
            role = shorten(turn["role"])
            expected = f"a chat template that writes a message of the role {role} here (or its text in another message)"
            raise RecordError.of(source, f"prompt[{number}]", expected, turn["content"])


@functools.cache
def _say(text: str) -> None:
    logger.warning(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())
