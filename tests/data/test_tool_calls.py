"""Calls of tools as OpenAI's JSON has them: nulls where there is none, arguments as JSON text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord, RecordError, read_records
from clha_fast.data.prompts import PromptRecord
from clha_fast.data.rendering import render_messages
from clha_fast.generation.asking import question
from clha_fast.generation.backend import GenerationSettings
from clha_fast.generation.prompts import encode_prompts
from tests.support.chat_templates import IM, Shape, chat_tokenizer

END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NULLS = {"tool_calls": None, "function_call": None}


def template(arguments: str, calls: str = "tool_calls") -> str:
    """ChatML with calls whose arguments are written as the expression or statements say."""
    each = "{% set f = c.function if c.function is defined else c %}<call>{{ f.name }} " + arguments + "</call>"
    written = f"{{% for c in m.{calls} or [] %}}{each}{{% endfor %}}"
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + written + "{{ m.content }}<|im_end|>\n{% endfor %}" + END
    )


TEMPLATES = {
    "text": template("{{ '' + f.arguments }}"),
    "as it is": template("{{ f.arguments }}"),
    "either": template("{{ f.arguments if f.arguments is string else f.arguments | tojson }}"),
    "items": template("{% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }} {% endfor %}"),
    "its own items": template("{% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }} {% endfor %}"),
    "JSON": template("{{ f.arguments | tojson }}"),
    "the whole call": template("{{ f | tojson }}"),
    "where it is an object": template("{% if f.arguments is mapping %}{{ f.arguments | tojson }}{% endif %}"),
    "in parts": template("{{ f.arguments | tojson }}").replace("m.content }}", "m.content[0].text }}"),
}
OBJECTS: list[dict[str, Any]] = [
    {"city": "Rome", "days": 3},
    {"city": "Zürich", "at": {"hour": 3, "zone": None}, "list": [1, "two"]},
    {"quoted": 'a "b" \\ c'},
    {},
]


def tokenizer(text: str) -> Any:
    found = chat_tokenizer(Shape("", "", "", IM, "<|endoftext|>"))
    found.chat_template = text
    return found


def conversation(arguments: Any, **more: Any) -> tuple[dict[str, Any], ...]:
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    return (
        {"role": "user", "content": "Weather?", **more},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "12 C", "tool_call_id": "1", **more},
    )


def prompt(text: str, messages: Any) -> str:
    """As training, generation and a question alone read it, which must be the same."""
    own = tokenizer(text)
    asked = question(PromptRecord(messages), own).text
    ids = RankedCollator(own).tokenize_record(RankedRecord(messages, ("It is 12.", "Hot.")))["prompt_ids"]
    assert own.decode(ids) == asked
    assert own.decode(encode_prompts([PromptRecord(messages)], own, GenerationSettings()).prompts[0].ids) == asked
    return asked


@pytest.mark.parametrize("arguments", OBJECTS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("text", "as it is", "either")])
def test_a_template_that_takes_objects_is_given_one(name: str, arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments, ensure_ascii=False)
    assert prompt(TEMPLATES[name], conversation(text)) == prompt(TEMPLATES[name], conversation(arguments))
    if arguments:
        spaced = json.dumps(arguments, indent=2)  # escapes what is not ASCII
        assert prompt(TEMPLATES[name], conversation(spaced)) == prompt(TEMPLATES[name], conversation(arguments))


@pytest.mark.parametrize("arguments", OBJECTS)
@pytest.mark.parametrize("name", ["text", "as it is", "either"])
def test_a_template_that_takes_the_text_is_given_that(name: str, arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments, indent=1)
    assert f"<call>weather {text}</call>" in prompt(TEMPLATES[name], conversation(text))


def test_other_places_of_a_call() -> None:
    text, given = json.dumps(OBJECTS[0]), OBJECTS[0]
    bare = template("{{ f.arguments | tojson }}")
    for calls in (
        [{"name": "f", "arguments": text}],
        [{"name": "f", "arguments": text}, {"name": "g", "arguments": given}],
    ):
        objects = [{**call, "arguments": given} for call in calls]
        both = [
            prompt(
                bare,
                ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": own}, user()),
            )
            for own in (calls, objects)
        ]
        assert both[0] == both[1]
    old = template("{% for k, v in f.arguments | items %}{{ k }}={{ v }} {% endfor %}", "function_call").replace(
        "for c in m.function_call or []", "for c in ([m.function_call] if m.function_call else [])"
    )
    both = [
        prompt(
            old, ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "function_call": own}, user())
        )
        for own in ({"name": "f", "arguments": text}, {"name": "f", "arguments": given})
    ]
    assert both[0] == both[1]
    empty = [prompt(TEMPLATES["items"], conversation(own)) for own in ("", {})]
    assert empty[0] == empty[1], "a call without arguments"


def user() -> dict[str, Any]:
    return {"role": "user", "content": "Well?"}


@pytest.mark.parametrize("arguments", ["[1]", "3", "{city: Rome}", '{"city": ', '"Rome"'])
def test_what_is_no_object_is_the_template_s_to_refuse(arguments: str) -> None:
    with pytest.raises(RecordError, match=r"prompt: the tokenizer's chat template refuses .*others JSON text"):
        prompt(TEMPLATES["items"], conversation(arguments))
    assert json.dumps(arguments) in prompt(TEMPLATES["JSON"], conversation(arguments))


def test_the_record_stays_as_it_came() -> None:
    messages = conversation('{"city": "Rome"}')
    record = RankedRecord(messages, ("a", "b"))
    render_messages(record.prompt, tokenizer(TEMPLATES["items"]))
    assert record.prompt[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


# ---- nulls ----


def rows(more: dict[str, Any], arguments: Any) -> list[dict[str, Any]]:
    """A row in each form that has messages."""
    asked = list(conversation(arguments, **more))
    answers = [{"role": "assistant", "content": text, **more} for text in ("It is 12.", "Hot.")]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"default": None}}}]
    return [
        {"prompt": asked, "completions": ["It is 12.", "Hot."]},
        {"prompt": asked, "completions": ["It is 12.", "Hot."], "tools": tools},
        {"prompt": asked, "completions": [[answer] for answer in answers]},
        {"chosen": [*asked, answers[0]], "rejected": [*asked, answers[1]]},
    ]


@pytest.mark.parametrize("more", [NULLS, {"tool_calls": None}, {**NULLS, "refusal": None, "audio": None, "name": None}])
@pytest.mark.parametrize("arguments", [{"city": "Rome", "unit": None}, {"at": {"zone": None}}, '{"unit": null}'])
def test_a_null_says_no_more_than_no_key(tmp_path: Path, more: dict[str, Any], arguments: Any) -> None:
    for number, (row, plain) in enumerate(zip(rows(more, arguments), rows({}, arguments), strict=True)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (expected,) = read_records([plain])
        for (record,) in (read_records(path), read_records([row])):
            assert record.prompt == expected.prompt
            assert record.completions == expected.completions
            assert record.template == expected.template
        call = expected.prompt[1]["tool_calls"][0]
        assert call["function"]["arguments"] == arguments


def test_calls_of_other_arguments_are_no_table() -> None:
    """Every message has the keys of all, but one call's arguments are not the other's."""
    calls = [{"function": {"name": name, "arguments": own}} for name, own in (("f", {"a": None}), ("g", {"b": 1}))]
    messages = [
        {"role": "user", "content": "Hi", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "user", "content": "Well?", "tool_calls": None},
    ]
    (record,) = read_records([{"prompt": messages, "completions": ["a", "b"]}])
    assert record.prompt[1]["tool_calls"] == calls
