"""What `clha-fast train` says: of records, of what the library warns of, and how far an evaluation is."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.cli import main as cli
from clha_fast.cli import text as cli_text
from clha_fast.cli.runs import Progress
from clha_fast.cli.train import length_line
from clha_fast.experiments.run import Run
from clha_fast.training.config import CLHAConfig
from tests.support.command_line import command, one_sentence, write_rows
from tests.support.tiny import make_model, make_tokenizer


@pytest.mark.parametrize(
    "bad",
    [
        '{"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, NaN]}',
        '{"prompt": "p", "completions": ["a", "b"], "rewards": ["5", "n/a"]}',
        '{"prompt": "p", "completions": ["a", "</s>"], "rewards": [1.0, 0.0]}',
        '{"prompt": "p", "completions": ["a", "b"], "rewards": null}',
        '{"prompt": "p", "completions": ["a", "b"]}',
    ],
)
def test_errors_of_records_name_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str) -> None:
    words = command(tmp_path, "--max_steps", "1")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(bad + "\n")
    assert cli.main(words) == 2
    assert "train.jsonl:17: " in (said := one_sentence(capsys))
    assert said.endswith("; where others are good, --skip_bad_records leaves it out\n")
    assert cli.main([*words, "--skip_bad_records", "--plot", "false", "--eval_fraction", "0"]) == 0
    printed = capsys.readouterr().out
    assert "skipped   1 bad records, the first: " in printed
    assert "training  16 prompts" in printed
    assert cli.main([*words, "--columns.prompt", "promt"]) == 2
    assert "skip_bad_records" not in one_sentence(capsys), "another column is the way out"


def test_the_longest_row_is_said_where_nothing_cuts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "train.jsonl")
    lines = path.read_text().splitlines()
    lines[10] = json.dumps({"prompt": "say", "completions": ["a cat", "dog " * 150], "rewards": [5.0, 0.0]})
    path.write_text("\n".join(lines))
    words = command(tmp_path, "--max_steps", "1", "--eval_fraction", "0", "--plot", "false", max_length=None)
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    found = re.search(
        r"^lengths   no limit: the longest row has (\d+) tokens \((.*)\); --max_length N cuts", printed, re.M
    )
    assert found, printed
    assert int(found[1]) > 150
    assert found[2] == f"{path}:11"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, "no limit: the longest row has 46 tokens (record 2)"),
        ({"max_prompt_length": 9}, "no limit: the longest row has 46 tokens (record 2)"),
        ({"max_completion_length": 30}, "no limit: the longest row has 32 tokens (record 2)"),
        ({"max_length": 40}, ""),
        ({"max_prompt_length": 9, "max_completion_length": 30}, ""),
    ],
)
def test_what_cuts_rows_is_a_limit(tmp_path: Path, limits: dict[str, int], said: str) -> None:
    rows = [{"prompt": "a", "completions": ["b", "c" * count]} for count in (3, 7, 43, 5)]
    dataset = RankedDataset(rows, RankedCollator(make_tokenizer(), **limits))  # type: ignore[arg-type]
    args = CLHAConfig(str(tmp_path), use_cpu=True, **limits)  # type: ignore[arg-type]
    assert length_line(args, dataset).get("lengths", "").partition(";")[0] == said


@pytest.mark.parametrize(("texts", "said"), [(16, "prompts are texts and go"), (3, "3 of "), (0, "")])
def test_texts_for_a_chat_model_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: int, said: str
) -> None:
    path = write_rows(tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[texts:]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    words = command(tmp_path, "--max_steps", "1", "--eval_fraction", "0", "--plot", "false")
    assert cli.main([*words, "--build_tokenizer", "null", "--tokenizer", str(tmp_path / "chat")]) == 0
    out = capsys.readouterr().out
    assert ("without the tokenizer's chat template" in out) == bool(said)
    assert said in out
    make_model(len(tokenizer)).save_pretrained(tmp_path / "chat")
    assert cli.main(["inspect", str(path), "--model", str(tmp_path / "chat")]) == 0
    assert ("without the tokenizer's chat template" in capsys.readouterr().out) == bool(said)


@pytest.mark.parametrize(("texts", "said"), [(16, ""), (3, "13 of 16 prompts are"), (0, "prompts are messages")])
def test_messages_without_a_chat_template_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: int, said: str
) -> None:
    path = write_rows(tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[texts:]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "plain")
    words = command(tmp_path, "--max_steps", "1", "--eval_fraction", "0", "--plot", "false")
    train = [*words, "--build_tokenizer", "null", "--tokenizer", str(tmp_path / "plain")]
    for command_line in (train, ["inspect", str(path), "--model", str(tmp_path / "plain")], ["inspect", str(path)]):
        assert cli.main(command_line) == 0
        out = " ".join(capsys.readouterr().out.split())
        expected = bool(said) and command_line[-1] != str(path)
        assert ('written as "User: ...", "Assistant: "' in out) == expected
        assert said in out or not expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a; rank_by_reward=True (--rank_by_reward) orders them", "a; --rank-by-reward orders them"),
        ("a; limit=3 (--limit) ends it, layout='x'.", "a; --limit 3 ends it, --layout x."),
        ("a; limit=3 (--head) ends it", "a; --limit 3 (--head) ends it"),
        ("limit=3/rows.jsonl: 1 of 4", "limit=3/rows.jsonl: 1 of 4"),
        ("limit=30.jsonl: 1 of 4", "limit=30.jsonl: 1 of 4"),
        ("limit=3: No such file; limit=4: so", "limit=3: No such file; --limit 4: so"),
        (
            "x: expected a number, got 'limit=3'; limit=4 is one",
            "x: expected a number, got 'limit=3'; --limit 4 is one",
        ),
        ("expected y, got \"it's limit=3\" (layout='x')", 'expected y, got "it\'s limit=3" (--layout x)'),
        (
            "layout='a'-b and limit=3-4 stay, limit=1.5 does not",
            "layout='a'-b and limit=3-4 stay, --limit 1.5 does not",
        ),
    ],
)
def test_settings_in_messages_are_said_once_and_what_was_given_stays(text: str, said: str) -> None:
    parser = cli_text.Parser(prog="x")
    for name in ("--limit", "--rank-by-reward", "--layout"):
        parser.add_argument(name)
    assert cli_text.as_flags(text) == said
    cli_text.speak()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "--model", "."], "--max-length 8 cuts them"),
        (["score", "--policy", "."], "--max-length 8 cuts them"),
        (["train"], "max_length=8 cuts them"),  # its parser has not spoken yet
    ],
)
def test_warnings_are_in_the_words_of_the_command(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(name: str, rest: list[str]) -> int:
        if name != "train":
            parser = cli_text.Parser(prog=name)
            parser.add_argument("--max-length")
        logging.getLogger("clha_fast.models.positions").warning("rows: expected 8; max_length=8 cuts them")
        return 0

    monkeypatch.setattr(cli, "run", warn)
    root = logging.getLogger()
    with monkeypatch.context() as patch:
        patch.setattr(root, "handlers", [])
        for _ in range(2):  # each time once
            assert cli.main(words) == 0
            assert capsys.readouterr().err == f"rows: expected 8; {said}\n"
    taken = io.StringIO()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(taken)])
    assert cli.main(words) == 0
    assert (taken.getvalue(), capsys.readouterr().err) == ("rows: expected 8; max_length=8 cuts them\n", "")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("batches", [[1, 2, 3], iter("abc")])
def test_an_evaluation_has_a_bar_on_a_terminal(
    terminal: bool, batches: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen, state, progress = Screen(), SimpleNamespace(is_world_process_zero=True), Progress()
    monkeypatch.setattr(sys, "stderr", screen)
    for _ in range(3):
        progress.on_prediction_step(None, state, None, eval_dataloader=batches)
    progress.on_evaluate(None, state, None)
    assert progress.held_out is None
    assert ("Held out" in screen.getvalue()) is terminal
    assert ("/3" in screen.getvalue()) is (terminal and isinstance(batches, list))


@pytest.mark.parametrize("fraction", [0.25, 0])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_without_a_bar_is_said_as_it_begins(
    terminal: bool,
    fraction: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    said: list[str] = []
    evaluate_before = Run.evaluate_before

    def listening(run: Run) -> None:
        said.append(capsys.readouterr().out)
        evaluate_before(run)

    monkeypatch.setattr(Run, "evaluate_before", listening)
    words = command(tmp_path, "--plot", "false", max_steps=1, save_steps=1, eval_fraction=fraction)
    assert cli.main(words) == 0
    assert (" held-out prompts are evaluated before training\n" in said[0]) is (not terminal and fraction > 0)
    assert cli.main([*words, "--resume"]) == 0
    assert "are evaluated" not in said[1]
