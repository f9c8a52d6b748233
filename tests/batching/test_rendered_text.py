"""Texts that a chat template rendered beforehand keep one BOS and one end of turn, whoever wrote them."""

from __future__ import annotations

import pytest

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord, RecordError, record_from_row, render_prompt
from tests.batching.test_collator import CHATML, build

PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("start", ["", "<s>"])
@pytest.mark.parametrize("end", ["", "</s>", "<|im_end|>", "<|im_end|>\n", "</s> \n", "<|im_end|>\n\n"])
def test_one_start_and_one_end(start: str, end: str) -> None:
    tokenizer = build()
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(start + PROMPT, ("Yes." + end, "No." + end)))
    assert tokenizer.decode(feature["prompt_ids"]) == "<s>" + PROMPT
    closed = end.strip() or "</s>"
    assert [tokenizer.decode(ids) for ids in feature["completion_ids"]] == ["Yes." + closed, "No." + closed]


def test_without_a_bos_of_the_tokenizer_s_the_text_s_own_stays() -> None:
    tokenizer = build(template=None)
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord("<s>" + PROMPT, ("Yes.",)))
    assert tokenizer.decode(feature["prompt_ids"]) == "<s>" + PROMPT


@pytest.mark.parametrize("text", ["a <|im_end|> b", "a\n", "a <s>", "a<s>\n"])
def test_other_texts_are_closed_as_ever(text: str) -> None:
    tokenizer = build()
    (ids,) = RankedCollator(tokenizer).tokenize_record(RankedRecord("p", (text,)))["completion_ids"]
    assert tokenizer.decode(ids) == text + "</s>"


def test_without_a_template_what_is_no_content_is_refused() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    record = record_from_row({"prompt": [{"role": "user", "content": "q"}, call], "completions": ["a", "b"]})
    assert record.prompt[1] == {**call, "content": ""}
    with pytest.raises(RecordError, match=r"^record: prompt\[1\].tool_calls: expected a tokenizer with a chat"):
        render_prompt(record.prompt, build(), record.source)


# EOS and the other special token of `build` in all the ways that templates end a rendering of a whole dialogue.
@pytest.mark.parametrize("template", [None, CHATML, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("behind", ["\n</s>", " </s>", "\n</s>\n", "\n\n</s></s>", "\n<|im_end|>"])
def test_what_follows_the_end_of_turn_is_left_out(template: str | None, behind: str) -> None:
    tokenizer = build(chat=template)
    texts = ("Yes.<|im_end|>" + behind, "No.<|im_end|>" + behind, "So\n<|im_end|>" + behind)
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(PROMPT, texts))
    scored = [tokenizer.decode(ids) for ids in feature["completion_ids"]]
    assert scored == ["Yes.<|im_end|>", "No.<|im_end|>", "So\n<|im_end|>"]


@pytest.mark.parametrize("end", ["<|im_end|></s>", "<|im_end|></s>\n"])
def test_only_the_template_tells_which_of_two_without_a_blank_ends_the_turn(end: str) -> None:
    """It may be a tool call inside the turn that the first one closes."""
    for template, closed in ((CHATML, "<|im_end|>"), (None, "<|im_end|></s>")):
        tokenizer = build(chat=template)
        (ids,) = RankedCollator(tokenizer).tokenize_record(RankedRecord(PROMPT, (f"Yes.{end}",)))["completion_ids"]
        assert tokenizer.decode(ids) == f"Yes.{closed}"


def test_a_template_that_wants_another_conversation_tells_no_end_of_turn() -> None:
    refuses = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    tokenizer = build(chat=refuses)
    (ids,) = RankedCollator(tokenizer).tokenize_record(RankedRecord(PROMPT, ("Yes.</s>\n",)))["completion_ids"]
    assert tokenizer.decode(ids) == "Yes.</s>"
