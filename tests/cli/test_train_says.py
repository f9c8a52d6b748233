"""What `clha-fast train` says of records: the way out of a bad one, and prompts that miss the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
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
