"""A prompt as the text that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clha_fast.data.records import SAID, Message, Prompt, RecordError


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
        RecordError: the chat template refuses the messages (many demand strictly alternating roles); there is none, or
            one that writes no tools, where `template` needs it.
    """
    if isinstance(prompt, str):
        return prompt, False
    if not getattr(tokenizer, "chat_template", None):
        if template:
            name = "tools" if "tools" in template else "chat_template_kwargs"
            raise RecordError.of(source, name, "a tokenizer with a chat template", type(tokenizer).__name__)
        for number, turn in enumerate(prompt):
            for key in SAID:
                if turn.get(key):
                    expected = "a tokenizer with a chat template, which writes it (or the text in content)"
                    raise RecordError.of(source, f"prompt[{number}].{key}", expected, turn[key])
        return plain_template(prompt), False
    if template and "tools" in template and "tools" not in tokenizer.get_chat_template(tools=template["tools"]):
        message = f"{source}: tools: expected a chat template that writes tools, got one that does not"
        raise RecordError(message, source=source, field="tools")
    from jinja2 import TemplateError  # transformers needs jinja2 for chat templates only

    continues = prompt[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(prompt),
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **(template or {}),
        )
    except TemplateError as error:
        message = f"{source}: prompt: the tokenizer's chat template refuses these messages: {error}"
        raise RecordError(message, source=source, field="prompt") from error
    return text, True
