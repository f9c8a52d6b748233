"""Answers measured and compared: what is a mean over what, what is left out and said, what can be paired."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clha_fast.data import RankedRecord
from clha_fast.evaluation.comparison import compare, comparison_table
from clha_fast.evaluation.report import (
    FIGURES,
    LIMITS,
    NO_SUBSET,
    TOTAL,
    Evaluation,
    Figure,
    evaluate,
    evaluation_table,
    figures_of,
    pair_answers,
    shown,
)
from clha_fast.evaluation.rewards import answer_rewards, check_reward_model, sigmoid
from clha_fast.evaluation.tables import fixed
from clha_fast.generation import Answer
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from tests.support.reward_models import SIZES, TOKENIZER, alone, by_length, plain_ids, spread
from tests.support.tiny import make_model

LONGER = RewardModel(by_length(), TOKENIZER)
LENGTH = {"length": lambda: LONGER}


def references(count: int = 8) -> list[RankedRecord]:
    """The better response is the longer one."""
    return [RankedRecord(f"say {k}:", ("the cat sat on a mat " * 2, "a dog")) for k in range(count)]


def answers(texts: list[str], subsets: list[str] | None = None, finish: str = "stop") -> list[Answer]:
    return [
        Answer(f"say {k}:", text, finish, subset)
        for k, (text, subset) in enumerate(zip(texts, subsets or [""] * len(texts), strict=True))
    ]


def raw(text: str, prompt: str = "say 0:") -> float:
    return alone(LONGER.model, plain_ids(prompt, text))  # as the references: no blank between prompt and answer


@pytest.mark.parametrize("edge", [" ", "\n", "\t\r\n", "\u00a0\u3000"])
def test_outer_blanks_are_no_part_of_an_answer(edge: str) -> None:
    texts = ["a cat", "", "the old dog fell over a mat"]
    plain = evaluate(references(3), answers(texts), reward_models=LENGTH)
    found = evaluate(references(3), answers([f"{edge}{text}{edge}" for text in texts]), reward_models=LENGTH)
    assert found.values == plain.values
    assert plain.values["empty"] == [0, 1, 0]
    assert plain.values["raw reward: length"][1] is None


def test_rewards_are_100_sigmoid_and_an_empty_answer_has_0() -> None:
    texts = ["a cat", "", "the old dog fell over a mat", "x"]
    rewards, scores = answer_rewards(references(4), texts, LONGER)
    wanted = [raw(text) for text in texts]
    assert len({round(value, 3) for value in wanted}) > 2
    assert scores[1] is None
    assert [scores[k] for k in (0, 2, 3)] == pytest.approx([wanted[k] for k in (0, 2, 3)], abs=1e-5)
    assert rewards == pytest.approx([100 * sigmoid(wanted[0]), 0, 100 * sigmoid(wanted[2]), 100 * sigmoid(wanted[3])])
    assert answer_rewards(references(1), [""], LONGER) == ([0.0], [None])
    assert (sigmoid(0), sigmoid(-1000), sigmoid(1000)) == (0.5, 0.0, 1.0)
    assert sigmoid(-2) == pytest.approx(1 / (1 + math.exp(2)))


def test_total_is_over_prompts_not_over_subsets() -> None:
    texts = ["a cat", *["the old dog fell over a mat and then it sat"] * 3]
    found = evaluate(references(), answers(texts, ["a", "b", "b", "b"]), reward_models=LENGTH)
    figures = found.figures()
    assert list(figures) == ["a", "b", TOTAL]
    short, long = (100 * sigmoid(raw(text)) for text in texts[:2])
    name = "reward: length"
    assert [figures[part][name].value for part in figures] == pytest.approx([short, long, (short + 3 * long) / 4])
    assert [figures[part]["words"].value for part in figures] == pytest.approx([2, 11, 35 / 4])
    assert figures["a"][name].note == "one prompt: no interval"
    total = figures[TOTAL][name]
    assert total.low < total.value < total.high
    assert found.notes == ["4 references have no answer and are left out"]
    table = evaluation_table(found, figures)
    assert "one prompt" not in table
    assert "length prefers the better answer in 1.000 [1.000, 1.000] of the held-out pairs of 8 prompts" in table
    assert "4 references have no answer" in table


@pytest.mark.parametrize("name", [TOTAL, NO_SUBSET])
def test_a_subset_called_like_a_column_keeps_its_own(name: str) -> None:
    """In one set's table and in two's; beside a subset that is called as it would be then, and one without a name."""
    subsets = [name, f"{name} (subset)", ""]
    found = evaluate(references(), answers(["a cat", "a cat sat on", "x"], subsets))
    figures = found.figures()
    assert list(figures) == [f"{name} (subset) (subset)", f"{name} (subset)", "", TOTAL]
    assert [here["words"].value for here in figures.values()] == [2, 4, 1, pytest.approx(7 / 3)]
    header = re.split(r"\s{2,}", evaluation_table(found, figures).splitlines()[0].strip())
    assert header == [f"{name} (subset) (subset)", f"{name} (subset)", NO_SUBSET, TOTAL]
    assert list(compare(found, found).differences) == list(figures)
    again = Evaluation.from_dict(json.loads(json.dumps(found.as_dict(figures))))
    assert again.parts() == found.parts()


def test_a_reward_model_that_knows_nothing_has_no_column() -> None:
    """Of three models one prefers the better answer, one the worse, one is a coin."""
    records = [
        RankedRecord(f"say {k}:", texts)
        for k, texts in enumerate([("a dog", "the cat sat on a mat"), ("the cat sat on a mat", "a dog")] * 6)
    ]
    check = check_reward_model("coin", records, LONGER)
    assert check.accuracy.value == 0.5
    assert check.refused.startswith("no rewards of coin are reported: its accuracy on held-out pairs is 0.500")
    worse = check_reward_model("worse", references(), RewardModel(by_length(slope=-1), TOKENIZER))
    assert (worse.accuracy.value, worse.refused != "") == (0.0, True)
    constant = check_reward_model("flat", references(), RewardModel(by_length(slope=0), TOKENIZER))
    assert constant.accuracy.value == 0.5, "ties count half"
    single = check_reward_model("x", [RankedRecord("a", ("b",))], LONGER)
    assert single.refused.endswith("there is no ranked pair to measure it on; give other records to check it with")
    assert "no interval (one prompt" in check_reward_model("x", references(1), LONGER).refused
    tied = [RankedRecord("a", ("b", "c"), (1.0, 1.0))]
    assert "no ranked pair" in check_reward_model("x", tied, LONGER).refused

    given = answers(["a cat"] * 12)
    found = evaluate(records, given, reward_models=LENGTH)
    assert not [name for name in found.values if "reward" in name]
    assert found.notes == [check.refused.replace("coin", "length")]
    assert found.checks["length"]["accuracy"]["value"] == 0.5
    trusted = evaluate(records, given, reward_models=LENGTH, reward_check=references())
    assert "reward: length" in trusted.values


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without weights for score\.weight; its scores would be random"):
        evaluate(references(), answers(["a"]), reward_models={"lm": lambda: load_reward_model(str(tmp_path))})


def test_empty_and_unfinished_answers_are_counted() -> None:
    given = [*answers(["a cat sat", "", "a"]), Answer("say 3:", "", "length"), Answer("say 4:", "a b", "")]
    found = evaluate(references(), given, reward_models=LENGTH).figures()[TOTAL]
    assert (found["empty"].value, found["unfinished"].value) == (40.0, 25.0)
    assert found["unfinished"].prompts == 4, "of one it is not known"
    assert found["distinct_2"].prompts == 2
    assert (found["bleu"].prompts, found["reward: length"].prompts, found["raw reward: length"].prompts) == (5, 5, 3)


def test_twice_the_same_and_back_from_json(tmp_path: Path) -> None:
    model = spread(make_model(len(TOKENIZER)))
    records = references()
    texts = ["a cat", "", "the mat", "naïve 猫", "x", "y", "a dog", "the old hills"]
    runs = [
        evaluate(records, answers(texts), reward_models=LENGTH, model=model, tokenizer=TOKENIZER).as_dict()
        for _ in range(2)
    ]
    first, second = (json.dumps(run, allow_nan=False) for run in runs)
    assert first == second
    assert Evaluation.from_dict(json.loads(first)).as_dict() == json.loads(first)
    for broken in ({"values": {}}, {**json.loads(first), "subsets": []}):
        with pytest.raises(ValueError, match="metrics: expected"):
            Evaluation.from_dict(broken)


def test_a_model_alone() -> None:
    model = spread(make_model(len(TOKENIZER)))
    found = evaluate(references(), model=model, tokenizer=TOKENIZER).figures()[TOTAL]
    assert list(found) == ["nll", "accuracy", "kept_accuracy", "kept_share", "tau", "prompt_tau"]
    with pytest.raises(ValueError, match="answers: expected some to measure"):
        evaluate(references(), model=model, tokenizer=TOKENIZER, reward_models=LENGTH)
    with pytest.raises(ValueError, match="answers: expected some to measure"):
        evaluate(references())


def test_answers_find_their_references() -> None:
    twice = [RankedRecord("a", ("first", "x")), RankedRecord("b", ("y", "x")), RankedRecord(" a\n", ("second", "x"))]
    given = [Answer("a", "1"), Answer("c", "2"), Answer("a", "3"), Answer("a", "4")]
    found = pair_answers(given, twice)
    assert [(r.completions[0], a.answer) for r, a in zip(found.records, found.answers, strict=True)] == [
        ("first", "1"),
        ("second", "3"),
    ]
    assert (found.without_reference, found.without_answer) == (2, 1)
    with pytest.raises(ValueError, match=r"references: expected records for the prompts .* got 1 for other prompts"):
        pair_answers([Answer("c", "2")], twice[:1])


# ---- comparison ----


def test_labels_of_one_reward_model_are_two_judges() -> None:
    model = by_length()
    score = nn.Linear(model.score.in_features, 2, bias=False)
    score.weight.data = torch.cat([model.score.weight.data, 10 * model.score.weight.data])
    model.score, model.config.num_labels, model.num_labels = score, 2, 2

    def rewarded(name: str, label: int) -> Evaluation:
        judge = RewardModel(model, TOKENIZER, label)
        return evaluate(references(), answers(["a cat", "x", "the mat"]), reward_models={name: lambda: judge})

    ours = rewarded("length", 0)
    assert compare(ours, rewarded("other name", 0)).wins[TOTAL].keys() == {"other name"}
    other = compare(ours, rewarded("length", 1))
    assert other.wins[TOTAL] == {}
    assert "two reward models of one name are not compared: length" in other.notes


def test_wins_and_paired_differences_by_hand() -> None:
    ours = evaluate(references(), answers(["a cat sat", "x", "", "", "a b"], list("sssst")), reward_models=LENGTH)
    theirs = evaluate(
        references(), answers(["x", "x", "x", "", "a b c", "only b"], list("sssstt")), reward_models=LENGTH
    )
    found = compare(ours, theirs)
    assert (found.prompts, found.only_a, found.only_b) == (5, 0, 1)
    wins = found.wins[TOTAL]["length"]
    assert (wins.wins, wins.ties, wins.losses) == (1, 2, 2), "an empty answer loses to any other, and ties with one"
    assert wins.rate.value == pytest.approx(2 / 5)
    assert [found.wins[part]["length"].rate.value for part in ("s", "t")] == [pytest.approx(2 / 4), 0]
    words = found.differences[TOTAL]["words"]
    assert (words.a.value, words.b.value) == pytest.approx((6 / 5, 6 / 5))
    assert words.difference.value == pytest.approx(0)
    assert words.difference.low < 0 < words.difference.high
    rewards = [100 * sigmoid(raw(text)) for text in ("a cat sat", "a b", "a b c", "x")]
    difference = (rewards[0] - rewards[3] + 0 - rewards[3] + 0 + rewards[1] - rewards[2]) / 5
    assert found.differences[TOTAL]["reward: length"].difference.value == pytest.approx(difference)
    assert found.differences[TOTAL]["raw reward: length"].difference.prompts == 3, "both have answered"
    text = comparison_table(found)
    assert "5 prompts in common; 0 records stand in A alone, 1 in B alone" in text
    assert "win rate of A by length: 0.400" in text
    assert json.dumps(found.as_dict(), allow_nan=False)


def test_against_itself_nothing_differs() -> None:
    model = spread(make_model(len(TOKENIZER)))
    ours = evaluate(references(), answers(["a cat", "", "x"]), reward_models=LENGTH, model=model, tokenizer=TOKENIZER)
    found = compare(ours, Evaluation.from_dict(json.loads(json.dumps(ours.as_dict()))))
    for name, row in found.differences[TOTAL].items():
        assert row.a == row.b
        assert row.difference.value == 0, name
    assert found.wins[TOTAL]["length"].rate.value == 0.5
    assert found.notes == ours.notes == ["5 references have no answer and are left out"], "once"


def test_what_rounds_to_zero_has_no_sign() -> None:
    """BLEU is 0.001, 0.002 and 0.003 less on three prompts, and is shown with two digits."""
    a, b = (
        Evaluation(["p", "q", "r"], ["", "", ""], ["x", "y", "z"], {"bleu": [10.0 - step * k for k in range(1, 4)]})
        for step in (0.001, 0.0)
    )
    less, more = (comparison_table(found) for found in (compare(a, b), compare(b, a)))
    for text in (less, more):
        (line,) = (line for line in text.splitlines() if line.startswith("BLEU"))
        assert line.split()[-4:] == ["0.00", "[0.00,", "0.00]", "3"]
    values = (-0.004, -0.006, 0.004, 0.0, -0.0, -12.375)
    assert [fixed(value, 2) for value in values] == ["0.00", "-0.01", "0.00", "0.00", "0.00", "-12.38"]
    assert fixed(math.nan, 3) == "nan"


BETTER = {
    **dict.fromkeys(("reward: rm", "raw reward: rm", "bleu", "corpus_bleu"), 1),
    **dict.fromkeys(("accuracy", "kept_accuracy", "tau", "prompt_tau"), 1),
    **dict.fromkeys(("empty", "unfinished", "nll"), -1),
    **dict.fromkeys(("words", "distinct_2", "kept_share"), 0),
}


def measured(figure: Figure, numbers: list[float]) -> Evaluation:
    """24 prompts with these numbers in a figure's first column, over and over, and 50 in its others."""
    values = {name: [50.0] * 24 for name in figure.columns}
    values[figure.columns[0]] = numbers * (24 // len(numbers))
    prompts = [f"p{k}" for k in range(24)]
    checks = {"rm": {"fingerprint": "f", "refused": ""}}
    return Evaluation(prompts, [""] * 24, prompts, values, checks=checks, about=dict.fromkeys(LIMITS))


@pytest.mark.parametrize("name", [*FIGURES, "reward: rm", "raw reward: rm"])
def test_the_last_lines_say_who_is_first(name: str) -> None:
    """More of a figure may be better, worse, or neither."""
    figure = figures_of(dict.fromkeys([name, *(FIGURES[name].columns if name in FIGURES else ())]))[name]
    assert figure.better == BETTER[name]
    if name == "corpus_bleu":
        return  # no mean of what a prompt adds
    high, low = measured(figure, [3.0, 4.0, 6.0]), measured(figure, [1.0, 2.5, 3.0])
    for a, b, sign in ((high, low, 1), (low, high, -1)):
        found = compare(a, b)
        row = found.differences[TOTAL][name]
        first = "A" if sign * figure.better > 0 else "B"
        said = f"{figure.title} (A - B {shown(row.difference, figure.digits)})"
        text = comparison_table(found)
        assert (f"\n{first} is first by " in text) == (said in text.splitlines()[-1]) == bool(figure.better)
        assert text.count(" is first by ") == bool(figure.better)
    found = compare(measured(figure, [3.0, 1.0, 2.0]), measured(figure, [1.0, 2.5, 3.0]))
    said = f"{figure.title} (A - B {shown(found.differences[TOTAL][name].difference, figure.digits)})"
    last = comparison_table(found).splitlines()[-1]
    assert last.startswith("neither is first: the intervals do not tell A from B by ") == bool(figure.better)
    assert (said in last) == bool(figure.better)


def test_the_last_lines_name_both_sides_and_what_is_open() -> None:
    bleu, nll, tau = FIGURES["bleu"], FIGURES["nll"], FIGURES["prompt_tau"]
    a, b = measured(bleu, [3.0, 4.0]), measured(bleu, [1.0, 2.5])
    for side, losses, order in ((a, [9.0, 8.0], [0.5, 0.1]), (b, [2.0, 3.0], [0.1, 0.5])):
        side.values.update(measured(nll, losses).values | measured(tau, order).values)
    *_, first, second, last = comparison_table(compare(a, b)).splitlines()
    assert first.startswith("A is first by BLEU over characters (published) (A - B 1.7")
    assert second.startswith("B is first by NLL of the best answer, nats a token (A - B 0.1")
    assert last.startswith("the intervals do not tell A from B by Kendall's tau, mean over prompts (A - B 0.000 [")
    one, other = (
        Evaluation(["p"], [""], ["r"], {"bleu": [value]}) for value in (2.0, 1.0)
    )  # of one prompt there is no interval
    last = comparison_table(compare(one, other)).splitlines()[-1]
    assert last == (
        "neither is first: the intervals do not tell A from B by BLEU over characters (published) (A - B 1.00)"
    )


def test_wins_alone_may_say_who_is_first() -> None:
    longer, shorter = (
        answers(["a cat sat"] * 5, list("sssst")),
        answers(["x", "x", "x", "x", "a cat sat"], list("sssst")),
    )
    ours, theirs = (evaluate(references(), given, reward_models=LENGTH) for given in (longer, shorter))
    for pair, side in (((ours, theirs), "A"), ((theirs, ours), "B")):
        found = compare(*pair)
        said = f"\n{side} is first by win rate of A by length ({shown(found.wins[TOTAL]['length'].rate, 3)})"
        assert said in comparison_table(found)


def test_what_was_said_of_either_side_is_said_of_both() -> None:
    coin = {"coin": lambda: RewardModel(by_length(slope=0), TOKENIZER)}
    ours = evaluate(references(), answers(["a cat", "x", "the mat"]), reward_models=coin)
    refused, found = ours.notes[-1], compare(ours, evaluate(references(), answers(["a"]), reward_models=coin))
    assert refused.startswith("no rewards of coin are reported: ")
    assert found.notes == [
        *("A: 5 references have no answer and are left out", refused),
        "B: 7 references have no answer and are left out",
    ]
    assert refused in comparison_table(found)


def test_what_cannot_be_compared_is_named() -> None:
    model = spread(make_model(len(TOKENIZER)))
    settings: dict[str, Any] = {"model": model, "tokenizer": TOKENIZER}
    given = answers(["a cat", "x", "the mat"])
    ours = evaluate(references(), given, reward_models=LENGTH, **settings)
    # The same weights under another name are the same model, others under the same name are not.
    renamed = evaluate(references(), given, reward_models={"size": lambda: LONGER}, **settings)
    assert "size" in compare(ours, renamed).wins[TOTAL]
    steeper = {"length": lambda: RewardModel(by_length(slope=2), TOKENIZER)}
    found = compare(ours, evaluate(references(), given, reward_models=steeper, **settings))
    assert found.wins[TOTAL] == {}
    assert "two reward models of one name are not compared: length" in found.notes
    bare = compare(ours, evaluate(references(), given))
    assert list(bare.differences[TOTAL]) == ["bleu", "corpus_bleu", "words", "distinct_2", "empty", "unfinished"]
    assert bare.notes[1].startswith("only one side has reward: length, 100 sigmoid, raw reward: length, NLL of")
    margin = compare(ours, evaluate(references(), given, reward_margin=1.0, **settings))
    assert "kept_accuracy" not in margin.differences[TOTAL]
    assert "kept pairs are not compared: reward_margin 3.0 and 1.0" in margin.notes
    others = [RankedRecord(record.prompt, ("a mat", "x")) for record in references()]
    moved = compare(ours, evaluate(others, given, **settings))
    assert list(moved.differences[TOTAL]) == ["words", "distinct_2", "empty", "unfinished"]
    assert moved.notes[-1].startswith("3 of 3 prompts have other references on the two sides")
    said = json.loads(json.dumps(ours.as_dict()))
    said["values"]["nll_tokens"][1] += 1
    tokens = compare(ours, Evaluation.from_dict(said))
    assert list(ours.values).count("nll_tokens") == 1
    assert set(compare(ours, ours).differences[TOTAL]) - set(tokens.differences[TOTAL]) == {"nll"}
    assert "NLL a token is not compared: the best answers are other tokens on the two sides" in tokens.notes
    with pytest.raises(ValueError, match="compare: expected prompts in common, got none among 3 and 1"):
        compare(ours, evaluate([RankedRecord("z", ("a", "b"))], [Answer("z", "x")]))
