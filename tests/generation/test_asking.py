"""Messages alone: asked as a server asks, or behind what the model was trained behind, and that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord, RecordError
from clha_fast.data.prompts import Prompted, PromptRecord
from clha_fast.generation import GenerationSettings, TransformersBackend, encode_prompts, trained_lead
from clha_fast.generation.chat import Chat
from clha_fast.generation.prompts import EncodedPrompts, lead_of
from tests.support.chat_templates import CHATML, IM, MESSAGES, SHAPES, Shape, chat_tokenizer
from tests.support.scripted import saying

NO_THOUGHTS = "<think>\n\n</think>\n\n"
# The header of an answer holds a block of thoughts, empty where it has none; the generation prompt holds none, or the
# empty one where that is asked for (Qwen 3).
THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "{% if '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# The generation prompt begins the thoughts, and an answer is written without them (DeepSeek R1, QwQ).
REASON = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The system text is written into the last turn where that is the user's (Mistral).
LAST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ system if loop.last else '' }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# An answer has a channel of its own, which the model writes (gpt-oss).
CHANNEL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")

KINDS = {
    "think": Shape(THINK, "<|im_start|>assistant\n", "<|im_end|>", IM, "<|endoftext|>"),
    "reason": Shape(REASON, "<|im_start|>assistant\n<think>\n", "<|im_end|>", IM, "<|endoftext|>"),
    "last": Shape(LAST, " [/INST]", "</s>", ("<s>", "[INST]", "[/INST]"), "</s>", has_bos=True),
    "channel": Shape(CHANNEL, "<|start|>assistant", "<|return|>", CHANNELS, "<|endoftext|>"),
    "chatml": SHAPES["chatml"],
    "llama 3": SHAPES["llama 3"],
}
LEADS = {"think": NO_THOUGHTS, "channel": "<|channel|>final<|message|>"}
SYSTEM = ({"role": "system", "content": "Be kind."}, *MESSAGES)
PLAIN = RankedRecord(MESSAGES, ("Yes.", "no"))


def encode(tokenizer: Any, *records: Prompted, **settings: Any) -> EncodedPrompts:
    return encode_prompts(records, tokenizer, GenerationSettings(**settings))


def text_of(tokenizer: Any, encoded: EncodedPrompts, number: int = 0) -> str:
    found: str = tokenizer.decode(encoded.prompts[number].ids, clean_up_tokenization_spaces=False)
    return found


@pytest.mark.parametrize("messages", [MESSAGES, SYSTEM], ids=["", "system"])
@pytest.mark.parametrize("name", KINDS)
def test_messages_alone_are_asked_as_a_server_asks(name: str, messages: Any) -> None:
    shape, tokenizer = KINDS[name], chat_tokenizer(KINDS[name])
    served = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    assert served.endswith(shape.prompt) or messages is SYSTEM
    encoded = encode(tokenizer, PromptRecord(messages))
    assert text_of(tokenizer, encoded) == served
    end = tokenizer.convert_tokens_to_ids(shape.closing)
    assert set(encoded.prompts[0].ends) == {end, tokenizer.eos_token_id}
    assert encoded.prompts[0].stops == ()
    size = len(encoded.prompts[0].ids)
    backend = TransformersBackend(saying(tokenizer, f"Be kind.{shape.closing}user", size, 256), tokenizer)
    assert backend.answer(encoded.prompts, encoded.settings) == [("Be kind.", "stop")]
    cut = encode(tokenizer, PromptRecord(messages), max_prompt_length=5)
    front = int(shape.has_bos)
    ids = encoded.prompts[0].ids
    assert cut.prompts[0].ids == ids[:front] + ids[size - 5 + front :]
    assert cut.cut == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_record_with_responses_is_asked_as_training_has_it(name: str) -> None:
    """Or, where training refuses the template, as it would be without them."""
    tokenizer = chat_tokenizer(KINDS[name])
    encoded = encode(tokenizer, PLAIN)
    if name == "reason":
        with pytest.raises(RecordError, match=r"or prompt and responses as rendered texts, got"):
            RankedCollator(tokenizer).tokenize_record(PLAIN)
        assert encoded.prompts == encode(tokenizer, PromptRecord(MESSAGES)).prompts
    else:
        assert list(encoded.prompts[0].ids) == RankedCollator(tokenizer).tokenize_record(PLAIN)["prompt_ids"]


def test_a_system_text_that_is_in_the_last_turn_alone() -> None:
    """Training reads what a server is sent, though the template drops the text where a response follows."""
    tokenizer = chat_tokenizer(KINDS["last"])
    for messages in (SYSTEM, (SYSTEM[0], {"role": "user", "content": "Why?"})):
        served = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        assert served.endswith("[INST] Be kind.\n\nWhy? [/INST]")
        record = RankedRecord(messages, ("Yes.", "no"))
        feature = RankedCollator(tokenizer).tokenize_record(record)
        assert tokenizer.decode(feature["prompt_ids"]) == served
        assert [tokenizer.decode(ids) for ids in feature["completion_ids"]] == [" Yes.</s>", " no</s>"]
        assert encode(tokenizer, record).prompts[0].ids == encode(tokenizer, PromptRecord(messages)).prompts[0].ids
    # Another end of the prompt, or a text that is lost beside it, is another prompt.
    for changed in (
        LAST.replace(" [/INST]", " [/INST]{{ 'x' if loop.last else '' }}"),
        LAST.replace("+ '\n\n'", "+ 'z'"),
    ):
        tokenizer.chat_template = changed
        with pytest.raises(RecordError, match="a chat template whose rendering of prompt and response begins with"):
            RankedCollator(tokenizer).tokenize_record(RankedRecord(SYSTEM, ("Yes.", "no")))


@pytest.mark.parametrize("name", LEADS)
def test_the_lead_that_was_trained_behind(name: str) -> None:
    tokenizer, lead = chat_tokenizer(KINDS[name]), LEADS[name]
    trained = RankedCollator(tokenizer).tokenize_record(PLAIN)["prompt_ids"]
    assert lead_of([PLAIN], tokenizer) == lead
    served = encode(tokenizer, PromptRecord(MESSAGES))
    for record in (PromptRecord(MESSAGES), PLAIN):
        assert list(encode(tokenizer, record, lead=lead).prompts[0].ids) == trained
        assert encode(tokenizer, record, lead="").prompts[0].ids == served.prompts[0].ids
    continued = PromptRecord((*MESSAGES, {"role": "assistant", "content": "Because"}))
    assert encode(tokenizer, continued, lead=lead).prompts == encode(tokenizer, continued).prompts
    assert encode(tokenizer, continued).said == ""


def test_where_both_differ_it_is_said() -> None:
    tokenizer = chat_tokenizer(KINDS["think"])
    alone = PromptRecord(MESSAGES)
    said = encode(tokenizer, alone, alone).said
    assert said.startswith(f"2 of 2 prompts are asked as a server asks, without {NO_THOUGHTS!r}, which the chat templ")
    trained = f"1 of 1 prompts end with {NO_THOUGHTS!r}; a server's do not, unless its chat_template"
    assert encode(tokenizer, alone, lead=NO_THOUGHTS).said.startswith(trained)
    assert encode(tokenizer, PLAIN).said.startswith(trained)
    assert encode(tokenizer, alone, lead="").said == "", "a run that trained so"
    both = encode(tokenizer, alone, PromptRecord("Why?"), lead=NO_THOUGHTS).said
    assert both.endswith(f"1 of 2 prompts go through no chat template and are asked without {NO_THOUGHTS!r}")
    for name in ("reason", "last", "chatml", "llama 3"):
        assert encode(chat_tokenizer(KINDS[name]), alone, PLAIN).said == ""
    header = encode(chat_tokenizer(SHAPES["no generation prompt"]), alone)
    assert header.said.startswith("1 of 1 prompts end with '<|im_start|>assistant\\n'; a server's do not")


def test_variables_of_the_template() -> None:
    tokenizer = chat_tokenizer(KINDS["think"])
    off = {"enable_thinking": False}
    wanted = encode(tokenizer, PromptRecord(MESSAGES), lead=NO_THOUGHTS).prompts
    given = encode(tokenizer, PromptRecord(MESSAGES), chat_template_kwargs=off)
    assert given.prompts == wanted
    assert given.said == "", "what a server is told, too"
    row = PromptRecord(MESSAGES, template=off)
    for lead in (None, NO_THOUGHTS):  # never twice
        assert encode(tokenizer, row, lead=lead).prompts[0].ids == wanted[0].ids
    on = encode(tokenizer, row, chat_template_kwargs={"enable_thinking": True})
    assert on.prompts[0].ids == wanted[0].ids, "a row's own win"
    with pytest.raises(RecordError, match="chat_template_kwargs: expected messages as prompt"):
        encode(tokenizer, PromptRecord("Why?"), chat_template_kwargs=off)
    with pytest.raises(ValueError, match="chat_template_kwargs: expected variables of the chat template's own"):
        GenerationSettings(chat_template_kwargs={"add_generation_prompt": False})
    with pytest.raises(ValueError, match="lead: expected a text or None, got 1"):
        GenerationSettings(lead=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_a_conversation_with_a_system_message(name: str) -> None:
    shape, tokenizer = KINDS[name], chat_tokenizer(KINDS[name])
    messages = [SYSTEM[0], {"role": "user", "content": "Why?"}]
    served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    model = saying(tokenizer, f"Be kind.{shape.closing}", len(served), 512)
    chat = Chat(TransformersBackend(model, tokenizer), GenerationSettings(20, None), system="Be kind.")
    assert chat.say("Why?")[:2] == ("Be kind.", "stop")
    assert chat.say("Why?").finish in ("stop", "length"), "the history is rendered as the template does it"
    assert bool(chat.said) == (name in LEADS)


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_prefix_stands_behind_the_prompt(name: str) -> None:
    tokenizer = chat_tokenizer(KINDS[name])
    for messages in (MESSAGES, SYSTEM):
        plain, behind = (encode(tokenizer, PromptRecord(messages), answer_prefix=text) for text in ("", "Because"))
        size = len(plain.prompts[0].ids)
        assert behind.prompts[0].ids[:size] == plain.prompts[0].ids
        assert tokenizer.decode(behind.prompts[0].ids[size:]).strip() == "Because"
        assert behind.prompts[0].ends == plain.prompts[0].ends
        if name != "reason" and messages is MESSAGES:  # the very tokens of training
            size = len(encode(tokenizer, PLAIN).prompts[0].ids)
            trained = encode(tokenizer, PLAIN, answer_prefix="Because").prompts[0].ids[size:]
            assert behind.prompts[0].ids[-len(trained) :] == trained


@pytest.mark.parametrize("name", KINDS)
def test_prompts_rendered_beforehand_end_as_the_template_s_do(name: str) -> None:
    shape, tokenizer = KINDS[name], chat_tokenizer(KINDS[name])
    text = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    encoded = encode(tokenizer, PromptRecord(text))
    assert text_of(tokenizer, encoded) == text
    assert set(encoded.prompts[0].ends) == {tokenizer.convert_tokens_to_ids(shape.closing), tokenizer.eos_token_id}
    plain = encode(tokenizer, PromptRecord("Why?"))
    assert set(plain.prompts[0].ends) == {tokenizer.eos_token_id}, "a text of no template"
    tokenizer.chat_template = None
    assert set(encode(tokenizer, PromptRecord(text)).prompts[0].ends) == {tokenizer.eos_token_id}


def test_a_text_with_ends_of_turns_that_are_plain() -> None:
    tokenizer = chat_tokenizer(SHAPES["no end of turn"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    assert encode(tokenizer, PromptRecord(text)).prompts[0].stops == ("Human:", "Assistant:", "[/]")
    assert encode(tokenizer, PromptRecord("Why?")).prompts[0].stops == ("Human:", "Assistant:")


def test_refusals_of_the_template_and_of_limits_stay() -> None:
    tokenizer = chat_tokenizer(SHAPES["gemma"])
    for record in (PromptRecord(SYSTEM, "f:1"), RankedRecord(SYSTEM, ("a",), source="f:1")):
        with pytest.raises(RecordError, match=r"^f:1: prompt: .* refuses these messages: System role not supported"):
            encode(tokenizer, record)
    with pytest.raises(RecordError, match=r"^f:1: max_prompt_length: expected at least 2 tokens for this"):
        encode(tokenizer, PromptRecord(MESSAGES, "f:1"), max_prompt_length=1)


def test_the_lead_of_a_run() -> None:
    think, chatml = (chat_tokenizer(KINDS[name]) for name in ("think", "chatml"))
    thoughts = RankedRecord(MESSAGES, ("<think>\nHm.\n</think>\n\nYes.", "<think>\nSo.\n</think>\n\nno"))
    assert lead_of([PLAIN, PLAIN], think) == NO_THOUGHTS
    assert lead_of([thoughts], think) == lead_of([PLAIN], chatml) == ""
    assert lead_of([PLAIN, thoughts], think) is None, "some so, some so"
    text = RankedRecord("Why?", ("a", "b"))
    assert lead_of([text], think) is None
    assert lead_of([text, PLAIN], think) == NO_THOUGHTS
    refused = RankedRecord(({"role": "system", "content": "Be kind."},), ("a", "b"))
    assert lead_of([refused], chat_tokenizer(SHAPES["gemma"])) is None
    chatml.chat_template = None
    assert lead_of([PLAIN], chatml) is None
    asked = RankedRecord(MESSAGES, ("Yes.", "no"), template={"enable_thinking": False})
    assert lead_of([asked], think) == NO_THOUGHTS, "the row's own variables write it, and a prompt alone has none"
    assert lead_of([asked, PLAIN], think) == NO_THOUGHTS
    beginning = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So"})
    continued = RankedRecord(beginning, (" it is.", " no"))
    assert lead_of([continued, PLAIN], think) == NO_THOUGHTS
    assert lead_of([continued], think) is None
    assert lead_of([PLAIN] * 300 + [thoughts] * 300, think) is lead_of([thoughts] * 300 + [PLAIN] * 300, think) is None


def test_what_a_folder_says_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert trained_lead(tmp_path) is trained_lead("a/name") is None
    for note, lead in (({"lead": NO_THOUGHTS}, NO_THOUGHTS), ({"lead": ""}, ""), ({}, None), ({"lead": None}, None)):
        (tmp_path / "run.json").write_text(json.dumps({"settings": {}, "data": {}, **note}))
        assert trained_lead(tmp_path) == trained_lead(checkpoint) == lead
    for broken in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(broken)
        assert trained_lead(tmp_path) is None


def test_a_template_that_writes_no_response() -> None:
    """Nothing can be trained on it; it can be asked."""
    tokenizer = chat_tokenizer(KINDS["chatml"])
    tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}")
    encoded = encode(tokenizer, PromptRecord(MESSAGES))
    assert text_of(tokenizer, encoded).endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert encoded.prompts[0].ends == (tokenizer.eos_token_id,)
