"""A whole comparison in miniature, on a real tokenizer, models and reward models: killed, resumed, failing, on Ray."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from transformers.utils import logging

from clha_fast.cli.main import main
from clha_fast.evaluation import spread
from clha_fast.experiments.bases import ready_base
from clha_fast.experiments.comparison import parse_comparison
from clha_fast.experiments.table import Table
from tests.support import forked
from tests.support.command_line import one_sentence
from tests.support.helpers import ROOT

for package in ("scipy", "nltk", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed (the eval extra)")

GOOD = ("the kettle sings softly", "a warm loaf rises slowly", "the river bends past mills")
BAD = ("no", "what what what what", "nothing here at all")
MODEL = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96},
}
PRETRAIN = {
    "pretrain": {
        **{"model_config": MODEL, "build_tokenizer": {"vocab_size": 300}, "max_length": 64, "eval_fraction": 0.1},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 5e-3},
    }
}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Most of these tests' time went to intervals, which tests/evaluation/test_results.py has."""
    monkeypatch.setattr(spread, "RESAMPLES", 100)


def write(path: Path, start: int, count: int, size: int) -> str:
    lines = []
    for number in range(start, start + count):
        texts = [f"{GOOD[number % 3]} {number}", f"{BAD[number % 3]} {number}", f"{BAD[(number + 1) % 3]} zzz"]
        record = {"prompt": f"question {number}?", "completions": texts[:size], "rewards": [4.0, -1.0, -5.0][:size]}
        lines.append(json.dumps({**record, "subset": "even" if number % 2 == 0 else "odd"}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def given(tmp_path):
    data = {}
    for size in (2, 3):
        parts = {"train": (0, 24), "dev": (100, 6), "test": (200, 8)}
        data[size] = {name: write(tmp_path / f"{name}{size}.jsonl", *part, size) for name, part in parts.items()}
    train = {"num_train_epochs": 4, "learning_rate": 5e-3, "max_length": 64, "per_device_train_batch_size": 8}
    return {
        "output_dir": str(tmp_path / "out"),
        "data": data,
        "base": PRETRAIN,
        "methods": ["sft", {"name": "clha", "preset": "paper", "reward_margin": "q0"}],
        "seeds": [1, 2],
        "learning_rates": [1e-3, 1e-2],
        "budget_tokens": 600,
        "reward_models": {"label": {"train": train}, "evaluation": {"train": train}},
        "settings": {"per_device_train_batch_size": 4},
        "generation": {"max_new_tokens": 6, "max_prompt_length": 32},
        "evaluation": {"reward_margin": 0.0},
    }


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory) -> str:
    """A base model that is there already, for tests that ask nothing of its training."""
    folder = tmp_path_factory.mktemp("base")
    data = {2: {name: write(folder / f"{name}.jsonl", 0, 24, 2) for name in ("train", "dev", "test")}}
    comparison = {"output_dir": str(folder / "out"), "data": data, "base": PRETRAIN, "methods": ["sft"]}
    return ready_base(parse_comparison(comparison), lambda text: None)


def run(given) -> Table:
    table = Table(parse_comparison(given))
    table.run()
    table.write()
    return table


def result(folder: str) -> dict[str, bytes]:
    """What a comparison says, by name: tables, and every cell's metrics and answers."""
    root = Path(folder)
    kept = ("metrics.json", "answers.jsonl", "trained.json", "cell.json")
    files = [path for path in root.rglob("*") if path.name in kept and "model" not in path.relative_to(root).parts]
    files += [root / name for name in ("table.md", "table.csv", "table.json")]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}


def small(given, **changes):
    """One ranking length, one seed, no learning rate to choose, no reward model, so seconds."""
    return {
        **given,
        **{"data": {2: given["data"][2]}, "seeds": [1], "learning_rates": [1e-3], "reward_models": {}},
        **changes,
    }


@pytest.mark.slow
def test_from_records_to_the_papers_table(given, tmp_path):
    table = run(given)
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {(row["length"], row["method"]): row for row in found["rows"]}
    assert set(rows) == {(n, m) for n in ("2", "3") for m in ("base", "sft", "clha")}
    assert not [row for row in found["rows"] if "error" in row]
    assert found["subsets"] == ["even", "odd"]
    for (_, method), row in rows.items():
        total = row["figures"]["Total"]
        assert {"bleu", "nll", "accuracy", "tau", "words", "corpus_bleu"} <= set(total)
        if method != "base":
            assert set(row["trials"]) == {"0.001", "0.01"}
            assert row["seeds"] == [1, 2]
            assert len(total["accuracy"]["seeds"]) == 2
            # To the next step: 4 prompts of at most 2 or 3 answers of at most 30 tokens.
            assert abs(row["scored_tokens"] - 600) < 4 * 3 * 30
        assert total["accuracy"]["low"] <= total["accuracy"]["value"] <= total["accuracy"]["high"]
    assert rows["2", "clha"]["figures"]["Total"]["accuracy"]["value"] > 0.75
    text = (tmp_path / "out" / "table.md").read_text()
    assert "even: BLEU over characters (published)" in text
    assert table.assessor.criterion in text
    before = result(given["output_dir"])
    run(given)
    assert result(given["output_dir"]) == before


def test_a_second_run_finds_what_is_done_and_other_settings_are_measured_anew(given, tmp_path):
    given = small(given, methods=["sft"])
    run(given)
    before = result(given["output_dir"])
    models = {path: path.stat().st_mtime_ns for path in Path(given["output_dir"]).rglob("model.safetensors")}
    run(given)
    assert result(given["output_dir"]) == before
    run({**given, "generation": {"max_new_tokens": 3}})
    assert {path: path.stat().st_mtime_ns for path in models} == models
    tests = [path for path in Path(given["output_dir"]).rglob("test-*") if path.is_dir()]
    assert len(tests) == 4  # base and sft, under two settings


@pytest.mark.parametrize(
    "inside",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["between cells", "inside a training"],
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(given, trained_base, tmp_path, inside):
    given = small(given, methods=given["methods"][1:], seeds=[1, 2])
    if inside:
        given |= {"base": trained_base, "seeds": [1]}
        given["settings"] = {**given["settings"], "save_strategy": "steps", "save_steps": 1}
    run(given)
    whole = result(given["output_dir"])
    other = {**given, "output_dir": str(tmp_path / "killed")}
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(other))
    program = forked.start("train", "clha_fast", "table2", "--config", str(config), out=tmp_path / "said")
    out, begun = tmp_path / "said.out", "cell 1/" if inside else "cell 2/"
    while program.poll() is None and not (out.exists() and begun in out.read_text()):
        time.sleep(0.01)
    while inside and program.poll() is None and not list((tmp_path / "killed").glob("cells/*/model/checkpoint-*")):
        time.sleep(0.01)
    program.kill()
    assert program.wait() == -signal.SIGKILL, (tmp_path / "said.err").read_text()
    assert bool(list((tmp_path / "killed").glob("cells/*/model/checkpoint-*"))) == inside
    assert not (tmp_path / "killed" / "table.md").exists()
    run(other)
    assert result(other["output_dir"]) == whole


def test_what_chooses_is_said_with_its_empty_answers(given, trained_base, tmp_path, capsys):
    """Every letter ends an answer, so all are empty and the rewards that choose are 0; the model's own check beside."""
    letters = [chr(code) for code in range(33, 127)]
    given["generation"] = {**given["generation"], "stop": letters, "max_new_tokens": 2}
    label = {"train": {**given["reward_models"]["label"]["train"], "num_train_epochs": 6}}
    given = small(
        given, base=trained_base, methods=["sft"], learning_rates=[1e-3, 1e-2], reward_models={"label": label}
    )
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({**given, "criterion": "reward"}))
    assert main(["table2", "--config", str(tmp_path / "table.yaml")]) == 0
    out = capsys.readouterr().out
    assert "trial 1/2  SFT, n = 2, seed 1, learning rate 0.001: dev 0, 100.0% of the answers empty  (" in out
    assert "BLEU 0.00" in out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    empty = [note for note in table["notes"] if "empty answers, whose reward is 0" in note]
    assert len(empty) == 1
    assert "learning rate 0.001: 100.0%; SFT, n = 2, seed 1, learning rate 0.01: 100.0%." in empty[0]
    own = next(tmp_path.rglob("reward_model.json"))
    said = json.loads(own.read_text())
    checked = {name: said[name] for name in ("accuracy", "interval", "prompts")}
    assert table["reward_models"]["label"]["trained"] == checked
    assert f"Its training found {said['accuracy']:.3f}" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("rates", [[1e-3], [1e-3, 1e-2]])
def test_one_bad_cell_is_named_and_does_not_lose_the_others(given, trained_base, tmp_path, capsys, rates):
    """Where it is trained, and already where its learning rate is chosen."""
    bad = {"name": "bad", "label": "no such thing", "objective": "dpo", "reference": str(tmp_path / "no_such_model")}
    given = small(given, base=trained_base, methods=[bad, "sft"])
    given["learning_rates"] = rates
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(given))
    logging.enable_progress_bar()
    assert main(["table2", "--config", str(config)]) == 1
    assert logging.is_progress_bar_enabled()  # as it was, for what else this process does
    out, error = capsys.readouterr()
    assert "1 of 3 rows lack cells" in error
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert ["error" in row for row in rows] == [False, True, False]
    assert "no_such_model" in rows[1]["error"]
    where = "seed 1" if len(rates) == 1 else "learning rate 0.001"
    assert f"no such thing, n = 2: {where}: " in out
    assert rows[2]["seeds"] == [1]
    assert rows[2]["learning_rate"] in rates


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("rrhf", "expected records with rewards, which the objective 'rrhf' reads, got none in the first one"),
        ({"name": "clha", "reward_margin": "q0.25"}, "CLHA: reward_margin: expected records with rewards"),
        (
            {"name": "dpo", "reference": "file"},
            "expected records with reference_logps, which the objective 'dpo' reads",
        ),
    ],
)
def test_records_are_tried_before_anything_is_trained(given, tmp_path, method, said, capsys):
    given = small(given, methods=["sft", method], reward_models=None)
    for path in given["data"][2].values():
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
        Path(path).write_text("".join(json.dumps({**r, "rewards": None}) + "\n" for r in records))
    config = tmp_path / "table.yaml"
    config.write_text(yaml.safe_dump(given))
    assert main(["table2", "--config", str(config)]) == 2
    assert said in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ({"name": "sft", "optim": "no_such"}, {}, "SFT: optim: expected one of transformers' OptimizerNames"),
        ("clha", {"per_device_train_batch_size": 0}, "CLHA: per_device_train_batch_size: expected a whole number"),
        ({"name": "clha", "margin": "wide"}, {}, "CLHA: margin: expected"),
        (
            {"name": "dpo", "label": "mine", "objective": {"name": "dpo", "beta": -1}},
            {},
            "mine: objective.beta: expected a positive",
        ),
        ({"name": "clha", "reward_margin": "q0.5"}, {"warmup_steps": -1}, "CLHA: Got warmup_steps = -1"),
        ({"name": "rlhf"}, {"gradient_accumulation_steps": -1}, "RLHF: gradient_accumulation_steps: expected"),
    ],
)
def test_settings_are_tried_before_anything_is_trained(given, tmp_path, method, settings, said, capsys):
    rewards = {"label": "absent"} if method == {"name": "rlhf"} else {}
    given = small(given, methods=[method, "rrhf"], settings=settings, reward_models=rewards)
    config = tmp_path / "table.yaml"
    config.write_text(yaml.safe_dump(given))
    assert main(["table2", "--config", str(config)]) == 2
    assert said in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_files_that_settings_name_are_named(given, tmp_path, capsys):
    """Not JSON, no text, not there: a sentence, whatever the error."""
    for name, content in (("broken", b"{no"), ("bytes", b"\xff\xfe\x00"), ("absent", None)):
        path = tmp_path / f"{name}.json"
        if content is not None:
            path.write_bytes(content)
        config = tmp_path / "table.yaml"
        config.write_text(yaml.safe_dump(small(given, methods=["sft"], settings={"accelerator_config": str(path)})))
        assert main(["table2", "--config", str(config)]) == 2
        assert "clha-fast table2: SFT: " in one_sentence(capsys)


def test_a_table_that_is_there_is_made_where_it_could_not_be_trained(given, trained_base, tmp_path, monkeypatch):
    made = run(small(given, base=trained_base, methods=["sft"], generation={"max_new_tokens": 2}))
    monkeypatch.setattr("clha_fast.experiments.table.check_settings", lambda comparison: 1 / 0)
    again = run(small(given, base=trained_base, methods=["sft"], generation={"max_new_tokens": 2}))
    assert [row.as_dict() for row in again.rows] == [row.as_dict() for row in made.rows]


def test_what_dev_cannot_choose_is_said(given, trained_base, tmp_path):
    """One answer a record on dev: no pair is ordered, so no learning rate is better than another."""
    given = small(given, base=trained_base, methods=["sft"], learning_rates=[1e-3, 1e-2])
    given["data"][2]["dev"] = write(tmp_path / "one.jsonl", 300, 6, 1)
    base, sft = run(given).rows
    assert (base.failures, len(base.outcomes)) == ([], 1)
    assert sft.failures == ["no learning rate can be chosen: accuracy has no value on dev"]
    assert sft.outcomes == []


def test_the_command_line_changes_single_entries(given, trained_base, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(small(given, base=trained_base, methods=["sft"])))
    words = ["table2", "--config", str(config), "--output-dir", str(tmp_path / "elsewhere")]
    changes = ["settings.per_device_train_batch_size=8", "settings.save_steps=5", "test_limit=2"]
    assert main([*words, *(word for change in changes for word in ("--set", change))]) == 0
    out = capsys.readouterr().out
    unused = "Unused: save_steps: acts with save_strategy='steps', which is 'no' here; give both, or leave"
    assert out.startswith(unused), "before hours of training"
    assert out.count(unused) == 2, "and below the table"
    assert f"in {tmp_path / 'elsewhere'}: table.md" in out
    found = [json.loads(path.read_text()) for path in (tmp_path / "elsewhere").rglob("test-*/metrics.json")]
    assert [len(part["prompts"]) for part in found] == [4, 4]  # two of each subset
    assert main([*words, "--set", "setings.x=1"]) == 2
    assert "unknown key 'setings'; did you mean 'settings'?" in capsys.readouterr().err


def test_models_are_removed_where_asked(given, trained_base):
    given = small(given, base=trained_base, methods=["sft"], keep_models=False)
    run(given)
    before = result(given["output_dir"])
    assert not list(Path(given["output_dir"], "cells").rglob("model.safetensors"))
    run(given)
    assert result(given["output_dir"]) == before


@pytest.mark.parametrize(("command", "rows"), [("ablate", 5), ("noise", 9)])
def test_the_papers_claims_are_tested_against_one_method(given, trained_base, tmp_path, command, rows, capsys):
    given = small(given, base=trained_base, clha={"preset": "paper", "reward_margin": 0.5}, budget_tokens=200)
    del given["methods"]
    if command == "noise":
        given["rates"] = {"flips": [0.3], "rewards": [1.0]}
    config = tmp_path / "claims.yaml"
    config.write_text(yaml.safe_dump(given))
    assert main([command, "--config", str(config)]) == 0
    found = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert len(found) == rows + 1  # the base model
    differences = json.loads((tmp_path / "out" / "differences.json").read_text())
    assert len(differences) == {"ablate": 4, "noise": 6}[command]
    for row in differences:
        mine, other = (
            next(
                part["figures"]["Total"]["accuracy"]["value"]
                for part in found
                if (part["method"], part["corruption"]) == (method, row["corruption"])
            )
            for method in (row["method"], row["against"])
        )
        assert row["differences"]["accuracy"]["value"] == pytest.approx(mine - other, abs=1e-12)
    assert "differences.md" in capsys.readouterr().out


def test_the_rlhf_row_samples_its_answers_and_is_judged_by_the_label_model(given, trained_base):
    given = small({**given, "base": trained_base}, reward_models={"label": given["reward_models"]["label"]})
    given |= {"methods": ["rlhf"], "budget_tokens": 200}
    given["settings"] = {"per_device_train_batch_size": 4, "max_prompt_length": 32, "max_completion_length": 6}
    table = run(given)
    found = json.loads((Path(given["output_dir"]) / "table.json").read_text())["rows"][1]
    assert (found["label"], found["seeds"]) == ("RLHF", [1])
    # 200 tokens: 2 steps of 4 prompts with 4 answers of 6 tokens.
    assert table.rows[1].outcomes[0].trained["steps"] == 2
    log = table.rows[1].outcomes[0].trained["log"]
    assert any("reward" in line for line in log)
    before = result(given["output_dir"])
    run(given)
    assert result(given["output_dir"]) == before


@pytest.mark.slow
def test_ray_gives_the_same_bytes(given, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed (the ray extra)")
    given = small(given, seeds=[1, 2])
    run(given)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        other = {**given, "output_dir": str(tmp_path / "ray")}
        table = Table(parse_comparison(other), ray=True)
        table.run()
        table.write()
    finally:
        ray.shutdown()
    assert result(other["output_dir"]) == result(given["output_dir"])
