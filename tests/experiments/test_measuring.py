"""How cells are measured: where models run, how files are read, and what of an earlier run still holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clha_fast.evaluation import spread
from clha_fast.experiments import assess
from clha_fast.experiments.comparison import parse_comparison
from clha_fast.experiments.execution import gpus_a_task
from clha_fast.experiments.table import Table
from tests.support.reward_models import llama
from tests.support.tiny import make_model, make_tokenizer

for package in ("scipy", "nltk", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed (the eval extra)")

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A language model and a reward model, with random weights, in folders."""
    folder = tmp_path_factory.mktemp("models")
    made = {"base": make_model(len(TOKENIZER), num_hidden_layers=1), "judge": llama(num_hidden_layers=1)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "RESAMPLES", 50)


def records(start: int, count: int) -> list[dict[str, Any]]:
    """Best answer first."""
    return [
        {"prompt": f"question {n}?", "completions": [f"the cat sat {n}", f"no {n}"], "rewards": [4.0, -1.0 - n % 3]}
        for n in range(start, start + count)
    ]


def write(path: Path, rows: list[dict[str, Any]], *more: str) -> str:
    path.write_text("".join(f"{line}\n" for line in (*map(json.dumps, rows), *more)))
    return str(path)


@pytest.fixture
def given(tmp_path: Path, models: dict[str, str]) -> dict[str, Any]:
    """One ranking length and seed, one step of training."""
    parts = {"train": (0, 8), "dev": (100, 4), "test": (200, 5)}
    return {
        "output_dir": str(tmp_path / "out"),
        "data": {2: {name: write(tmp_path / f"{name}.jsonl", records(*part)) for name, part in parts.items()}},
        "base": models["base"],
        "learning_rates": [1e-2],
        "settings": {"per_device_train_batch_size": 4, "max_steps": 1},
        "generation": {"max_new_tokens": 2, "max_prompt_length": 32},
    }


def run(given: dict[str, Any]) -> Table:
    table = Table(parse_comparison(given))
    table.run()
    assert not [row.failures for row in table.rows if row.failures]
    table.write()
    return table


def total(table: Table, row: int = 0) -> dict[str, float]:
    return {name: found["value"] for name, found in table.rows[row].as_dict()["figures"]["Total"].items()}


@pytest.mark.parametrize("use_cpu", [False, True])
def test_models_and_judges_are_measured_where_models_train(given, models, monkeypatch, use_cpu):
    """On what find_device finds; a judge waits on the CPU while something trains."""
    asked, moved, loaded, real = [], [], [], assess.load_backend

    def find_device(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    def to(module: torch.nn.Module, *args: Any, **settings: Any) -> torch.nn.Module:
        if type(module).__name__ == "LlamaForSequenceClassification":
            moved.append(str(args[0]))
        return original(module, *args, **settings)

    original = torch.nn.Module.to
    assess._reward_model.cache_clear()
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(assess, "find_device", find_device)
    monkeypatch.setattr(assess, "load_backend", lambda path, **how: loaded.append(how) or real(path, **how))
    check = assess.check_reward_model  # whatever it says of five prompts, it is believed, so that it judges
    monkeypatch.setattr(assess, "check_reward_model", lambda *a: dataclasses.replace(check(*a), refused=""))
    given = {**given, "methods": ["sft"], "reward_models": {"evaluation": models["judge"]}}
    given["settings"] = {**given["settings"], "use_cpu": use_cpu}
    run({**given, "run": {"dtype": "float32", "attn_implementation": "eager"}})
    assert set(asked) >= {"cpu" if use_cpu else "auto"}
    assert ("auto" in asked) != use_cpu
    assert [how["device"] for how in loaded] == ["cpu", "cpu"]
    assert {(how["dtype"], how["attn_implementation"]) for how in loaded} == {("float32", "eager")}
    # Loaded to the CPU; then there and back for its check and for two rows.
    assert moved == ["cpu"] + 3 * ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("cluster", "use_cpu", "expected"),
    [({"CPU": 4.0}, False, 0), ({"GPU": 2.0}, False, 1), ({"GPU": 2.0}, True, 0), ({"GPU": 0.5}, False, 0)],
)
def test_a_ray_task_asks_for_a_gpu_where_there_is_one(cluster, use_cpu, expected):
    assert gpus_a_task(cluster, use_cpu) == expected
