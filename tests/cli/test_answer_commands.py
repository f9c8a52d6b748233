"""`clha-fast generate`, `eval` and `compare`: from a model's folder to figures, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from clha_fast.evaluation import report, rewards
from clha_fast.generation import read_answers
from tests.support.command_line import one_sentence
from tests.support.reward_models import TOKENIZER, by_length, spread, write
from tests.support.tiny import make_model, make_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    spread(make_model(len(TOKENIZER))).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("by_length"))
    by_length().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def references(tmp_path: Path) -> str:
    """Longer answers are better."""
    rows = make_rows(10, rewards=False)
    for row in rows:
        row["completions"] = sorted({*row["completions"], "a dog ran over the old mat and fell"}, key=len, reverse=True)
    return str(write(tmp_path / "ranked.jsonl", rows))


def run(*words: str) -> int:
    return cli.main([*words])


def test_from_prompts_to_a_comparison(
    tmp_path: Path, model: str, reward_model: str, references: str, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy, drawn, few = (str(tmp_path / name) for name in ("greedy.jsonl", "drawn.jsonl", "few.jsonl"))
    short = ("--max-new-tokens", "6", "--device", "cpu")
    assert run("generate", model, references, greedy, *short) == 0
    out = capsys.readouterr().out
    assert "answers       greedy, at most 6 tokens\n" in out
    assert f"written       {greedy}: 10 answers, 0 empty, " in out
    assert run("generate", model, references, drawn, *short, "--temperature", "1", "--seed", "4", "--batch_size=3") == 0
    assert "temperature 1, seed 4" in capsys.readouterr().out
    assert run("generate", model, references, few, *short, "--limit", "4") == 0
    assert read_answers(few) == read_answers(greedy)[:4]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": answer.prompt} for answer in read_answers(greedy)])
    assert run("generate", model, str(prompts), few, *short, "--overwrite") == 0
    assert Path(few).read_bytes() == Path(greedy).read_bytes(), "prompts alone are the same prompts"
    capsys.readouterr()

    metrics = str(tmp_path / "greedy.json")
    measured = ("--references", references, "--reward-model", reward_model, "--device", "cpu")
    assert run("eval", greedy, *measured, "--model", model, "--out", metrics) == 0
    out = capsys.readouterr().out
    assert "BLEU over characters (published)" in out
    assert "NLL of the best answer" in out
    name = Path(reward_model).name
    assert f"reward: {name}, 100 sigmoid" in out
    assert re.search(
        rf"{name} prefers the better answer in \S+ \[0\.[6-9]\d+, \S+\] of the held-out pairs of 10 prompts", out
    )
    found = json.loads(Path(metrics).read_text())
    assert len(found["prompts"]) == len(found["values"]["bleu"]) == 10
    assert found["about"]["answers"] == greedy

    both = str(tmp_path / "both.json")
    assert run("compare", metrics, drawn, *measured, "--out", both) == 0
    out = capsys.readouterr().out
    assert "10 prompts in common; 0 records stand in A alone, 0 in B alone" in out
    assert f"win rate of A by {name}: " in out
    assert "only one side has NLL" in out
    assert json.loads(Path(both).read_text())["prompts"] == 10
    assert run("compare", metrics, metrics) == 0
    assert "win rate of A by" in capsys.readouterr().out


def test_a_checkpoint_measured_twice(tmp_path: Path, model: str, references: str) -> None:
    files = []
    for name in ("a", "b"):
        out = tmp_path / name / "metrics.json"
        out.parent.mkdir()
        words = ("--references", references, "--model", model, "--max-new-tokens", "5", "--device", "cpu")
        assert run("eval", *words, "--out", str(out)) == 0
        metrics = json.loads(out.read_text())
        assert metrics["about"].pop("answers") == str(out.with_name("metrics.answers.jsonl"))
        files.append((metrics, out.with_name("metrics.answers.jsonl").read_bytes()))
    assert files[0] == files[1]


def test_a_checkpoint_measured_on_the_terminal(
    tmp_path: Path, model: str, references: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --out the same figures, and nothing is left behind."""
    words = ("eval", "--references", references, "--model", model, "--max-new-tokens", "5", "--device", "cpu")
    before = sorted(tmp_path.iterdir())
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "not kept      for want of --out: 10 answers, " in said
    assert sorted(tmp_path.iterdir()) == before
    assert run(*words, "--out", str(tmp_path / "m.json")) == 0
    table = capsys.readouterr().out.partition("\n\n")[2].partition("\n\nall figures")[0]
    assert "NLL of the best answer" in table
    assert said.partition("\n\n")[2].rstrip("\n") == table


@pytest.mark.parametrize("believed", [True, False])
def test_a_comparison_checks_a_reward_model_once(
    tmp_path: Path,
    reward_model: str,
    references: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    believed: bool,
) -> None:
    """One that is believed judges both sets of answers, one that is not is said to be not; as of each set alone."""
    prompts = [json.loads(line)["prompt"] for line in Path(references).read_text().splitlines()]
    files = []
    for name, answer in (("a", "a cat"), ("b", "a dog ran over the mat")):
        files.append(str(write(tmp_path / f"{name}.jsonl", [{"prompt": p, "answer": answer} for p in prompts])))
    if not believed:
        rows = [json.loads(line) for line in Path(references).read_text().splitlines()]
        for row in rows:
            row["completions"].reverse()
        references = str(write(tmp_path / "reversed.jsonl", rows))
    measured = ("--references", references, "--reward-model", reward_model, "--device", "cpu")
    for path in files:
        assert run("eval", path, *measured, "--out", f"{path}.json") == 0
    capsys.readouterr()
    assert run("compare", f"{files[0]}.json", f"{files[1]}.json") == 0
    apart = capsys.readouterr().out.splitlines()[2:]
    counted, real = [], rewards.check_reward_model
    monkeypatch.setattr(report, "check_reward_model", lambda *a, **k: counted.append(a) or real(*a, **k))
    assert run("compare", *files, *measured) == 0
    assert capsys.readouterr().out.splitlines()[2:] == apart
    assert len(counted) == 1
    assert ("win rate of A by" in "\n".join(apart)) == believed
    assert ("no rewards of" in "\n".join(apart)) != believed


def test_the_marker_of_a_run_of_coh(tmp_path: Path, references: str, capsys: pytest.CaptureFixture[str]) -> None:
    spread(make_model(len(TOKENIZER))).save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"objective": "coh"}, "data": {}}))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("default", "none", "given")}
    for name, words in {
        "default": (),
        "none": ("--answer-prefix", ""),
        "given": ("--answer-prefix", "A helpful answer:"),
    }.items():
        assert run("generate", str(tmp_path / "run"), references, files[name], "--max-new-tokens", "5", *words) == 0
        said = (
            "every answer begins with 'A helpful answer:' (the model was trained behind it)" in capsys.readouterr().out
        )
        assert said == (name == "default")
    contents = {name: Path(path).read_bytes() for name, path in files.items()}
    assert contents["default"] == contents["given"] != contents["none"]


def test_refusals_are_one_sentence(
    tmp_path: Path, model: str, references: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = str(write(tmp_path / "answers.jsonl", [{"prompt": "elsewhere", "answer": "x"}]))
    out = str(tmp_path / "out.jsonl")
    cases = {
        "--seed: expected none with temperature 0": ("generate", model, references, out, "--seed", "1"),
        "--top-p: expected 1 with temperature 0": ("generate", model, references, out, "--top-p", "0.5"),
        "--max-new-tokens: expected a positive": ("generate", model, references, out, "--max-new-tokens", "0"),
        "--batch-size: expected a positive": ("generate", model, references, out, "--batch-size", "0"),
        "exists already; expected a new file, or --overwrite": ("generate", model, references, answers),
        "no such folder": ("generate", str(tmp_path / "nothing"), references, out),
        "--references: expected a file of ranked responses": ("eval", answers),
        "ANSWERS: expected a file of answers, or --model": ("eval", "--references", references),
        "--resume: expected --out, whose": ("eval", "--references", references, "--model", model, "--resume"),
        "--overwrite: expected --out": ("eval", answers, "--references", references, "--overwrite"),
        "--overwrite: expected --out, ": ("compare", answers, answers, "--references", references, "--overwrite"),
        "--overwrite: expected --html": ("inspect", references, "--overwrite"),
        "--temperature: expected none beside ANSWERS": (
            *("eval", answers, "--references", references, "--temperature", "1"),
        ),
        "--dtype: expected none without a model": ("eval", answers, "--references", references, "--dtype", "float16"),
        "--reward-check: expected a --reward-model": (
            *("eval", answers, "--references", references, "--reward-check", references),
        ),
        "--reward-model: expected each once": (
            *("eval", answers, "--references", references, "--reward-model", "x/", "--reward-model", "x/"),
        ),
        "--references: expected records for the prompts of the answers": ("eval", answers, "--references", references),
        "--reward-margin: expected": (
            *("eval", answers, "--references", references, "--model", model, "--reward-margin", "-1"),
        ),
        "--references: expected a file to measure the answers in": ("compare", answers, answers),
        f"{model}: expected a file of answers or figures, got a model; clha-fast eval --model {model}": (
            *("compare", model, answers),
        ),
    }
    for words, command in cases.items():
        assert cli.main(list(command)) == cli.USER_ERROR, command
        captured = capsys.readouterr()
        assert words in captured.err, command
        assert captured.err.count("\n") == 1
    (tmp_path / "m.json").write_text(json.dumps({"values": {}, "prompts": [], "subsets": [], "references": []}))
    metrics = str(tmp_path / "m.json")
    assert cli.main(["compare", metrics, metrics, "--references", references]) == cli.USER_ERROR
    assert "expected none beside two files of metrics" in one_sentence(capsys)


def test_ctrl_c_says_what_is_kept(
    tmp_path: Path, model: str, references: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clha_fast.generation import decoding

    calls = []
    real = decoding.generate_tokens

    def interrupt(*words: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*words, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "generate_tokens", interrupt)
    out = str(tmp_path / "out.jsonl")
    words = ("generate", model, references, out, "--batch-size", "4", "--max-new-tokens", "3")
    assert run(*words) == 130
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"interrupted; 8 of 10 prompts are answered and kept in {out}.partial, --resume goes on")
    )
    assert run(*words) == cli.USER_ERROR
    assert run(*words, "--resume") == 0
    assert "8 prompts had been answered before" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["scipy", "nltk", "sacrebleu"])
def test_a_missing_package_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    given, out = str(write(tmp_path / "a.jsonl", make_rows(2))), str(tmp_path / "m.json")
    for words in (
        ["eval", given, "--references", given],
        ["eval", "--model", str(tmp_path / "none"), "--references", given, "--out", out],
        ["compare", given, given, "--references", given],
        ["table2", "--config", str(tmp_path / "table.yaml")],
    ):
        if words[0] == "table2":
            files = {"train": given, "dev": "b", "test": "c"}
            config = {"output_dir": str(tmp_path / "out"), "data": {2: files}, "base": "x", "methods": ["sft"]}
            (tmp_path / "table.yaml").write_text(json.dumps(config))
        assert run(*words) == cli.USER_ERROR
        said = one_sentence(capsys)
        wanted = f"measuring answers: {package} is not installed; pip install 'clha-fast[eval]' brings it"
        assert said == f"clha-fast {words[0]}: {wanted}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "table.yaml"]
