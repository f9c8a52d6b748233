"""From raw transcripts to the paper's table, by commands alone."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clha_fast.cli.main import main
from clha_fast.data import read_records
from clha_fast.data.split import prompt_key
from clha_fast.evaluation.likelihood import candidate_scores
from clha_fast.models.loading import load_model, load_tokenizer
from tests.support.raw_transcripts import DISAGREE, row

for package in ("scipy", "nltk", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed (the eval extra)")

MODEL = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96},
}
MARKER = "A helpful answer:"


def raw_folder(folder: Path) -> tuple[int, int]:
    """The bundled questions as raw transcripts of two subsets; how many train, how many test."""
    text = resources.files("clha_fast").joinpath("demo/ranked_demo.jsonl").read_text("utf-8")
    records = [json.loads(line) for line in text.splitlines()][:44]
    pairs = [row(r["prompt"], good=r["completions"][0], bad=r["completions"][-1]) for r in records]
    for subset, own in (("harmless-base", pairs[::2]), ("helpful-base", pairs[1::2])):
        place = folder / subset
        place.mkdir(parents=True)
        lines = "".join(json.dumps(pair) + "\n" for pair in [*own[:17], DISAGREE])
        (place / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (place / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in own[17:]))
    return 34, 10


def configuration(tmp_path: Path) -> str:
    parts = {name: str(tmp_path / "ranked" / f"{name}.jsonl") for name in ("train", "dev", "test")}
    begin = {"num_train_epochs": 1, "learning_rate": 5e-3, "max_length": 64, "per_device_train_batch_size": 8}
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "data": {2: parts},
        "base": {"pretrain": {"model_config": MODEL, "build_tokenizer": {"vocab_size": 300}, **begin}},
        "methods": ["sft", "coh", {"name": "clha", "preset": "paper", "noise_rule": "none"}],
        "checkpoints": {"LLaMA": str(tmp_path / "not" / "there")},
        "learning_rates": [1e-3],
        "budget_tokens": 500,
        "settings": {"per_device_train_batch_size": 4, "max_length": 64},
        "generation": {"max_new_tokens": 4, "max_prompt_length": 32},
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def test_from_raw_transcripts_to_the_papers_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = raw_folder(tmp_path / "raw")
    assert main(["prepare", "hh-rlhf", str(tmp_path / "raw"), str(tmp_path / "ranked"), "--dev", "6"]) == 0
    out = capsys.readouterr().out
    assert "2  the transcripts disagree before the last turn (first: " in out
    parts = {name: read_records(tmp_path / "ranked" / f"{name}.jsonl") for name in ("train", "dev", "test")}
    assert {name: len(records) for name, records in parts.items()} == {"train": train - 6, "dev": 6, "test": test}
    prompts = [prompt_key(record) for records in parts.values() for record in records]
    assert len(set(prompts)) == train + test  # no prompt in two of them

    # A path that is not there is a row of its own, named; the others stand.
    assert main(["table2", "--config", configuration(tmp_path)]) == 1
    assert "1 of 5 rows lack cells" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {line["method"]: line for line in found["rows"]}
    assert [name for name, line in rows.items() if "error" in line] == ["LLaMA"]
    assert sorted(found["subsets"]) == ["harmless_base", "helpful_base"]
    table = (tmp_path / "out" / "table.md").read_text()
    for name, line in rows.items():
        assert ("figures" in line) == (name != "LLaMA")
        if name == "LLaMA":
            continue
        figures = line["figures"]
        # Five prompts each: the mean over prompts is that of the subsets' here, and each adds up to it.
        for figure in ("bleu", "words"):
            of_subsets = [figures[subset][figure]["value"] for subset in found["subsets"]]
            assert figures["Total"][figure]["value"] == pytest.approx(sum(of_subsets) / 2)
        assert 0 < figures["Total"]["nll"]["value"] < 20
    assert "harmless_base: BLEU over characters (published)" in table

    # Chain of Hindsight is asked with its good marker, and measured behind it; nobody else is.
    prefixes = {}
    for path in (tmp_path / "out" / "cells").glob("*/test-*/metrics.json"):
        method = path.parent.parent.name.partition("-")[0]
        prefixes[method] = json.loads(path.read_text())["about"]["answer_prefix"]
        if method == "coh":
            folder = str(path.parent.parent / "model")
            model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
            scores, lengths = candidate_scores(model, tokenizer, parts["test"], answer_prefix=MARKER)
            nll = -sum(s[0] * n[0] for s, n in zip(scores, lengths, strict=True)) / sum(n[0] for n in lengths)
            assert rows["coh"]["figures"]["Total"]["nll"]["value"] == pytest.approx(nll, rel=1e-5)
    assert prefixes == {"base": "", "sft": "", "clha": "", "coh": MARKER}
