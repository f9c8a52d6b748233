"""Pairs of whole texts without a prompt column: the prompt is what both begin with, to where a response may begin."""

from __future__ import annotations

import pytest

from clha_fast.data import RankedRecord, read_records

ASKED = "Why is the sky blue?"
# Everything that a chat template writes before a response, without a blank at the end.
HEADS = [
    f"<|im_start|>user<|im_sep|>{ASKED}<|im_end|><|im_start|>assistant<|im_sep|>",
    f"<s>[INST]{ASKED}[/INST]",
    f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{ASKED}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    f"<\uff5cUser\uff5c>{ASKED}<\uff5cAssistant\uff5c>",
    f"<reserved_106>{ASKED}<reserved_107>",
    f"<|User|>:{ASKED}\n<|Bot|>:",
    f"[|user|]{ASKED}\n[|assistant|]",
    f"USER: {ASKED} ASSISTANT:",
    "\u7528\u6237\uff1a\u5929\u7a7a\uff1f\u52a9\u624b\uff1a",
]
ENDS = ["", "<|im_end|>", "</s>", "\n"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("end", ENDS)
def test_the_head_of_the_answer_is_the_prompt_s(head: str, end: str) -> None:
    texts = (f"Air scatters light.{end}", f"No idea, sorry.{end}")
    (record,) = read_records([{"chosen": head + texts[0], "rejected": head + texts[1]}])
    assert record == RankedRecord(head, texts)


@pytest.mark.parametrize("blank", ["\n", "\n\n", "\t"])
@pytest.mark.parametrize("head", HEADS)
def test_a_blank_behind_the_head_is_the_prompt_s_too_but_for_a_space(head: str, blank: str) -> None:
    (record,) = read_records([{"chosen": f"{head}{blank}Air.", "rejected": f"{head}{blank}No."}])
    assert record == RankedRecord(head + blank, ("Air.", "No."))
    (record,) = read_records([{"chosen": f"{head} Air.", "rejected": f"{head} No."}])
    assert record == RankedRecord(head, (" Air.", " No."))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("It is 12:30.", "It is 12:45.", "It is"),
        ("See https://a.org", "See https://b.org", "See"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        # One is the beginning of the other, or both are equal: a mark at its end is its own.
        ("As they say [1] and Gore", "As they say [1]", "As they say"),
        ("A few tips are:\n- Ask", "A few tips are:", "A few tips"),
        ("Here: <p>x</p>", "Here: <p>x</p> I hope it helps!", "Here: <p>"),
        ("See the list [2]", "See the list [2]", "See the list"),
        ("\u7b54\u6848 \u662f\uff1a", "\u7b54\u6848 \u662f\uff1aB", "\u7b54\u6848"),
        ("x = a[0]b", "x = a[0]c", "x = a[0]"),  # a mark wherever it stands; the rest still holds all that differs
    ],
)
def test_plain_texts_are_cut_at_whole_words(chosen: str, rejected: str, prompt: str) -> None:
    (record,) = read_records([{"chosen": chosen, "rejected": rejected}])
    assert record == RankedRecord(prompt, (chosen[len(prompt) :], rejected[len(prompt) :]))
