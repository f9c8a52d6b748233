"""Messages that a chat template does not write as they are: refused or said by name, accepted where it is its way."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.data import RankedRecord, RecordError, rendering
from tests.support.chat_templates import CHATML, IM, MESSAGES, Shape, chat_tokenizer

ANSWERS = ("Because it reflects the sea.", "Air scatters short wavelengths")
LONG = "A system text that is so long that no other words stand there by accident."
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(body: str) -> str:
    """ChatML whose messages are written as `body` says."""
    return "{% for m in messages %}" + body + "{% endfor %}" + END


def turn(content: str) -> str:
    return "<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n"


ONLY_TWO = template("{% if m.role in ('user', 'assistant') %}" + turn("{{ m.content }}") + "{% endif %}")
CALLS = template(
    "{% if m.tool_calls %}" + turn("{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}")
    + "{% else %}" + turn("{{ m.content }}") + "{% endif %}"
)  # fmt: skip
FIRST_CALL = CALLS.replace("m.tool_calls %}<call>", "m.tool_calls[:1] %}<call>")
NULL_CALLS = CALLS.replace("{% if m.tool_calls %}", "{% if m.content is none %}")
THOUGHTS = template(
    "{% set text = m.content.split('</think>')[-1].strip() %}{% if m.role == 'assistant' and not loop.last %}"
    + turn("{{ text }}") + "{% else %}" + turn("{{ m.content }}") + "{% endif %}"
)  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(*names: str, **arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in names]


WEATHER = (user("Weather?"), assistant(None, tool_calls=call("weather")), {"role": "tool", "content": "12 C"})


def tokenised(text: str | dict[str, str], messages: Any, **more: Any) -> str:
    tokenizer = chat_tokenizer(Shape("", "", "", IM, "<|endoftext|>"))
    tokenizer.chat_template = text
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(messages, ANSWERS, source="f:7", **more))
    assert [tokenizer.decode(ids) for ids in feature["completion_ids"]] == [f"{a}<|im_end|>" for a in ANSWERS]
    prompt: str = tokenizer.decode(feature["prompt_ids"])
    return prompt


LEFT_OUT = {
    "developer": (ONLY_TWO, ({"role": "developer", "content": "In French."}, user("Hi")), r"\[0\]: .*role 'developer'"),
    "long system": (ONLY_TWO, ({"role": "system", "content": LONG}, user("Hi")), r"\[0\]: .*role 'system'"),
    "the words are elsewhere": (ONLY_TWO, ({"role": "system", "content": "Hi"}, user("Hi")), r"\[0\]: .*role 'system'"),
    "the text is a user's": (ONLY_TWO, ({"role": "system", "content": LONG}, user(LONG)), r"\[0\]: .*role 'system'"),
    "the text is in a user's": (
        ONLY_TWO, (user("Hi"), assistant("Yes?"), {"role": "developer", "content": LONG}, user(f"Hi. {LONG} Why?")),
        r"\[2\]: .*role 'developer'"),
    "the first of two alike": (
        template("{% if not loop.first %}" + turn("{{ m.content }}") + "{% endif %}"),
        (user(LONG), assistant("Yes?"), user(LONG)),
        r"\[0\]: .*role 'user'",
    ),
    "tool": (ONLY_TWO, (user("Hi"), {"role": "tool", "content": "12 C"}), r"\[1\]: .*role 'tool'"),
    "a user in the middle": (
        template("{% if loop.index0 != 2 %}" + turn("{{ m.content }}") + "{% endif %}"),
        (*MESSAGES, assistant("So?"), user("Well?")),
        r"\[2\]: .*role 'user'",
    ),
    "no calls": (CHATML, WEATHER, r"\[1\].tool_calls: expected a chat template that writes it .*'weather'"),
    "calls of null content": (NULL_CALLS, WEATHER, r"\[1\].tool_calls: expected a chat template that writes it"),
    "a second call": (
        FIRST_CALL,
        (user("Weather?"), assistant("", tool_calls=call("weather", "time")), user("Well?")),
        r"\[1\].tool_calls: expected a chat template that writes it",
    ),
    "a call whose name is elsewhere": (
        CHATML,
        (user("weather"), assistant("weather", tool_calls=call("weather")), user("weather")),
        r"\[1\].tool_calls: expected a chat template that writes it",
    ),
    "function_call": (
        CALLS,
        (user("Hi"), assistant(None, function_call={"name": "f", "arguments": "{}"}), user("Why?")),
        r"\[1\].function_call: expected a chat template that writes it",
    ),
    "refusal": (CHATML, (user("Hi"), assistant("a", refusal="No."), user("Why?")), r"\[1\].refusal: expected a chat"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_refused_by_name(case: str) -> None:
    text, messages, expected = LEFT_OUT[case]
    with pytest.raises(RecordError, match=f"^f:7: prompt{expected}"):
        tokenised(text, messages)


def test_what_is_said_twice_and_written_twice_is_right() -> None:
    prompt = tokenised(CHATML, (user(LONG), assistant(LONG), user(f"{LONG} {LONG}")))
    assert prompt.count(LONG) == 4


# template, messages, what the prompt then has in place of "<|im_start|>user\nWhy?"
WAYS: dict[str, tuple[str, tuple[dict[str, Any], ...], str]] = {
    "trimmed": (template(turn("{{ m.content | trim }}")), (user(" Why? \n"),), "user\nWhy?<"),
    "thoughts of earlier turns": (
        THOUGHTS, (user("Hi"), assistant("<think>\nhm\n</think>\n\nHello"), user("Why?")), "assistant\nHello<"),
    "an earlier turn of thoughts alone": (
        THOUGHTS, (user("Hi"), assistant("<think>\nhm\n</think>"), user("Why?")), "assistant\n<|im_end|>"),
    "thoughts by their key": (
        THOUGHTS, (user("Hi"), assistant("Hello", reasoning_content="hm"), user("Why?")), "assistant\nHello<"),
    "a role of another name": (
        template(turn("{{ m.content }}").replace("m.role", "{'user': 'human'}.get(m.role, m.role)")),
        MESSAGES, "human\nWhy?<"),
    "the system text in the user's": (
        template("{% if not loop.first %}" + turn("{{ messages[0].content + ' ' if loop.index0 == 1 }}{{ m.content }}")
                 + "{% endif %}"),
        ({"role": "system", "content": "Be kind."}, user("Hi")), "user\nBe kind. Hi<"),
    "a switch that is taken out": (
        template(turn("{{ m.content.replace('/no_think', '') }}")),
        ({"role": "system", "content": f"{LONG} /no_think"}, user("Why?")), f"{LONG} <|im_end|>"),
    "a result quoted as JSON": (
        template(turn("{{ m.content | tojson if m.role == 'tool' else m.content }}")),
        (user("Hi"), {"role": "tool", "content": '12 "C"\nand sunny, as on all days before'}), r'"12 \"C\"\nand'),
    "capitals": (template(turn("{{ m.content.upper() if m.role == 'user' else m.content }}")), MESSAGES, "user\nWHY?<"),
    "an empty message": (ONLY_TWO, ({"role": "system", "content": " "}, user("Why?")), "user\nWhy?<"),
    "calls": (CALLS, WEATHER, "<call>weather</call>"),
    "calls without a function inside": (
        CALLS.replace("c.function.name", "c.name"),
        (user("Hi"), assistant("", tool_calls=[{"name": "f", "arguments": {}}]), user("Why?")), "<call>f</call>"),
    "whole calls": (CALLS.replace("c.function.name", "c | tojson"), WEATHER, '"name": "weather"'),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS)
def test_the_ways_of_templates_are_no_reason(case: str, caplog: pytest.LogCaptureFixture) -> None:
    text, messages, expected = WAYS[case]
    rendering._say.cache_clear()
    with caplog.at_level(logging.WARNING, "clha_fast.data"):
        assert expected in tokenised(text, messages)
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message", "said"),
    [
        (
            CHATML,
            assistant("Hello", reasoning_content="hm"),
            "reasoning_content: the tokenizer's chat template does not",
        ),
        (CHATML, assistant("Hello", thinking="hm"), "thinking: the tokenizer's chat template does not write it"),
        (CALLS, assistant("Let me look.", tool_calls=call("f")), "an assistant's message says beside tool_calls"),
        (ONLY_TWO.replace("'user', 'assistant'", "'user',"), assistant("Hello"), "what an assistant's message says"),
    ],
)
def test_what_is_left_out_of_an_assistant_s_turn_is_said_once(
    text: str, message: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    rendering._say.cache_clear()
    if "'user'," in text:  # the responses are an assistant's, too
        text = text.replace("in ('user',)", "== 'user' or loop.last")
    with caplog.at_level(logging.WARNING, "clha_fast.data"):
        for _ in range(3):
            tokenised(text, (user("Hi"), message, user("Why?")))
    assert [said in record.getMessage() for record in caplog.records] == [True]


THINKING = CHATML + "{% if enable_thinking is defined and add_generation_prompt %}{{ '' }}{% endif %}"


def test_variables_that_the_template_does_not_read() -> None:
    for good in ({"enable_thinking": False}, {"enable_thinking": None, "other": None}, {"other": "", "more": []}, {}):
        assert "user\nWhy?" in tokenised(THINKING, MESSAGES, template=good)
    for bad, hint in (
        ({"enable_thinkin": False}, "got 'enable_thinkin'; did you mean 'enable_thinking'"),
        ({"thinking": True}, "got 'thinking'"),
        ({"enable_thinking": True, "date_string": "1 May"}, "got 'date_string'"),
        ({"enable_thinking_": 0}, "got 'enable_thinking_'"),
    ):
        expected = "^f:7: chat_template_kwargs: expected variables that the tokenizer's chat template reads, "
        with pytest.raises(RecordError, match=expected + hint):
            tokenised(THINKING, MESSAGES, template=bad)


ITEMS = "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}{{ k }}{{ v }}{% endfor %}"
BROKEN: dict[str, tuple[str | dict[str, str], Any, str]] = {
    "TypeError": (
        template(turn(ITEMS + "{{ c.function.name }}{% endfor %}{{ m.content }}")),
        (user("Hi"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[]"}}]), user("Why?")),
        r"prompt: the tokenizer's chat template refuses these messages: Can only get item pairs .*JSON text"),
    "TypeError of an object": (
        template(turn("{% for c in m.tool_calls or [] %}{{ 'f' + c.function.arguments }}{% endfor %}{{ m.content }}")),
        (user("Hi"), assistant("", tool_calls=call("f")), user("Why?")), r"prompt: .*can only concatenate.*JSON text"),
    "ValueError": (template(turn("{{ '%q' % m.content if m.content == 'bad' else m.content }}")), (user("bad"),),
                   r"prompt: .*refuses these messages: unsupported format character"),
    "ZeroDivisionError": (template(turn("{{ 1 / 0 if m.content == 'bad' else m.content }}")), (user("bad"),), "prom"),
    "IndexError": (template(turn("{{ '{1}'.format(1) if m.content == 'bad' else m.content }}")), (user("bad"),), "pro"),
    "UndefinedError": (template(turn("{{ m.content + m.name.first if m.content == 'bad' else m.content }}")),
                       (user("bad"),), "prompt: .*'dict object' has no attribute 'name'"),
    "lines": ("{% if messages[0].content == 'bad' %}{{ raise_exception('a\n\n  b') }}{% endif %}" + CHATML,
              (user("bad"),), "prompt: the tokenizer's chat template refuses these messages: a b$"),
    "rewritten end": (
        template(turn("{{ m.content.split('</think>')[-1] }}")), (user("Hi"), assistant("<think>hm</think>So ")),
        r"prompt\[1\]: expected a final assistant message that the chat template writes as it is.*got '<think>"),
    "rewritten end, stripped": (
        template(turn("{{ m.content.replace('So', '') }}")), (user("Hi"), assistant("So")),
        r"prompt\[1\]: expected a final assistant message that the chat template writes as it is"),
    "calls at the end": (
        CALLS, WEATHER[:2], r"prompt\[1\].tool_calls: expected none in the message that the response continues"),
    "an answer with a call at the end": (
        CALLS, (user("Hi"), assistant("So", tool_calls=call("f"))), r"prompt\[1\].tool_calls: expected none in"),
    "a function_call at the end": (
        CHATML, (user("Hi"), assistant("So", function_call={"name": "f"})), r"prompt\[1\].function_call: expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_of_one_record_is_that_record_s(case: str) -> None:
    text, messages, expected = BROKEN[case]
    tokenizer = chat_tokenizer(Shape("", "", "", IM, "<|endoftext|>"))
    tokenizer.chat_template = text
    rows = [RankedRecord(MESSAGES, ANSWERS, source="f:1"), RankedRecord(messages, ANSWERS, source="f:2")]
    with pytest.raises(RecordError, match=f"^f:2: {expected}"):
        RankedDataset(rows, RankedCollator(tokenizer))
    skipped: list[RecordError] = []
    assert len(RankedDataset(rows, RankedCollator(tokenizer), skipped=skipped)) == 1
    (error,) = skipped
    assert error.source == "f:2"
    assert error.field.startswith("prompt")
    assert "\n" not in str(error)


def test_an_error_over_a_response_names_it() -> None:
    text = template(turn("{{ 1 / 0 if m.content == 'bad' else m.content }}"))
    tokenizer = chat_tokenizer(Shape(text, "", "", IM, "<|endoftext|>"))
    with pytest.raises(
        RecordError, match=r"^f:7: completions\[1\]: the tokenizer's chat template refuses these messages"
    ):
        RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ("good", "bad"), source="f:7"))


def test_several_templates_without_a_default() -> None:
    named = {"rag": CHATML, "tool_use": CHATML + "{{ '' if tools }}"}
    with pytest.raises(RecordError, match=r"^f:7: prompt: expected .* named 'default', got \['rag', 'tool_use'\]"):
        tokenised(named, MESSAGES)
    assert "user\nWhy?" in tokenised({**named, "default": CHATML}, MESSAGES)
    assert "user\nWhy?" in tokenised(named, MESSAGES, template={"tools": call("f")})


LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
PARTS = {
    "llava": (LLAVA, "USER: Hi\nASSISTANT: Yes?</s>USER: Why?\nASSISTANT: ", "</s>"),
    "idefics": (
        "{% for m in messages %}{{ m.role.capitalize() }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
        "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "User: Hi<|im_end|>\nAssistant: Yes?<|im_end|>\nUser: Why?<|im_end|>\nAssistant:",
        "<|im_end|>",
    ),
    "no text at all": (
        template(turn("{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}{{ m.content[0].text }}")),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "an error of Python's": (
        template(turn("{{ m.content[0]['text'] + '' if m.content[0]['text'] else 1 / 0 }}")),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_templates_that_want_contents_in_parts(case: str) -> None:
    text, prompt, closing = PARTS[case]
    tokenizer = chat_tokenizer(Shape(text, "", "", IM))
    collator = RankedCollator(tokenizer)
    texts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    for messages in (MESSAGES, texts):
        feature = collator.tokenize_record(RankedRecord(tuple(messages), ANSWERS))
        assert tokenizer.decode(feature["prompt_ids"]) == prompt
        scored = [tokenizer.decode(ids) for ids in feature["completion_ids"]]
        assert [text.lstrip() for text in scored] == [answer + closing for answer in ANSWERS]
    continued = RankedRecord((*MESSAGES, assistant("So")), (" it is.", " I think."))
    feature = collator.tokenize_record(continued)
    assert tokenizer.decode(feature["prompt_ids"]).removeprefix(prompt).lstrip() == "So"
    scored = [tokenizer.decode(ids) for ids in feature["completion_ids"]]
    assert scored == [f" it is.{closing}", f" I think.{closing}"]


@pytest.mark.parametrize("written", ["m.content", "m.content | tojson", "m.content | string | trim"])
def test_parts_are_no_way_where_they_are_printed_as_they_are(written: str) -> None:
    text = template(turn("{{ " + written + " if m.content is not string }}"))
    with pytest.raises(RecordError, match=r"^f:7: prompt\[0\]: expected a chat template that writes .*role 'user'"):
        tokenised(text, MESSAGES)


def test_parts_do_not_hide_why_a_template_refuses_texts() -> None:
    refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('a user first') }}{% endif %}" + CHATML
    with pytest.raises(RecordError, match=r"^f:7: prompt: .*refuses these messages: a user first$"):
        tokenised(refuses, ({"role": "system", "content": "Hi"}, user("Why?")))
