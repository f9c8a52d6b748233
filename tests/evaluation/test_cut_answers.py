"""What a reward model's limit has cut, and what it cannot read, stands in an evaluation's notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli import main as cli
from clha_fast.data import RankedRecord
from clha_fast.evaluation.comparison import compare, comparison_table
from clha_fast.evaluation.report import Evaluation, evaluate, evaluation_table
from clha_fast.generation import Answer
from clha_fast.rewards.reward_model import RewardModel
from tests.support.reward_models import TOKENIZER, by_length, write

LONG = "the cat sat on a mat and then a dog ran over it "
POSITIONS = 24


def judge(positions: int = POSITIONS) -> dict[str, Any]:
    return {"rm": lambda: RewardModel(by_length(positions), TOKENIZER)}


def references(count: int = 6, better: str = "the cat sat") -> list[RankedRecord]:
    return [RankedRecord(f"say {k}:", (better, "a")) for k in range(count)]


def answers(*texts: str) -> list[Answer]:
    return [Answer(f"say {k}:", text, "stop") for k, text in enumerate(texts)]


def said(found: Evaluation) -> list[str]:
    return [note for note in found.notes if "cut to its" in note or "no token" in note]


def sentence(cut: int, of: int, limit: int = POSITIONS) -> str:
    behind = f"prompts with what is scored behind them are cut to its {limit} tokens; their rewards are of what is left"
    return f"{cut} of {of} {behind}"


@pytest.mark.parametrize(
    ("texts", "cut", "of"),
    [
        ((2 * LONG, "a cat", "a dog"), 1, 3),
        ((2 * LONG, 3 * LONG, 2 * LONG, ""), 3, 3),  # an empty answer is not read
        (("a cat", "a dog", "x"), 0, 3),
    ],
)
def test_answers_that_are_cut(texts: tuple[str, ...], cut: int, of: int, caplog: pytest.LogCaptureFixture) -> None:
    found = evaluate(references(), answers(*texts), reward_models=judge())
    assert said(found) == ([f"rm: {sentence(cut, of)}"] if cut else [])
    assert ("are cut to its" in caplog.text) == bool(cut), "and logged, as before"
    table = evaluation_table(found, found.figures())
    assert all(note in table for note in said(found))
    assert not said(evaluate(references(), answers(*texts), reward_models=judge(200)))


def test_each_reward_model_has_its_own_sentence() -> None:
    models = {"short": judge()["rm"], "long": judge(200)["rm"], "middle": judge(40)["rm"]}
    found = evaluate(references(), answers(2 * LONG, "a cat"), reward_models=models)
    assert said(found) == [f"short: {sentence(1, 2)}", f"middle: {sentence(1, 2, 40)}"]


def test_held_out_pairs_that_are_cut() -> None:
    """Said again where an earlier check is taken over; a comparison says what both say once."""
    records = references(better=2 * LONG)
    found = evaluate(records, answers("a cat", "x"), reward_models=judge())
    note = f"rm, held-out pairs: {sentence(6, 6)}"
    assert said(found) == [note]
    again = evaluate(records, answers("a dog", "x"), reward_models=judge(), checks=json.loads(json.dumps(found.checks)))
    assert said(again) == [note]
    assert compare(found, again).notes.count(note) == 1
    assert note in comparison_table(compare(found, again))
    other = evaluate(records, answers(2 * LONG, "x"), reward_models=judge(), checks=found.checks)
    assert f"B: rm: {sentence(1, 2)}" in compare(found, other).notes


def test_answers_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from clha_fast.rewards.rows import AnswerCollator

    reads = AnswerCollator.reads
    monkeypatch.setattr(AnswerCollator, "reads", lambda self, text: text != "~" and reads(self, text))
    found = evaluate(references(), answers("~", "a cat", "", "~"), reward_models=judge())
    assert said(found) == ["rm: 2 of 4 answers have no token that it reads, and count as empty"]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "judge"
    by_length(POSITIONS).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    rows = [{"prompt": record.prompt, "completions": list(record.completions)} for record in references()]
    ranked = str(write(tmp_path / "ranked.jsonl", rows))
    given = [{"prompt": row["prompt"], "answer": 2 * LONG if k < 2 else "a cat"} for k, row in enumerate(rows)]
    path, out = str(write(tmp_path / "answers.jsonl", given)), tmp_path / "m.json"
    words = ["eval", path, "--references", ranked, "--reward-model", str(folder), "--out", str(out), "--device", "cpu"]
    assert cli.main(words) == 0
    note = f"judge: {sentence(2, 6)}"
    assert note in capsys.readouterr().out
    assert json.loads(out.read_text())["notes"] == [note]
