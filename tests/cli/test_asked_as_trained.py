"""A run on answers without thoughts, then its model asked by `generate`: behind the block that stood in training."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli import main as cli
from clha_fast.data.prompts import PromptRecord
from clha_fast.generation import GenerationSettings, encode_prompts, load_backend, read_answers, trained_lead
from tests.support.chat_templates import IM, Shape, chat_tokenizer
from tests.support.command_line import one_sentence
from tests.support.reward_models import save_llama, write
from tests.support.tiny import make_model

BLOCK = "<think>\n\n</think>\n\n"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "{% if '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOKENIZER = chat_tokenizer(Shape(TEMPLATE, "", "", IM, "<|endoftext|>"))
QUESTION = [{"role": "user", "content": "Why?"}]


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Why is {number}?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model(len(TOKENIZER), max_position_embeddings=128).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def train(folder: Path, base: Path, answers: tuple[str, str], *flags: str) -> Path:
    rows = [{"prompt": question(number), "completions": list(answers)} for number in range(8)]
    train_file, out = write(folder / "train.jsonl", rows), folder / "out"
    own = {"train_file": train_file, "model": base, "output_dir": out, "max_steps": 1, "eval_fraction": 0.25}
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "--use_cpu", "--per_device_train_batch_size", "2", *words, *flags]) == 0
    return out


def asked(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What `generate` says of how it asks a file of prompts alone."""
    prompts, answers = write(folder / "prompts.jsonl", [{"prompt": QUESTION}]), folder / "answers.jsonl"
    words = ("--max-new-tokens", "2", "--device", "cpu", "--overwrite")
    capsys.readouterr()
    assert cli.main(["generate", str(folder / "out"), str(prompts), str(answers), *words, *flags]) == 0
    assert len(read_answers(answers)) == 1
    return "".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("template "))


def test_a_model_of_answers_without_thoughts(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = train(tmp_path, base, ("Yes.", "no"), "--peft_config.r", "2", "--peft_config.target_modules", "[q_proj]")
    said = capsys.readouterr().out
    assert f"prompts   end with {BLOCK!r}; a server's do not, unless" in said
    assert trained_lead(adapter) == BLOCK
    assert trained_lead(adapter / "checkpoint-1") == BLOCK
    assert f"1 of 1 prompts end with {BLOCK!r}; a server's do not" in asked(tmp_path, capsys)
    assert asked(tmp_path, capsys, "--lead", "") == ""
    told = ("--lead", "", "--chat-template-kwargs", '{"enable_thinking": false}')
    assert asked(tmp_path, capsys, *told) == "", "as a server that is told so"
    assert cli.main(["merge", str(adapter), str(tmp_path / "whole")]) == 0
    assert trained_lead(tmp_path / "whole") == BLOCK
    backend = load_backend(str(tmp_path / "whole"), device="cpu")
    settings = GenerationSettings(lead=trained_lead(tmp_path / "whole"))
    (prompt,) = encode_prompts([PromptRecord(QUESTION)], backend.tokenizer, settings).prompts  # type: ignore[arg-type]
    assert TOKENIZER.decode(prompt.ids) == f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{BLOCK}"


def test_a_model_of_answers_with_thoughts(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thoughts = ("<think>\nHm.\n</think>\n\nYes.", "<think>\nSo.\n</think>\n\nno")
    out = train(tmp_path, base, thoughts)
    assert "end with" not in capsys.readouterr().out
    assert trained_lead(out) == ""
    assert asked(tmp_path, capsys) == "", "as a server asks"
    run = json.loads((out / "run.json").read_text())
    assert set(run) == {"settings", "data", "lead"}
    (out / "run.json").unlink()
    assert f"asked as a server asks, without {BLOCK!r}" in asked(tmp_path, capsys), "it is not known"


@pytest.mark.parametrize(("lead", "told"), [(BLOCK, None), (None, None), (None, BLOCK), (BLOCK, "")])
def test_rollouts_go_on_behind_it(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], lead: str | None, told: str | None
) -> None:
    """Or behind the one asked for. Answers that stand beside the prompts play no part: these would have no block."""
    policy = tmp_path / "policy"
    shutil.copytree(base, policy)
    if lead is not None:
        (policy / "run.json").write_text(json.dumps({"settings": {}, "data": {}, "lead": lead}))
    save_llama(tmp_path / "judge")
    thoughts = ["<think>\nHm.\n</think>\n\nYes.", "<think>\nSo.\n</think>\n\nno"]
    rows = write(tmp_path / "rows.jsonl", [{"prompt": question(number), "completions": thoughts} for number in (1, 2)])
    paths = {"train_file": rows, "model": policy, "reward_model": tmp_path / "judge", "output_dir": tmp_path / "out"}
    own = {**paths, "eval_fraction": 0, "max_steps": 1, "max_completion_length": 3, "per_device_train_batch_size": 2}
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    words += [] if told is None else ["--lead", told]
    assert cli.main(["rlhf", "--use_cpu", *words]) == 0
    said = capsys.readouterr().out
    lead = lead if told is None else told
    assert (f"2 of 2 prompts end with {BLOCK!r}; a server's do not" in said) == bool(lead)
    assert (f"2 of 2 prompts are asked as a server asks, without {BLOCK!r}" in said) == (lead is None)
    assert trained_lead(tmp_path / "out") == lead


def test_a_conversation_says_it_once(tmp_path: Path, base: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nWhy?\n"))
    words = ["generate", str(base), "--chat", "--system", "Be kind.", "--max-new-tokens", "3", "--device", "cpu"]
    assert cli.main(words) == 0
    assert capfd.readouterr().err.count("prompts are asked as a server asks, without") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    assert cli.main([*words, "--chat-template-kwargs", '{"enable_thinking": false}']) == 0
    assert "as a server asks" not in capfd.readouterr().err


def test_what_is_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = str(write(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}]))
    answers = str(tmp_path / "answers.jsonl")
    kwargs = "--chat-template-kwargs"
    for words, expected in (
        ((kwargs, "[1]"), "--chat-template-kwargs: expected a JSON object such as"),
        (("--lead", r"<think>\n\n</think>"), "--lead: expected line breaks as they are, in a shell $'"),
        ((kwargs, "{no"), "--chat-template-kwargs: expected a JSON object such as"),
        ((kwargs, '{"tokenize": true}'), "chat_template_kwargs: expected variables of the chat template's own"),
    ):
        assert cli.main(["generate", str(base), prompts, answers, *words]) == 2
        assert expected in one_sentence(capsys), words
    assert cli.main(["rlhf", "--train_file", prompts, "--model", str(base), "--lead", r"a\n"]) == 2
    assert "--lead: expected line breaks as they are" in one_sentence(capsys)
    for words in (("--lead", "x"), ("--lead", ""), (kwargs, "{}")):
        assert cli.main(["generate", str(base), "--chat", "--no-history", *words]) == 2
        assert f"{words[0]}: expected none with --no-history" in one_sentence(capsys)
