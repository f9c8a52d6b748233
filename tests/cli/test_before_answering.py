"""What `eval` and `compare` find out before hours of work, and the files of answers that both read."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from tests.support.command_line import one_sentence
from tests.support.reward_models import TOKENIZER, by_length, write
from tests.support.tiny import make_model

for package in ("scipy", "nltk", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed (the eval extra)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lm`, `good` (a reward model), `wide` (one with two labels), `empty`, references and answers."""
    path = tmp_path_factory.mktemp("given")
    wide = by_length()
    wide.config.num_labels = 2
    wide = type(wide)(wide.config)
    for name, model in {"lm": make_model(len(TOKENIZER)), "good": by_length(), "wide": wide}.items():
        model.save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    (path / "empty").mkdir()
    rows = [{"prompt": f"say {k}:", "completions": ["the cat sat on a mat", "a dog"]} for k in range(6)]
    write(path / "ranked.jsonl", rows)
    write(path / "a.jsonl", [{"prompt": row["prompt"], "answer": "a cat sat"} for row in rows])
    return path


REFUSED = {
    "empty": "expected a folder with a model, got .* without a configuration",
    "lm": r"without weights for score\.weight; its scores would be random",
    "wide": "expected the index of one of the reward model's 2 labels",
    "/nowhere": "expected a folder with a model, or a name on the Hub",
}


@pytest.mark.parametrize("bad", list(REFUSED))
def test_reward_models_are_probed_before_anything_is_answered(
    folder: Path, tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = ("--reward-model", str(folder / "good"), "--reward-model", bad if bad[0] == "/" else str(folder / bad))
    measured = ("--references", str(folder / "ranked.jsonl"), *judges, "--device", "cpu")
    out = tmp_path / "found.json"
    given = str(folder / "a.jsonl")
    for words in (
        ("eval", "--model", str(folder / "lm"), "--max-new-tokens", "4", "--out", str(out)),
        ("eval", given),
        ("compare", given, str(folder / "a.*l")),
    ):
        assert cli.main([*words, *measured]) != 0
        said = capsys.readouterr()  # a bar of the model that is in order may stand in front
        assert said.out == ""
        assert re.search(REFUSED[bad], said.err.splitlines()[-1]), said.err[-600:]
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.list.json", "a.*l"])
def test_compare_reads_the_answers_that_eval_reads(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "a.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path = folder / name
    references = ("--references", str(folder / "ranked.jsonl"))
    assert cli.main(["eval", str(path), *references]) == 0
    assert cli.main(["compare", str(path), str(folder / "a.jsonl"), *references]) == 0
    assert "6 prompts in common; 0 records stand in A alone, 0 in B alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "say 9:", "completions": ["a cat", ""]}, "completions[1]: expected a response that is not empty"),
        ({"prompt": "say 9:", "completions": ["a", "b"], "ranks": [1, 1]}, "ranks: expected"),
    ],
)
def test_bad_references_are_left_out_where_asked(
    folder: Path, tmp_path: Path, bad: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]
    ranked, answers = str(write(tmp_path / "ranked.jsonl", [*rows, bad])), str(folder / "a.jsonl")
    judged = ("--reward-model", str(folder / "good"), "--reward-check", ranked, "--device", "cpu")
    for words in (
        ("eval", answers, "--references", ranked),
        ("compare", answers, answers, "--references", ranked),
        ("compare", answers, str(folder / "a.*l"), "--references", str(folder / "ranked.jsonl"), *judged),
    ):
        assert cli.main([*words]) == cli.USER_ERROR
        error = one_sentence(capsys)
        assert f"{ranked}:7: {said}" in error
        assert error.endswith("; where others are good, --skip-bad-records leaves it out\n")
        assert cli.main([*words, "--skip-bad-records"]) == 0
        assert capsys.readouterr().out.count(f"skipped       {ranked}: 1 bad records, the first: {ranked}:7: ") == 1


@pytest.mark.parametrize("words", [("--limit", "-1"), ("--limit", "0"), ("--batch-size", "-2"), ("--batch-size", "0")])
def test_counts_are_positive(folder: Path, words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    given = (str(folder / "a.jsonl"), "--references", str(folder / "ranked.jsonl"))
    commands = [["eval", *given, *words]]
    if words[0] == "--batch-size":
        commands.append(["compare", given[0], *given, *words])
    for command in commands:
        assert cli.main(command) != 0
        assert f"{words[0]}: expected a positive whole number, got {words[1]}" in one_sentence(capsys)
