"""Chains of a record's best and worst answer, and how a model that learnt from them is asked."""

from __future__ import annotations

import pytest

from clha_fast.data.chains import ask, record_chains
from clha_fast.data.records import RankedRecord, RecordError

MARKERS = ("Good:", "Bad:")


def test_both_alone_and_both_orders() -> None:
    chains = record_chains(RankedRecord("p", ("yes", "no"), (1.0, 2.0), 1), MARKERS)
    assert chains == [
        ("Good:", " yes"),
        ("Bad:", " no"),
        ("Good:", " yes", "\n\nBad:", " no"),
        ("Bad:", " no", "\n\nGood:", " yes"),
    ]


def test_a_marker_s_own_blank_is_for_the_beginning_of_a_turn() -> None:
    chains = record_chains(RankedRecord("TL;DR:", ("yes", "no")), (" Good:", " Bad:"))
    assert chains[0][0] == " Good:"
    assert chains[3] == (" Bad:", " no", "\n\nGood:", " yes")


def test_the_best_and_the_worst_of_more() -> None:
    assert record_chains(RankedRecord("p", ("a", "b", "c")), MARKERS) == record_chains(
        RankedRecord("p", ("a", "c")), MARKERS
    )


def test_one_answer_is_a_good_one() -> None:
    assert record_chains(RankedRecord("p", ("a",)), MARKERS) == [("Good:", " a")]


def test_an_answer_keeps_its_own_blank() -> None:
    assert record_chains(RankedRecord("p", (" yes", "\nno ")), MARKERS)[2] == ("Good:", " yes", "\n\nBad:", "\nno ")


def test_an_answer_of_blanks() -> None:
    with pytest.raises(
        RecordError, match=r"^f:3: completions\[1\]: expected an answer that is more than blanks, got ' \\n'"
    ):
        record_chains(RankedRecord("p", ("yes", " \n"), source="f:3"), MARKERS)


def test_asking() -> None:
    user = {"role": "user", "content": "Why?"}
    assert ask("Why? ", "Good:") == "Why? Good:"
    assert ask((user,), "Good:") == (user, {"role": "assistant", "content": "Good:"})
    begun = {"role": "assistant", "content": "Well. ", "name": "x"}
    assert ask((user, begun), "Good:") == (user, {**begun, "content": "Well. Good:"})
    assert begun["content"] == "Well. "
