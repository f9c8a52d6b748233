"""The first token of a response, with tokenizers that put a blank in front of texts, or behind special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord
from clha_fast.objectives import CoHOptions
from tests.support.chat_templates import MESSAGES, TEXTS

ANSWERS = ("Because it reflects the sea.", "Yes, I think.", " Air scatters blue light.", "\nHi", "4")
HEADERS = ("<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]")
TEMPLATES = {
    "newline": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "directly": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "inst": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}",
}
KINDS = ["first", "always", "prepend", "byte", "byte, prefix"]


def built(kind: str, template: str, rstrip: bool = False) -> PreTrainedTokenizerFast:
    special = [AddedToken(token, normalized=False, special=True, rstrip=rstrip) for token in HEADERS]
    start = ["<unk>", "<s>", "</s>"]
    if kind.startswith("byte"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        tokenizer.decoder = decoders.ByteLevel()
        more: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        start += [f"<0x{number:02X}>" for number in range(256)]
        more = {}
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=start, show_progress=False, **more)
    # As words alone: the vocabulary has each with its blank and without.
    words = [word for text in TEXTS for word in text.split()]
    tokenizer.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATES[template]
    return fast


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_apart_and_together_are_the_same(kind: str, template: str, rstrip: bool) -> None:
    """Those of the whole rendering, which is what the model has learnt and what it reads of earlier turns."""
    tokenizer = built(kind, template, rstrip)
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ANSWERS))
    prompt = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    texts = [answer if template != "inst" else f" {answer}" for answer in ANSWERS]
    end = "</s>" if template == "inst" else "<|end|>"
    rendered = RankedCollator(tokenizer).tokenize_record(RankedRecord(prompt, tuple(text + end for text in texts)))
    assert rendered["completion_ids"] == feature["completion_ids"]
    for answer, ids in zip(ANSWERS, feature["completion_ids"], strict=True):
        chat = [*MESSAGES, {"role": "assistant", "content": answer}]
        joint = tokenizer.apply_chat_template(chat)["input_ids"]
        apart = [*feature["prompt_ids"], *ids]
        if answer.startswith("\n") and template == "newline" and not rstrip:
            continue  # the prompt's newline and the response's: apart on purpose
        assert joint[: len(apart)] == apart, answer


def test_the_first_token_by_hand() -> None:
    """A blank of its own behind a special token where the tokenizer begins every segment with one, nowhere else."""
    for kind, template, rstrip, expected in (
        ("always", "newline", True, "\u2581"),
        ("prepend", "directly", False, "\u2581"),
        ("byte, prefix", "directly", False, "\u0120"),
        ("first", "directly", False, "B"),
        ("always", "newline", False, "B"),
        ("prepend", "newline", False, "B"),
        ("byte", "directly", False, "B"),
    ):
        tokenizer = built(kind, template, rstrip)
        for prompt in (MESSAGES, tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)):
            (ids,) = RankedCollator(tokenizer).tokenize_record(RankedRecord(prompt, ANSWERS[:1]))["completion_ids"]
            first = tokenizer.convert_ids_to_tokens(ids[:1])[0]
            assert first[0] == expected, (kind, template, rstrip)


def test_a_byte_that_ends_a_text_is_no_such_token() -> None:
    tokenizer = built("always", "newline")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Q:", add_special_tokens=False)["input_ids"])[-1] == "<0x3A>"
    (ids,) = RankedCollator(tokenizer).tokenize_record(RankedRecord("Q:", ANSWERS[:1]))["completion_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[:1])[0][0] == "B"


@pytest.mark.parametrize(("kind", "expected"), [("always", "\u2581"), ("first", "")])
def test_chains_and_beginnings_of_answers_begin_so_too(kind: str, expected: str) -> None:
    tokenizer = built(kind, "newline", rstrip=True)
    chains = RankedCollator(tokenizer, CoHOptions(good_marker="Yes,", bad_marker="Hi"))
    feature = chains.tokenize_record(RankedRecord(MESSAGES, ANSWERS[:2]))
    starts = [tokenizer.convert_ids_to_tokens(ids[:1])[0][:1] == "\u2581" for ids in feature["completion_ids"]]
    assert starts == [bool(expected)] * 4
    record = RankedRecord(MESSAGES, ANSWERS[:2])
    begun = RankedCollator(tokenizer).tokenize_beginning(record, "Because")
    whole = RankedCollator(tokenizer).tokenize_record(record)["completion_ids"][0]
    assert "".join(tokenizer.convert_ids_to_tokens(begun)) == f"{expected}Because"
    assert whole[: len(begun)] == begun
