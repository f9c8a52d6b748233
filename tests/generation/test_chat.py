"""Conversations: what the model reads is the history as training would write it, and what is shown is the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from clha_fast.data.prompts import PromptRecord
from clha_fast.generation import GenerationSettings, TransformersBackend, generate_answers
from clha_fast.generation.chat import Chat
from tests.support.scripted import saying
from tests.support.tiny import make_model, make_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drawn from an almost uniform model: letters, blanks, and bytes that are no letters.
SHORT = GenerationSettings(max_new_tokens=6, max_prompt_length=None, temperature=1.0)
LONG = GenerationSettings(max_new_tokens=40, max_prompt_length=None, temperature=1.0)


def backend(template: str | None = CHAT, positions: int = 128) -> TransformersBackend:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return TransformersBackend(make_model(len(tokenizer), max_position_embeddings=positions), tokenizer)


@pytest.mark.parametrize("template", [CHAT, None], ids=["template", "transcript"])
def test_each_answer_is_that_to_the_whole_conversation(tmp_path: Path, template: str | None) -> None:
    model = backend(template)
    chat, messages = Chat(model, SHORT, system="be kind"), [{"role": "system", "content": "be kind"}]
    for number, line in enumerate(("the cat sat", "and a dog", "rain fell")):
        pieces: list[str] = []
        reply = chat.say(line, pieces.append)
        messages.append({"role": "user", "content": line})
        record = PromptRecord(tuple(messages))
        (expected,) = generate_answers([record], model, tmp_path / str(number), SHORT, progress=False).answers
        assert (reply.text, reply.finish) == (expected.answer, expected.finish)
        assert "".join(pieces) == reply.text != "", "a draw that is all blanks would not be kept"
        messages.append({"role": "assistant", "content": reply.text})
        assert chat.messages == messages[1:]
    first = chat.messages[1]["content"]
    chat.reset()
    assert chat.say("the cat sat").text == first


def test_what_may_become_a_stop_text_is_not_shown() -> None:
    tokenizer = make_tokenizer()
    text = "a cat\n\nUs all\n\nUser: more of it"
    lengths = len(tokenizer("User: say\n\nAssistant: ")["input_ids"])
    chat = Chat(TransformersBackend(saying(tokenizer, text, lengths, 96), tokenizer), GenerationSettings(64, None))
    pieces: list[str] = []
    reply = chat.say("say", pieces.append)
    assert reply.text == "".join(pieces) == "a cat\n\nUs all"
    assert len(pieces) > 3
    assert reply.finish == "stop"


def test_an_interrupted_answer_is_kept_as_far_as_it_came() -> None:
    chat = Chat(backend(), LONG)
    whole = Chat(backend(), LONG).say("the cat sat").text
    shown: list[str] = []

    def stop_soon(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    reply = chat.say("the cat sat", stop_soon)
    assert reply.finish == "interrupted"
    assert 0 < len(reply.text) < len(whole)
    assert whole.startswith(reply.text)
    assert chat.messages[-1] == {"role": "assistant", "content": reply.text}
    assert chat.say("and a dog").finish in ("stop", "length"), "the conversation goes on"


def test_the_oldest_turns_of_a_long_conversation_go() -> None:
    model = backend(positions=64)
    chat = Chat(model, SHORT, system="be kind")
    replies = [chat.say("the cat sat on a mat") for _ in range(8)]
    assert replies[0].dropped == 0
    assert replies[-1].dropped > 0
    assert len(chat.messages) < 2 * 8
    assert chat.messages[0]["role"] == "user"
    chat.reset()
    assert chat.say("the cat")[2:] == (0, 0)
    assert chat.say("the cat sat on a mat " * 30).cut == 64 - SHORT.max_new_tokens, "and that is said"


def test_lines_without_history_are_prompts_as_they_stand(tmp_path: Path) -> None:
    model = backend()
    chat = Chat(model, SHORT, history=False)
    for line in ("the cat sat", "a dog"):
        (expected,) = generate_answers([PromptRecord(line)], model, tmp_path / line, SHORT, progress=False).answers
        assert chat.say(line).text == expected.answer
    assert chat.messages == []
    with pytest.raises(ValueError, match="system: expected none where every line is a prompt of its own"):
        Chat(model, SHORT, "be kind", history=False)
