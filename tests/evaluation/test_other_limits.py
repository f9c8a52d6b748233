"""Two evaluations whose models have read the texts with other limits of length: what is compared, what is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from clha_fast.data import RankedRecord
from clha_fast.evaluation.comparison import compare, comparison_table
from clha_fast.evaluation.report import TOTAL, Evaluation, evaluate
from tests.support.reward_models import TOKENIZER, spread
from tests.support.tiny import make_model

LIKELIHOOD = {"nll", "accuracy", "kept_accuracy", "tau", "prompt_tau"}
POSITIONS = 64  # of the lesser model; two of the records are longer with their responses


def records() -> list[RankedRecord]:
    """Prompts of 6 to 44 tokens or so, and responses of up to 40."""
    return [
        RankedRecord(f"say {k}: " + "the cat sat on a mat " * (2 * k), ("a dog ran over the old mat " * (k + 1), "a"))
        for k in range(4)
    ]


def measured(prompt: int | None = 384, positions: int = 512, which: slice = slice(None)) -> Evaluation:
    model = spread(make_model(len(TOKENIZER), max_position_embeddings=positions))
    found = evaluate(records()[which], model=model, tokenizer=TOKENIZER, max_prompt_length=prompt)
    return Evaluation.from_dict(json.loads(json.dumps(found.as_dict())))  # as a file has it


def named(notes: list[str]) -> list[str]:
    return [note for note in notes if "not compared" in note or "compared as" in note]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({"prompt": 384}, {"prompt": 8}, "max_prompt_length 384 and 8"),
        ({"prompt": 8}, {"prompt": None}, "max_prompt_length 8 and None"),
        ({"prompt": 12}, {"prompt": 8}, "max_prompt_length 12 and 8"),
        ({"positions": 512}, {"positions": POSITIONS}, f"max_length 512 and {POSITIONS}"),
        (
            {"prompt": 16, "positions": POSITIONS},
            {},
            f"max_prompt_length 16 and 384, max_length {POSITIONS} and 512",
        ),
    ],
)
def test_likelihood_of_texts_cut_otherwise_is_not_compared(a: dict[str, Any], b: dict[str, Any], said: str) -> None:
    ours, theirs = measured(**a), measured(**b)
    assert sum(ours.values["cut"]) + sum(theirs.values["cut"]) > 0
    for left, right in ((ours, theirs), (theirs, ours)):
        found = compare(left, right)
        assert not LIKELIHOOD & set(found.differences[TOTAL])
        assert "kept_share" in found.differences[TOTAL], "no model has a part in it"
        (note,) = (text for text in named(found.notes) if text.startswith("likelihood and ranking are not compared"))
        if left is ours:
            assert f": {said}, and " in note
        assert ("--max-prompt-length" in note) == ("max_prompt_length" in said)
        assert note in comparison_table(found)


def test_limits_are_kept() -> None:
    about = measured(8, POSITIONS).about
    assert (about["max_prompt_length"], about["max_length"]) == (8, POSITIONS)
    assert measured(None).about["max_prompt_length"] is None


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"prompt": 384}, {"prompt": 300}),  # nothing is cut
        ({"prompt": 384, "positions": 512}, {"prompt": None, "positions": 1024}),
        ({"prompt": 8}, {"prompt": 8}),  # the same limits
        ({"prompt": 384}, {"prompt": 8, "which": slice(2, None)}),
    ],
)
def test_what_the_limits_leave_alone_is_compared(a: dict[str, Any], b: dict[str, Any]) -> None:
    theirs = measured(**b)
    if "which" in b:  # what is cut is not in common
        first = measured(b["prompt"], which=slice(0, 1))
        assert first.values["cut"] == [0.0]
        theirs = dataclasses.replace(
            theirs,
            prompts=first.prompts + theirs.prompts,
            subsets=first.subsets + theirs.subsets,
            references=first.references + theirs.references,
            values={name: first.values[name] + column for name, column in theirs.values.items()},
        )
        a = {**a, "which": slice(0, 1)}
    found = compare(measured(**a), theirs)
    assert set(found.differences[TOTAL]) >= LIKELIHOOD
    assert not named(found.notes)


@pytest.mark.parametrize(("silent", "who"), [((0,), "A does"), ((1,), "B does"), ((0, 1), "A and B do")])
def test_files_of_before_say_nothing_of_limits(silent: tuple[int, ...], who: str) -> None:
    both = [measured(), measured(8)]
    for side in silent:
        for name in ("max_prompt_length", "max_length"):
            del both[side].about[name]
        del both[side].values["cut"]
    found = compare(*both)
    assert set(found.differences[TOTAL]) >= LIKELIHOOD
    said = f"likelihood and ranking are compared as they are: {who} not say at which lengths texts were cut"
    assert said in found.notes
    alone = Evaluation(both[0].prompts, both[0].subsets, both[0].references, {"words": [1.0] * 4})
    assert not named(compare(alone, alone).notes), "no model"


@pytest.mark.parametrize(
    ("lengths", "cut", "said"), [((384, 64), (0, 2), 1), ((384, 64), (0, 0), 0), ((64, 64), (2, 2), 0)]
)
def test_answers_to_prompts_of_other_lengths_are_named(
    lengths: tuple[int, int], cut: tuple[int, int], said: int
) -> None:
    sides = [
        Evaluation(
            ["p", "q"],
            ["", ""],
            ["x", "y"],
            {"words": [1.0, 2.0]},
            about={"generation": {"max_prompt_length": length}, "prompts_cut": count},
        )
        for length, count in zip(lengths, cut, strict=True)
    ]
    found = compare(*sides)
    assert "words" in found.differences[TOTAL]
    assert len(found.notes) == said
    assert all("max_prompt_length 384 and 64" in note for note in found.notes)
