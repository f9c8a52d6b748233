"""Files of answers: in order, resumable to the byte, and refused where they are another run's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clha_fast.data import RecordError, read_records
from clha_fast.data.prompts import PromptRecord, prompt_hash
from clha_fast.generation import (
    Answer,
    GenerationError,
    GenerationInterrupted,
    GenerationSettings,
    TransformersBackend,
    generate_answers,
    load_backend,
    read_answers,
    trained_lead,
    trained_prefix,
    write_answers,
)
from tests.support import forked
from tests.support.reward_models import spread, write
from tests.support.scripted import saying
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
SHORT = GenerationSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    spread(make_model(len(TOKENIZER))).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def backend(folder: str) -> TransformersBackend:
    return load_backend(folder, device="cpu")


def test_a_file_in_the_order_of_its_prompts(tmp_path: Path, backend: TransformersBackend) -> None:
    source = write(
        tmp_path / "in.jsonl", [*make_rows(9), {"prompt": "wü 猫", "completions": ["x", "y"]}, make_rows(1)[0]]
    )
    records = read_records(source)
    out = tmp_path / "out.jsonl"
    found = generate_answers(records, backend, out, SHORT, batch_size=4, progress=False)
    lines = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == [record.prompt for record in records]
    assert lines[0] == lines[10], "the same prompt, answered once"
    assert [list(line) for line in lines] == [["prompt", "answer", "finish", "prompt_hash"]] * 11
    assert [line["prompt_hash"] for line in lines] == [prompt_hash(record) for record in records]
    assert os.listdir(tmp_path) == ["in.jsonl", "out.jsonl"] or sorted(os.listdir(tmp_path)) == [
        "in.jsonl",
        "out.jsonl",
    ]
    assert (found.resumed, found.cut, found.unfinished) == (0, 0, sum(line["finish"] == "length" for line in lines))
    assert read_answers(out) == found.answers
    alone = tmp_path / "alone.jsonl"
    generate_answers(records, backend, alone, SHORT, batch_size=1, progress=False)
    assert alone.read_bytes() == out.read_bytes()


def test_empty_answers_are_kept_and_counted(tmp_path: Path) -> None:
    prompt = "Human: a dog\n\nAssistant:"
    model = saying(TOKENIZER, "Human: hi", len(TOKENIZER(prompt)["input_ids"]))
    records = [PromptRecord(prompt, subset="s")]
    found = generate_answers(records, TransformersBackend(model, TOKENIZER), tmp_path / "o", progress=False)
    assert (found.empty, found.unfinished) == (1, 0)
    assert json.loads((tmp_path / "o").read_text())["subset"] == "s"
    assert read_answers(tmp_path / "o")[0] == Answer(prompt, "", "stop", "s")


SLOW_CHILD = """
import sys, time
from clha_fast.data import read_records
from clha_fast.generation import GenerationSettings, generate_answers, load_backend
backend = load_backend(sys.argv[1], device="cpu")
backend.model.register_forward_hook(lambda *_: time.sleep(0.02))
settings = GenerationSettings(max_new_tokens=6, temperature=float(sys.argv[4]))
generate_answers(read_records(sys.argv[2]), backend, sys.argv[3], settings, batch_size=2)
"""


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path: Path, folder: str, temperature: float) -> None:
    settings = GenerationSettings(max_new_tokens=6, temperature=temperature)
    source = write(tmp_path / "in.jsonl", make_rows(24))
    records = read_records(source)
    whole, out, partial = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.partial"))
    generate_answers(records, load_backend(folder, device="cpu"), whole, settings, batch_size=2, progress=False)

    words = [folder, str(source), str(out), str(temperature)]
    process = forked.start("train", "-c", SLOW_CHILD, *words, out=tmp_path / "said")
    try:
        end = time.monotonic() + 120
        while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, "the child ended by itself"
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with open(partial, "ab") as file:  # a kill in the middle of a write leaves half a line
        file.write(b'{"batch": 9, "answ')
    kept = partial.read_bytes()
    done = kept.count(b"\n") - 1
    assert done < 12

    # The same model in another folder is the same model.
    backend = load_backend(shutil.copytree(folder, tmp_path / "moved"), device="cpu")

    def again(records: Any = records, settings: GenerationSettings = settings, batch_size: int = 2, **more: Any) -> Any:
        return generate_answers(
            records, more.get("backend", backend), out, settings, batch_size=batch_size, resume=True, progress=False
        )

    changed = GenerationSettings(max_new_tokens=7, temperature=temperature)
    refused: dict[str, dict[str, Any]] = {
        r"\(max_new_tokens was 6, is 7\)": {"settings": changed},
        r"\(batch_size was 2, is 3\)": {"batch_size": 3},
        r"\(prompts changed; tokenizer or template changed\)": {"records": records[:-1]},
    }
    for words, call in refused.items():
        with pytest.raises(ValueError, match=f"resume: expected the run .* {words}"):
            again(**call)
    other = load_backend(folder, device="cpu")
    with torch.no_grad():
        other.model.model.norm.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"another \(model changed\)"):
        again(backend=other)
    assert partial.read_bytes() == kept

    found = again()
    assert found.resumed == 2 * done
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interrupted_and_resumed(tmp_path: Path, folder: str, temperature: float) -> None:
    """By Ctrl-C. A seed makes another run only where something is drawn."""
    backend = load_backend(folder, device="cpu")
    records, out = [PromptRecord(f"say {k}") for k in range(6)], tmp_path / "out.jsonl"
    settings, seeded = (GenerationSettings(max_new_tokens=6, temperature=temperature, seed=k) for k in (0, 3))
    whole = tmp_path / "whole.jsonl"
    generate_answers(records, backend, whole, settings, batch_size=2, progress=False)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    hook = backend.model.register_forward_hook(interrupt)
    kept = r"interrupted; 2 of 6 prompts are answered and kept in .*out.jsonl.partial, resume=True"
    with pytest.raises(GenerationInterrupted, match=kept):
        generate_answers(records, backend, out, settings, batch_size=2, progress=False)
    hook.remove()
    assert not out.exists()
    if temperature:
        with pytest.raises(ValueError, match=r"\(seed was 0, is 3\)"):
            generate_answers(records, backend, out, seeded, batch_size=2, resume=True, progress=False)
        seeded = settings
    assert generate_answers(records, backend, out, seeded, batch_size=2, resume=True, progress=False).resumed == 2
    assert out.read_bytes() == whole.read_bytes()


def test_destinations_and_memory(tmp_path: Path, folder: str) -> None:
    backend = load_backend(folder, device="cpu")
    records, out = [PromptRecord("a dog")], tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        generate_answers(records, backend, out, SHORT)
    assert out.read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        generate_answers(records, backend, tmp_path / "no" / "out.jsonl", SHORT)
    with pytest.raises(RecordError, match="prompts: expected at least one"):
        generate_answers([], backend, tmp_path / "new.jsonl", SHORT)
    with pytest.raises(ValueError, match="batch_size: expected a positive whole number, got 0"):
        generate_answers(records, backend, tmp_path / "new.jsonl", SHORT, batch_size=0)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    hook = backend.model.register_forward_hook(full)
    with pytest.raises(
        GenerationError, match=r"batch_size: 1 prompts of up to \d+ tokens .* do not fit in memory; none of 1"
    ):
        generate_answers(records, backend, tmp_path / "new.jsonl", SHORT, progress=False)
    hook.remove()
    assert os.listdir(tmp_path) == ["out.jsonl"]
    generate_answers(records, backend, out, SHORT, overwrite=True, progress=False)
    assert len(read_answers(out)) == 1


def test_reading_what_others_wrote(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "answer": "x"},
        {"prompt": chat, "answer": "", "finish": "length", "subset": "s", "chat_template_kwargs": {"k": 1}},
    ]
    found = read_answers(write(tmp_path / "a.jsonl", rows))
    assert found == [Answer("a", "x"), Answer(tuple(chat), "", "length", "s", {"k": 1})]
    assert found[1].prompt_hash != prompt_hash(PromptRecord(tuple(chat)))
    write_answers(tmp_path / "b.jsonl", found)
    assert read_answers(tmp_path / "b.jsonl") == found
    with pytest.raises(FileExistsError):
        write_answers(tmp_path / "b.jsonl", found)
    bad = {
        r"c\.jsonl:1: text: expected fields prompt, answer": {"prompt": "a", "text": "x"},
        r"c\.jsonl:1: score: expected fields prompt, answer": {"prompt": "a", "answer": "x", "score": 1.0},
        r"c\.jsonl:1: finish: expected one of stop, length, got 'eos'": {"prompt": "a", "answer": "x", "finish": "eos"},
        r"c\.jsonl:1: answer: expected a text, got None": {"prompt": "a", "answer": None},
        r"c\.jsonl:1: prompt_hash: expected [0-9a-f]{16}": {"prompt": "a", "answer": "x", "prompt_hash": "00"},
    }
    for words, row in bad.items():
        with pytest.raises(RecordError, match=words):
            read_answers(write(tmp_path / "c.jsonl", [row]))
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(RecordError, match="expected at least one answer"):
        read_answers(tmp_path / "d.jsonl")


def test_a_run_of_coh_has_its_marker_in_front(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert trained_prefix(tmp_path) == trained_prefix("a/name") == ""
    for settings, prefix in (
        ({"objective": "coh"}, "A helpful answer:"),
        ({"objective": {"name": "coh", "good_marker": "Good:"}}, "Good:"),
        ({"objective": "pro"}, ""),
        ({"margin": 1.0}, ""),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"settings": settings, "data": {}}))
        assert trained_prefix(tmp_path) == trained_prefix(checkpoint) == prefix
    (tmp_path / "run.json").write_text("{")
    assert trained_prefix(tmp_path) == ""


@pytest.mark.parametrize("name", ["model", "checkpoint-x", "my-checkpoint-3", "gpt2"])
def test_a_run_around_another_model_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    note = {"settings": {"objective": "coh"}, "data": {}, "lead": "<think>"}
    (tmp_path / "run.json").write_text(json.dumps(note))
    monkeypatch.chdir(tmp_path)
    assert (trained_prefix(name), trained_lead(name)) == ("", None)  # a name on the Hub
    (tmp_path / name).mkdir()
    assert (trained_prefix(tmp_path / name), trained_lead(name)) == ("", None)
    (tmp_path / "checkpoint-12").mkdir()
    assert (trained_prefix("checkpoint-12"), trained_lead(tmp_path / "checkpoint-12")) == (
        "A helpful answer:",
        "<think>",
    )


def test_answers_that_are_not_kept(tmp_path: Path, folder: str) -> None:
    backend = load_backend(folder, device="cpu")
    records = [PromptRecord(f"say {k}") for k in range(3)]
    answers = generate_answers(records, backend, tmp_path / "kept.jsonl", SHORT, progress=False).answers
    assert generate_answers(records, backend, None, SHORT, progress=False).answers == answers
    assert os.listdir(tmp_path) == ["kept.jsonl"]
    with pytest.raises(ValueError, match="destination: expected a file to resume, got None"):
        generate_answers(records, backend, None, SHORT, resume=True)
