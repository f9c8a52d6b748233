"""`clha-fast rank`: models of both kinds from their folders, resumed runs, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from clha_fast.cli import main as cli
from clha_fast.data import read_records
from clha_fast.rewards.policy import Policy
from tests.support.adapters import HEAD, lora_config, stir
from tests.support.command_line import one_sentence
from tests.support.reward_models import TOKENIZER, by_length, llama, spread, write
from tests.support.tiny import make_model, make_rows, own_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    models = {"policy": spread(make_model(len(TOKENIZER))), "reward": by_length(), "labels": llama(num_labels=2)}
    for name, model in models.items():
        model.save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    write(path / "in.jsonl", make_rows(9))
    return path


def run(*words: object) -> int:
    return cli.main(["rank", *map(str, words), "--device", "cpu"])


def test_a_policy_ranks_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert run(folder / "policy", folder / "in.jsonl", out, "--batch-size", 4) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"policy        {folder / 'policy'}: LlamaForCausalLM, ")
    assert "source        " in said
    assert "9 prompts" in said
    assert "answers, best first; " in said
    assert "% of the pairs stand as in the file; " in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line["mean_logps"] == sorted(line["mean_logps"], reverse=True) for line in lines)
    renamed = write(tmp_path / "named.jsonl", [{"q": "say", "one": "a cat", "two": "a dog ran"}])
    columns = ("--columns.prompt", "q", "--columns.completions", "[one, two]")
    assert run(folder / "policy", renamed, tmp_path / "named", *columns) == 0
    line = json.loads((tmp_path / "named").read_text())
    assert sorted(line["completions"]) == ["a cat", "a dog ran"]
    (record,) = read_records(tmp_path / "named")
    assert (list(record.completions), record.rewards) == (line["completions"], None)


def test_an_adapter_on_the_head_ranks(folder: Path, tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER)).from_pretrained(folder / "policy")
    adapted = stir(peft.get_peft_model(model, lora_config(HEAD))).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "policy")
    adapted.save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out.jsonl"
    assert run(tmp_path / "adapter", folder / "in.jsonl", out) == 0
    for line, record in zip(map(json.loads, out.read_text().splitlines()), make_rows(9), strict=True):
        scores = own_scores(adapted, TOKENIZER, record["prompt"], record["completions"])
        order = sorted(range(len(scores)), key=lambda k: -scores[k])
        assert line["order"] == order
        assert line["mean_logps"] == pytest.approx([scores[k] for k in order], abs=1e-5)


def test_a_classifier_is_taken_for_a_reward_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    rows = write(tmp_path / "in.jsonl", [{"prompt": "say", "completions": ["a", "a cat sat on a mat", "a cat"]}])
    assert run(folder / "reward", rows, out) == 0
    assert capsys.readouterr().out.startswith("reward model  ")
    line = json.loads(out.read_text())
    assert line["completions"] == ["a cat sat on a mat", "a cat", "a"]
    assert line["order"] == [1, 2, 0]


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (folder / "policy", folder / "in.jsonl")
    assert run(*words, tmp_path / "whole", "--batch-size", 4) == 0
    real, calls = Policy.sums, []

    def interrupted(self: Policy, rows: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "sums", interrupted)
    out = tmp_path / "out"
    assert run(*words, out, "--batch-size", 4) == 130
    monkeypatch.undo()
    assert not out.exists()
    assert "kept in" in capsys.readouterr().err
    assert run(*words, out, "--batch-size", 4) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert run(*words, out, "--batch-size", 4, "--resume") == 0
    assert "had been scored before" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "say", "completions": ["a cat", ""]}])
    long = write(tmp_path / "long.jsonl", [{"prompt": "say", "completions": ["a cat", "a cat sat " * 99]}])
    policy, reward, rows, out = folder / "policy", folder / "reward", folder / "in.jsonl", tmp_path / "no"
    for words, expected in (
        ((policy, empty, out), "empty.jsonl:1: completions[1]: expected a response that is not empty"),
        ((policy, rows, rows), "in.jsonl: exists already"),
        ((policy, rows, out, "--label", 1), "--label: expected none with a language model"),
        ((reward, rows, out, "--max-prompt-length", 9), "--max-prompt-length: expected none with a reward model"),
        ((reward, rows, out, "--answer-prefix", "Yes:"), "--answer-prefix: expected none with a reward model"),
        ((policy, rows, out, "--batch-size", 0), "--batch-size: expected a positive whole number"),
        ((tmp_path / "none", rows, out), "rank: MODEL: expected a folder that holds one, or a name on the Hub"),
        ((policy, rows, out, "--format", "moon"), "rank: --format: expected"),
        ((policy, rows, out, "--dtype", "moon"), "rank: --dtype: expected one of"),
    ):
        assert run(*words) == 2
        assert expected in one_sentence(capsys), words
    for words, expected in (
        ((policy, long, out), "--max-length: expected rows of at most"),
        ((reward, rows, out, "--max-length", 999), "--max-length: expected at most the reward model's"),
        ((folder / "labels", rows, out, "--label", 7), "--label: expected an index from 0 to 1"),
        ((folder / "labels", rows, out), "--label: expected the index of one of the reward model's 2 labels"),
    ):
        assert run(*words) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"clha-fast rank: {expected}")
    assert not out.exists()


def _arena(winner: str) -> dict[str, Any]:
    sides = {f"conversation_{k}": _turns(text) for k, text in (("a", "a cat"), ("b", "a dog ran"))}
    return {**sides, "winner": winner}


def _turns(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]


RANKED = {"prompt": "say", "completions": ["a cat", "a dog ran"]}
BAD_FILES: dict[str, tuple[list[Any], str]] = {
    "tie": ([_arena("model_a"), _arena("tie"), _arena("model_b")], ":2: winner: expected a preference for one of"),
    "ties": ([_arena("tie (bothbad)"), _arena("model_b"), _arena("tie")], ":1: winner: expected a preference for"),
    "empty answer": ([RANKED, RANKED, {**RANKED, "completions": ["a cat", ""]}], ":3: completions[1]: expected a"),
    "rewards": ([RANKED, {**RANKED, "rewards": [1.0]}], ":2: rewards: expected 2 numbers"),
    "cut off": ([RANKED, '{"prompt": "say", "completions": ["a cat', RANKED], ':2: column 41, in field "completions"'),
}


@pytest.mark.parametrize("kind", list(BAD_FILES))
@pytest.mark.parametrize("command", ["rank", "score", "policy", "generate"])
def test_bad_records_are_left_out_where_asked(
    folder: Path, tmp_path: Path, kind: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, said = BAD_FILES[kind]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    words = {
        "rank": ("rank", folder / "policy", source, out),
        "score": ("score", source, out, "--reward-model", folder / "reward"),
        "policy": ("score", source, out, "--policy", folder / "policy"),
        "generate": ("generate", folder / "policy", source, out, "--max-new-tokens", 1),
    }[command]
    command_line = [*map(str, words), "--device", "cpu"]
    assert cli.main(command_line) == 2
    message = one_sentence(capsys)
    assert f"{source}{said}" in message
    assert message.endswith("; where others are good, --skip-bad-records leaves it out\n")
    bad = sum(row not in (RANKED, _arena("model_a"), _arena("model_b")) for row in rows)
    for flag in ("--skip-bad-records", "--skip_bad_records"):
        assert cli.main([*command_line, flag, "--overwrite"]) == 0
        printed = capsys.readouterr().out
        assert f"skipped       {source}: {bad} bad records, the first: {source}{said}" in printed
        word = "prompts" if command == "generate" else "source"
        assert f"{word:<14}{source}: {len(rows) - bad}" in printed
        assert len(out.read_text().splitlines()) == len(rows) - bad


REFUSING = (
    "{% for m in messages %}{% if 'no' in m.content or m.role == 'system' %}{{ raise_exception('not this one') }}"
    "{% endif %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSED_PROMPTS: dict[str, list[dict[str, str]]] = {
    "a word": [{"role": "user", "content": "no"}],
    "a role": [{"role": "system", "content": "a cat"}, {"role": "user", "content": "say"}],
    "an answer": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "no"}],
}


@pytest.mark.parametrize(
    ("command", "kind"),
    list(
        zip(
            ["rank", "rank by rewards", "score", "policy", "generate", "alone", "alone", "eval"],
            itertools.cycle(REFUSED_PROMPTS),
            strict=False,
        )
    ),
)
def test_what_a_chat_template_refuses_is_left_out_where_asked(
    folder: Path, tmp_path: Path, kind: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "eval":
        pytest.importorskip("sacrebleu")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = REFUSING
    for name in ("policy", "reward"):
        shutil.copytree(folder / name, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    prompts = [[{"role": "user", "content": text}] for text in ("say", "a dog", "a cat")]
    prompts[1:1] = [REFUSED_PROMPTS[kind]]
    rows = [{"prompt": prompt, "completions": ["a cat", "a dog ran"]} for prompt in prompts]
    if command == "alone":
        rows = [{"prompt": prompt} for prompt in prompts]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.json"
    words = {
        "rank": ("rank", tmp_path / "policy", source, out),
        "rank by rewards": ("rank", tmp_path / "reward", source, out),
        "score": ("score", source, out, "--reward-model", tmp_path / "reward"),
        "policy": ("score", source, out, "--policy", tmp_path / "policy"),
        "eval": ("eval", "--model", tmp_path / "policy", "--references", source, "--out", out, "--max-new-tokens", 1),
    }.get(command, ("generate", tmp_path / "policy", source, out, "--max-new-tokens", 1))
    command_line = [*map(str, words), "--device", "cpu"]
    assert cli.main(command_line) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # behind the bars of models that were loaded
    assert f"{source}:2: " in message
    assert message.endswith("; where others are good, --skip-bad-records leaves it out")
    assert cli.main([*command_line, "--skip-bad-records"]) == 0
    assert f"skipped       {source}: 1 bad records, the first: {source}:2: " in capsys.readouterr().out
    lines = out if command != "eval" else tmp_path / "out.answers.jsonl"
    assert len(lines.read_text().splitlines()) == len(rows) - 1
    write(tmp_path / "in.jsonl", rows[1:2])
    assert cli.main([*command_line, "--skip-bad-records", "--overwrite"]) == 2
    assert (
        f"{source}: expected at least one good record, got 1 bad ones; the first: {source}:1: "
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", REFUSED_PROMPTS)
def test_a_reference_that_no_answer_belongs_to_is_not_refused(
    folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = REFUSING
    shutil.copytree(folder / "policy", tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    prompts = [REFUSED_PROMPTS[kind], [{"role": "user", "content": "say"}]]
    rows = [{"prompt": prompt, "completions": ["a cat", "a dog ran"]} for prompt in prompts]
    references = write(tmp_path / "in.jsonl", rows)
    answers = write(tmp_path / "answers.jsonl", [{"prompt": prompts[1], "answer": "a cat"}])
    command_line = ["eval", answers, "--references", references, "--model", tmp_path / "policy", "--device", "cpu"]
    assert cli.main([*map(str, command_line)]) == 0
    assert "1 references have no answer and are left out" in capsys.readouterr().out
    write(answers, [{"prompt": prompt, "answer": "a cat"} for prompt in prompts])
    assert cli.main([*map(str, command_line)]) == 2
    assert f"{references}:1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "said"), [("shared", ", shared rows"), ("auto", ", shared or padded rows, as counted")]
)
@pytest.mark.parametrize("model", ["policy", "reward"])
def test_layouts(
    folder: Path, tmp_path: Path, model: str, layout: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for name in ("padded", layout):
        assert run(folder / model, folder / "in.jsonl", tmp_path / name, "--layout", name, "--batch-size", 5) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first.endswith(said) == (name == layout)
        lines.append([json.loads(line) for line in (tmp_path / name).read_text().splitlines()])
    key = "mean_logps" if model == "policy" else "rewards"
    for one, other in zip(*lines, strict=True):
        assert one["order"] == other["order"]
        assert one[key] == pytest.approx(other[key], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "words", "marker"),
    [
        ({"objective": "coh"}, (), "A helpful answer:"),
        ({"objective": {"name": "coh", "good_marker": " Good:"}}, (), " Good:"),
        ({"objective": "coh"}, ("--answer-prefix", ""), ""),
        ({"objective": "clha"}, ("--answer-prefix", " Fine:"), " Fine:"),
    ],
)
def test_a_model_trained_behind_a_marker_is_asked_behind_it(
    folder: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    words: tuple[str, ...],
    marker: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folder / "policy", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings, "data": {}}))
    rows = [{"prompt": "say", "completions": ["a cat", " a dog ran", "the joy of old green hills"]}]
    assert (
        run(tmp_path / "run", write(tmp_path / "in", rows), tmp_path / "out", "--max-completion-length", 9, *words) == 0
    )
    said = capsys.readouterr().out
    assert (f"prefix        every answer begins with {marker!r}" in said) == bool(marker)
    line = json.loads((tmp_path / "out").read_text())
    scores = dict(zip(line["order"], line["mean_logps"], strict=True))
    model = make_model(len(TOKENIZER)).from_pretrained(folder / "policy")
    for number, text in enumerate(rows[0]["completions"]):
        blank = " " if marker and not text.startswith(" ") else ""
        front = [*TOKENIZER("say")["input_ids"], *TOKENIZER(marker, add_special_tokens=False)["input_ids"]]
        ids = [*TOKENIZER(blank + text, add_special_tokens=False)["input_ids"], 1][:9]
        with torch.no_grad():
            logps = model(torch.tensor([[*front, *ids]])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logps[len(front) - 1 + k, token]) for k, token in enumerate(ids)) / len(ids)
        assert scores[number] == pytest.approx(wanted, abs=1e-5)
