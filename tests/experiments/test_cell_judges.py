"""Cells of tables name the reward model that judged them, so that `compare` does not take two for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clha_fast.data.records import RankedRecord
from clha_fast.evaluation.comparison import compare
from clha_fast.evaluation.intervals import Estimate
from clha_fast.evaluation.report import RAW, TOTAL, Evaluation
from clha_fast.experiments.assess import Assessment, Assessor, once_each
from clha_fast.experiments.cells import Cell
from clha_fast.experiments.comparison import parse_comparison
from clha_fast.generation import GenerationSettings
from tests.support.reward_models import TOKENIZER, by_length, write
from tests.support.tiny import make_model

for package in ("scipy", "nltk", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed (the eval extra)")

BELIEVED = {"accuracy": Estimate(0.9, 0.8, 1.0, 9).as_dict(), "refused": "", "trained": None}


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, Evaluation]:
    """One model's cell in two tables, by the judges "steep" and "flat", as it lies in their folders."""
    folder = tmp_path_factory.mktemp("judges")
    rows = [{"prompt": f"say {k}:", "completions": ["the cat sat", "a dog"]} for k in range(3)]
    parts = {name: str(write(folder / f"{name}.jsonl", rows)) for name in ("train", "dev", "test")}
    model = saved(make_model(len(TOKENIZER)), folder / "model")
    found = {}
    for name, slope in (("steep", 2.0), ("flat", 0.5)):
        judge = saved(by_length(slope=slope), folder / name)
        given = {"output_dir": str(folder / f"of {name}"), "data": {2: parts}, "checkpoints": {"m": model}}
        table = parse_comparison({**given, "base": model})
        asked = GenerationSettings(max_new_tokens=4, max_prompt_length=32)
        limits = {"dev": None, "test": None}
        assessor = Assessor("accuracy", {"evaluation": judge}, {"evaluation": BELIEVED}, asked, 4, limits)
        cell = Cell(table.checkpoints[0], "2", table.data["2"], 1)
        assessment = Assessment(table, cell, model, assessor, "test")
        assessment.run()
        found[name] = Evaluation.from_dict(json.loads((Path(assessment.folder) / "metrics.json").read_text()))
    return found


def test_two_tables_judges_are_two(cells) -> None:
    steep, flat = cells["steep"], cells["flat"]
    assert steep.checks["evaluation"].keys() == {"fingerprint", "accuracy", "refused"}
    assert compare(steep, steep).wins[TOTAL].keys() == {"evaluation"}
    other = compare(steep, flat)
    assert other.wins[TOTAL] == {}
    assert not [name for name in other.differences[TOTAL] if "reward" in name]
    assert "two reward models of one name are not compared: evaluation" in other.notes
    assert {"nll", "accuracy", "words"} <= other.differences[TOTAL].keys()


@pytest.mark.parametrize("unknown", ["A", "B", "A and B"])
def test_a_judge_that_nobody_knows_is_not_taken_for_the_other(cells, unknown: str) -> None:
    sides = []
    for side in ("A", "B"):
        plain = json.loads(json.dumps(vars(cells["steep"])))
        if side in unknown:
            plain["checks"] = {}
        sides.append(Evaluation.from_dict(plain))
    found = compare(*sides)
    assert RAW + "evaluation" in sides[0].values
    assert found.wins[TOTAL] == {}
    said = f"rewards are not compared, for {unknown} do not say which model judged: evaluation"
    assert [note for note in found.notes if "judged" in note] == [said]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([["ab", "ac", "bd"]], ["ab", "ac", "bd"]),  # several pairs of one prompt, all of them
        ([["ab", "bd", "ac"]], ["ab", "ac", "bd"]),
        ([["ab", "bd"], ["axy", "axz", "cd"]], ["axy", "axz", "bd", "cd"]),  # of two lengths the last
        ([["ab", "ab"]], ["ab", "ab"]),
        ([], []),
    ],
)
def test_pairs_that_judges_are_measured_on(files: list[list[str]], expected: list[str]) -> None:
    """The first letter is the prompt, the others are its responses."""
    made = [[RankedRecord(text[0], tuple(text[1:])) for text in texts] for texts in files]
    assert once_each(made) == [RankedRecord(text[0], tuple(text[1:])) for text in expected]


def test_a_judge_is_measured_on_all_pairs_of_a_prompt(tmp_path: Path) -> None:
    """Two records of a prompt, of which the judge gets one right."""
    judge = saved(by_length(), tmp_path / "judge")
    rows = [
        {"prompt": f"say {k}", "completions": order} for k in range(3) for order in (["a cat", "a"], ["b", "b dog"])
    ]
    paths = {name: str(write(tmp_path / f"{name}.jsonl", rows)) for name in ("train", "dev", "test")}
    given = {"output_dir": str(tmp_path / "out"), "data": {2: paths}, "base": "x", "settings": {"use_cpu": True}}
    accuracy = Assessor.of(parse_comparison(given), {"evaluation": judge}).checks["evaluation"]["accuracy"]
    assert (accuracy["value"], accuracy["prompts"]) == (0.5, 3)
