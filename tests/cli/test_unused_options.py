"""Options and arguments of measuring that nothing here would read are refused by name, whichever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli import main as cli
from clha_fast.data import RankedRecord
from clha_fast.evaluation.report import evaluate
from clha_fast.generation import Answer
from tests.support.command_line import one_sentence
from tests.support.reward_models import write

for package in ("scipy", "nltk", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed (the eval extra)")

JUDGE = {"--label": "1", "--reward-check": "ranked.jsonl"}
RUNNING = {"--device": "cuda:7", "--dtype": "float16", "--batch-size": "2"}
OF_THE_MODEL = {
    **{"--noise-rule": "signed", "--reward-margin": "1", "--answer-prefix": "So:"},
    **{"--layout": "shared", "--max-prompt-length": "9"},
}
MEASURING = {"--references": "ranked.jsonl", "--format": "trl", "--reward-model": "judge"}
BARE = ("a.jsonl", "--references", "ranked.jsonl")
CASES = [
    *((("eval", *BARE), option, value) for option, value in {**JUDGE, **RUNNING, **OF_THE_MODEL}.items()),
    *((("compare", *BARE, "a.jsonl"), option, value) for option, value in {**JUDGE, **RUNNING}.items()),
    *((("compare", "A.json", "A.json"), *item) for item in {**JUDGE, **RUNNING, **MEASURING}.items()),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ranked.jsonl`, answers in `a.jsonl`, and metrics in `A.json`."""
    path = tmp_path_factory.mktemp("given")
    rows = [{"prompt": f"say {k}:", "completions": ["the cat sat on a mat", "a dog"]} for k in range(6)]
    write(path / "ranked.jsonl", rows)
    write(path / "a.jsonl", [{"prompt": row["prompt"], "answer": "a cat sat"} for row in rows])
    records = [RankedRecord(str(row["prompt"]), tuple(row["completions"])) for row in rows]
    found = evaluate(records, [Answer(str(row["prompt"]), "a cat sat") for row in rows])
    (path / "A.json").write_text(json.dumps(found.as_dict()))
    return path


@pytest.mark.parametrize(("words", "option", "value"), CASES)
def test_an_option_that_nothing_reads_is_refused(
    folder: Path,
    words: tuple[str, ...],
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main([*words, option, value]) == cli.USER_ERROR
    assert one_sentence(capsys).startswith(f"clha-fast {words[0]}: {option}: expected ")


def test_bad_records_need_a_file_that_holds_some(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["compare", "A.json", "A.json", "--skip-bad-records"]) == cli.USER_ERROR
    assert one_sentence(capsys).startswith("clha-fast compare: --skip-bad-records: expected none beside two files")


def test_without_them_the_same_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for words in {words for words, _, _ in CASES}:
        assert cli.main([*words]) == 0, words
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "given",
    [
        *({"reward_check": [RankedRecord("say 1:", ("a", "b"))]}, {"tokenizer": "one"}, {"noise_rule": "signed"}),
        *({"reward_margin": 1.0}, {"max_prompt_length": None}, {"answer_prefix": "So:"}, {"layout": "packed"}),
    ],
    ids=lambda given: next(iter(given)),
)
def test_an_argument_that_nothing_reads_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))}: expected "):
        evaluate([RankedRecord("say 1:", ("a cat", "a"))], [Answer("say 1:", "a cat")], **given)
