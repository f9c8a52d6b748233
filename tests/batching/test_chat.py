"""Messages through chat templates of the usual shapes: what is prompt, what is scored, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from clha_fast.batching.chat import render_chat
from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord, RecordError
from clha_fast.training.trainer import CLHATrainer
from tests.support.chat_templates import CHATML, IM, MESSAGES, SHAPES, TEXTS, Shape, blank_tokenizer, chat_tokenizer
from tests.support.tiny import make_model
from tests.support.trainers import config

ANSWERS = ("Because it reflects the sea.", "Air scatters short wavelengths\nof sunlight")


def decode(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def shaped(template: str, special: tuple[str, ...] = IM, eos: str = "</s>") -> RankedCollator:
    return RankedCollator(chat_tokenizer(Shape(template, "", "", special, eos)))


@pytest.mark.parametrize("name", SHAPES)
def test_prompt_and_scored_tokens(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = chat_tokenizer(shape)
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ANSWERS))
    assert decode(tokenizer, feature["prompt_ids"]) == shape.prompt
    if shape.has_bos:
        assert feature["prompt_ids"].count(tokenizer.bos_token_id) == 1
    generation = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True)["input_ids"]
    assert feature["prompt_ids"][: len(generation)] == generation, "not what generation begins with"
    for ids, answer in zip(feature["completion_ids"], ANSWERS, strict=True):
        assert decode(tokenizer, ids) == shape.before + answer + shape.closing
        ends = {tokenizer.convert_tokens_to_ids(token) for token in (*shape.special, shape.eos)}
        assert sum(token in ends for token in ids) == 1, "closed twice"
        # The end of turn is a token of its own, the very one that the template's whole rendering holds.
        assert decode(tokenizer, [next(token for token in ids if token in ends)]) == shape.closing.strip()


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral"])
def test_truncation_leaves_the_end_of_turn_out(name: str) -> None:
    tokenizer = chat_tokenizer(SHAPES[name])
    whole = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ANSWERS))["completion_ids"]
    for limit in (1, len(whole[0]) - 1, len(whole[0]), len(whole[1])):
        cut = RankedCollator(tokenizer, max_completion_length=limit).tokenize_record(RankedRecord(MESSAGES, ANSWERS))
        assert cut["completion_ids"] == [ids[:limit] for ids in whole]


def test_lengths_cut_the_prompt_on_the_left_and_alike_for_all() -> None:
    tokenizer = chat_tokenizer(SHAPES["llama 3"])
    record = RankedRecord(MESSAGES, ANSWERS)
    whole = RankedCollator(tokenizer).tokenize_record(record)
    prompt, completions = whole["prompt_ids"], whole["completion_ids"]
    cut = RankedCollator(tokenizer, max_prompt_length=9).tokenize_record(record)
    assert cut == {**whole, "prompt_ids": [prompt[0], *prompt[-8:]]}
    longest = max(map(len, completions))
    cut = RankedCollator(tokenizer, max_length=longest + 9).tokenize_record(record)
    assert cut == {**whole, "prompt_ids": [prompt[0], *prompt[-8:]]}
    cut = RankedCollator(tokenizer, max_length=longest).tokenize_record(record)
    room = longest - 2  # BOS and a token of its own are the least that a prompt keeps
    assert cut == {
        **whole,
        "prompt_ids": [prompt[0], prompt[-1]],
        "completion_ids": [ids[:room] for ids in completions],
    }
    ends = [ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>") for ids in cut["completion_ids"]]
    assert ends == [len(ids) <= room for ids in completions]
    assert False in ends


def test_a_system_message_and_a_longer_dialogue() -> None:
    messages = ({"role": "system", "content": "Be kind."}, *MESSAGES)
    collator = RankedCollator(chat_tokenizer(SHAPES["default system prompt"]))
    feature = collator.tokenize_record(RankedRecord(messages, ANSWERS))
    assert decode(collator.tokenizer, feature["prompt_ids"]) == SHAPES["default system prompt"].prompt


@pytest.mark.parametrize("name", ["chatml", "llama 3", "mistral", "generation marks", "empty thoughts"])
def test_a_final_assistant_message_is_continued(name: str) -> None:
    tokenizer = chat_tokenizer(SHAPES[name])
    messages = (*MESSAGES, {"role": "assistant", "content": "Because"})
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(messages, (" it is.", " I think.")))
    assert decode(tokenizer, feature["prompt_ids"]) == SHAPES[name].prompt + SHAPES[name].before + "Because"
    texts = [decode(tokenizer, ids) for ids in feature["completion_ids"]]
    assert texts == [f"{text}{SHAPES[name].closing}" for text in (" it is.", " I think.")]


def test_a_template_that_trims() -> None:
    collator = RankedCollator(chat_tokenizer(SHAPES["llama 3"]))
    feature = collator.tokenize_record(RankedRecord(MESSAGES, ("  Yes \n", "Yes")))
    assert feature["completion_ids"][0] == feature["completion_ids"][1]
    kept = RankedCollator(chat_tokenizer(SHAPES["chatml"]))
    ids = kept.tokenize_record(RankedRecord(MESSAGES, ("  Yes \n",)))["completion_ids"][0]
    assert decode(kept.tokenizer, ids) == "  Yes \n<|im_end|>"
    with pytest.raises(RecordError, match=r"^f:2: completions\[1\]: expected a response with at least one token"):
        collator.tokenize_record(RankedRecord(MESSAGES, ("Yes", "  \n"), source="f:2"))


@pytest.mark.parametrize("name", ["chatml", "mistral", "newline inside the turn", "zephyr"])
def test_an_end_of_turn_in_the_text_is_not_doubled(name: str) -> None:
    shape = SHAPES[name]
    texts = ("Yes", f"Yes{shape.closing}", f"Yes{shape.closing}\n")
    ids = RankedCollator(chat_tokenizer(shape)).tokenize_record(RankedRecord(MESSAGES, texts))["completion_ids"]
    assert ids[0] == ids[1] == ids[2]


def test_thoughts_of_their_own_are_scored() -> None:
    collator = RankedCollator(chat_tokenizer(SHAPES["empty thoughts"]))
    answers = ("<think>\nHm.\n</think>\n\nBlue.", "Blue.")
    feature = collator.tokenize_record(RankedRecord(MESSAGES, answers))
    # The block differs, so it cannot be the prompt's: every candidate sees the same one.
    assert decode(collator.tokenizer, feature["prompt_ids"]) == SHAPES["chatml"].prompt
    texts = [decode(collator.tokenizer, ids) for ids in feature["completion_ids"]]
    assert texts == [f"{answers[0]}<|im_end|>", "<think>\n\n</think>\n\nBlue.<|im_end|>"]


def test_the_stand_in_is_told_from_the_messages() -> None:
    messages = ({"role": "user", "content": "response response0"},)
    texts = render_chat(messages, ("response", "a"), chat_tokenizer(SHAPES["chatml"]), "f:1")
    assert texts.prompt == "<|im_start|>user\nresponse response0<|im_end|>\n<|im_start|>assistant\n"
    assert texts.responses == ("response<|im_end|>", "a<|im_end|>")


def test_conversations_through_the_trainer(tmp_path: Path) -> None:
    """Rows of messages in a table, whose keys it fills up with None, and TRL's pairs of whole conversations."""
    tokenizer = chat_tokenizer(SHAPES["gemma"])
    tokenizer.pad_token = tokenizer.eos_token
    asked = [{"role": "user", "content": "Why?", "name": "me"}]
    said = [{"role": "assistant", "content": text} for text in ANSWERS]
    rows: dict[str, list[dict[str, Any]]] = {
        "messages": [{"prompt": asked, "completions": [[said[0]], [said[1]]]}],
        "texts": [{"prompt": asked, "completions": list(ANSWERS)}],
        "pairs": [{"chosen": [*asked, said[0]], "rejected": [*asked, said[1]]}],
        "prompt and pairs": [{"prompt": asked, "chosen": said[:1], "rejected": said[1:]}],
    }
    losses = set()
    for given in rows.values():
        trainer = CLHATrainer(
            make_model(len(tokenizer)),
            config(tmp_path, max_steps=1, logging_steps=1),
            train_dataset=datasets.Dataset.from_list(given),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        scored = [decode(tokenizer, ids) for ids in batch["targets"].split(batch["candidate_lengths"].tolist())]
        assert scored == [f"{text}<end_of_turn>" for text in ANSWERS]
        first = batch["input_ids"][0, : int(batch["row_index"][0]) + 1]
        assert decode(tokenizer, first) == "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
        trainer.train()
        losses.add(trainer.state.log_history[0]["loss"])
    assert len(losses) == 1


THOUGHTS_IN_PROMPT = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
LENGTH_IN_HEADER = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
DROPS_THOUGHTS = CHATML.replace("m['content'] }", "m['content'].split('</think>')[-1] }")
SHOUTS = CHATML.replace("m['content'] }", "m['content'] | upper }")
ENDS_BY_CONTENT = CHATML.replace(
    "<|im_end|>\n{% endfor", "{{ '' if 'sea' in m['content'] else '<|im_end|>' }}\n{% endfor"
)


@pytest.mark.parametrize(
    ("template", "answers", "message"),
    [
        (THOUGHTS_IN_PROMPT, ANSWERS, r"prompt: expected a chat template whose rendering .* begins with that of the"),
        (LENGTH_IN_HEADER, ANSWERS, r"prompt: expected a chat template whose rendering .* \(which ends with '3Hi3Yes"),
        (
            DROPS_THOUGHTS,
            ("a", "Hm.</think>a"),
            r"completions\[1\]: expected a chat template that keeps the whole text",
        ),
        (SHOUTS, ANSWERS, r"prompt: expected a chat template that writes the response's text, got"),
        (ENDS_BY_CONTENT, ANSWERS, r"completions\[0\]: expected a chat template that ends this response as any other"),
    ],
)
def test_a_broken_boundary_names_the_record(template: str, answers: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecordError, match=f"^f:7: {message}") as caught:
        shaped(template).tokenize_record(RankedRecord(MESSAGES, answers, source="f:7"))
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_messages() -> None:
    collator = RankedCollator(chat_tokenizer(SHAPES["gemma"]))
    record = RankedRecord(({"role": "system", "content": "Be kind."}, *MESSAGES), ANSWERS, source="f:7")
    with pytest.raises(RecordError, match=r"^f:7: prompt: .*refuses these messages: System role not supported"):
        collator.tokenize_record(record)


def test_no_blank_is_put_in_front_of_a_response() -> None:
    """Tokenizers that put a blank in front of every text would make one up between prompt and response."""
    tokenizer = blank_tokenizer()
    assert decode(tokenizer, tokenizer("sky", add_special_tokens=False)["input_ids"]) == " sky"
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord("Why? Be", ("cause", " kind", "\nHi", "0 a.")))
    texts = [decode(tokenizer, ids) for ids in feature["completion_ids"]]
    assert texts == ["cause</s>", " kind</s>", "\nHi</s>", "0 a.</s>"]
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ANSWERS))
    assert [decode(tokenizer, ids) for ids in feature["completion_ids"]] == [f" {text}</s>" for text in ANSWERS]
    joint = decode(tokenizer, tokenizer("Why? Because", add_special_tokens=False)["input_ids"])
    apart = RankedCollator(tokenizer).tokenize_record(RankedRecord("Why? Be", ("cause",)))
    assert decode(tokenizer, [*apart["prompt_ids"], *apart["completion_ids"][0]]) == joint + "</s>"


@pytest.mark.parametrize("name", ["chatml", "llama 3", "zephyr", "gemma"])
def test_apart_and_together_are_the_same_where_no_merge_crosses(name: str) -> None:
    tokenizer = chat_tokenizer(SHAPES[name])
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, TEXTS[1:2]))
    chat = [*MESSAGES, {"role": "assistant", "content": TEXTS[1]}]
    joint = tokenizer.apply_chat_template(chat)["input_ids"]
    apart = [*feature["prompt_ids"], *feature["completion_ids"][0]]
    assert joint[: len(apart)] == apart


def test_a_response_never_changes_the_prompt_s_tokens() -> None:
    """Tokenised together, the newline that ends the prompt would merge with the one that begins the response."""
    tokenizer = chat_tokenizer(SHAPES["chatml"])
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ("\n\nYes", "Yes")))
    alone = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True)["input_ids"]
    assert feature["prompt_ids"] == alone
    assert decode(tokenizer, feature["completion_ids"][0]) == "\n\nYes<|im_end|>"


def test_special_tokens_that_come_later_are_known() -> None:
    """What a tokenizer's special tokens are is looked up once, and again when it has others."""
    tokenizer = chat_tokenizer(SHAPES["chatml"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "[end]")

    def closed() -> bool:
        return render_chat(MESSAGES, ["Yes."], tokenizer, "record").closed

    assert not closed()
    tokenizer.add_tokens(["[end]"], special_tokens=True)
    assert closed()
    other = chat_tokenizer(SHAPES["chatml"])
    other.chat_template = tokenizer.chat_template
    assert not render_chat(MESSAGES, ["Yes."], other, "record").closed
    other.add_tokens(["[end]"])
    assert not render_chat(MESSAGES, ["Yes."], other, "record").closed
    other.eos_token = "[end]"
    assert render_chat(MESSAGES, ["Yes."], other, "record").closed
