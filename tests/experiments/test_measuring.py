"""How cells are measured: where models run, how files are read, and what of an earlier run still holds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clha_fast.evaluation import spread
from clha_fast.experiments import assess, cells
from clha_fast.experiments.cells import Cell, model_of, train_cell
from clha_fast.experiments.claims import noise
from clha_fast.experiments.comparison import parse_comparison
from clha_fast.experiments.contents import with_contents
from clha_fast.experiments.corruption import Corruption
from clha_fast.experiments.execution import gpus_a_task
from clha_fast.experiments.run import Run
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


def configuration(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    """One ranking length and seed, one step of training."""
    parts = {"train": (0, 8), "dev": (100, 4), "test": (200, 5)}
    return {
        "output_dir": str(folder / "out"),
        "data": {2: {name: write(folder / f"{name}.jsonl", records(*part)) for name, part in parts.items()}},
        "base": models["base"],
        "learning_rates": [1e-2],
        "settings": {"per_device_train_batch_size": 4, "max_steps": 1},
        "generation": {"max_new_tokens": 2, "max_prompt_length": 32},
    }


@pytest.fixture
def given(tmp_path: Path, models: dict[str, str]) -> dict[str, Any]:
    return configuration(tmp_path, models)


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


def weights(table: Table, row: int = -1) -> dict[str, torch.Tensor]:
    """Of a trained row."""
    cell = table.rows[row].outcomes[0].cell
    return load_file(Path(model_of(table.comparison, cell, table.base), "model.safetensors"))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def worst_first(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, **{name: row[name][::-1] for name in ("completions", "rewards")}}


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["prompt"], "completions": row["completions"], "rewards": row["rewards"]}


OTHERWISE = {
    "worst first": (worst_first, (), {"rank_by_reward": True}),
    "other columns, bad lines": (
        renamed,
        ('{"question": "x"}', "[]"),
        {"columns": {"prompt": "question"}, "skip_bad_records": True},
    ),
}
PRETRAIN = {
    **{"model_config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}},
    **{"build_tokenizer": {"vocab_size": 280}, "max_length": 64, "max_steps": 1, "eval_fraction": 0.2},
}
PRETRAIN["model_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96}
JUDGE = {"train": {"max_steps": 1, "max_length": 64, "eval_fraction": 0.2, "learning_rate": 1e-3}}


def of_everything(given: dict[str, Any]) -> tuple[dict[str, float], dict[str, float], list[dict[str, torch.Tensor]]]:
    """Figures of two rows, weights of a table's reward model and of what it trained from a base of its own."""
    table = run({**given, "methods": ["sft"], "base": {"pretrain": PRETRAIN}, "reward_models": {"evaluation": JUDGE}})
    judge = load_file(Path(table.reward_models["evaluation"], "model.safetensors"))
    return total(table), total(table, 1), [judge, weights(table)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "RESAMPLES", 50)
        given = configuration(tmp_path_factory.mktemp("plain"), models)
        return of_everything(given)


@pytest.mark.parametrize("name", OTHERWISE)
def test_files_are_read_alike_by_all_that_reads_them(given, plain, name):
    change, bad, options = OTHERWISE[name]
    for path in given["data"][2].values():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        write(Path(path), [change(row) for row in rows], *bad)
    base, trained, models = of_everything({**given, "run": options})
    assert (base, trained) == plain[:2]
    assert all(same(one, other) for one, other in zip(models, plain[2], strict=True))
    text = Path(given["output_dir"], "table.md").read_text()
    assert text.count(" that are left out: ") == (3 if bad else 0)
    if bad:
        assert f"Malformed records of dev (n = 2) that are left out: {len(bad)}." in text


def test_a_bad_record_names_the_way_out_of_a_table(given):
    write(Path(given["data"][2]["dev"]), records(100, 4), '{"prompt": "x", "completions": 3}')
    with pytest.raises(ValueError, match="skip_bad_records: true in run leaves it out"):
        run(given)


@pytest.mark.parametrize("kind", ["flips", "rewards"])
def test_what_is_ranked_and_then_corrupted_is_trained_on_as_it_was_corrupted(given, kind):
    """A file that stands the other way round is, ranked by reward, the same as the ranked one: clean and corrupted."""
    found = []
    for options in ({}, {"rank_by_reward": True}):
        comparison = parse_comparison({**given, "methods": ["sft"], "run": options})
        cell = Cell(comparison.methods[0], "2", comparison.data["2"], 1, 1e-2)
        for corruption in (None, Corruption(kind, 1.0)):
            one = dataclasses.replace(cell, corruption=corruption)
            train_cell(comparison, one, given["base"])
            found.append(load_file(Path(model_of(comparison, one, given["base"]), "model.safetensors")))
        rows = [json.loads(line) for line in Path(cell.files.train).read_text().splitlines()]
        write(Path(cell.files.train), [worst_first(row) for row in rows])
    clean, corrupted, clean_again, corrupted_again = found
    assert same(clean, clean_again)
    assert same(corrupted, corrupted_again)
    assert same(clean, corrupted) == (kind == "rewards")  # noise that exchanges no two answers of this file


def test_rollouts_take_the_good_prompts_of_a_ranked_file(given, models):
    write(Path(given["data"][2]["train"]), records(0, 8), "[]")
    given["settings"] |= {"max_prompt_length": 32, "max_completion_length": 2}
    options = {"rank_by_reward": True, "skip_bad_records": True}
    table = run({**given, "methods": ["rlhf"], "reward_models": {"label": models["judge"]}, "run": options})
    assert table.rows[1].outcomes[0].trained["steps"] == 1


class Killed(BaseException):
    """Ends a training as a kill does: nothing is caught, nothing is saved."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> dict[str, Any]:
    """The configuration of a table whose training was killed at its second step, behind a checkpoint of the first."""
    given = configuration(tmp_path_factory.mktemp("killed"), models)
    given["settings"] |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    given |= {"methods": ["sft"], "base": {"pretrain": PRETRAIN}, "reward_models": {"evaluation": JUDGE}}

    def kill(self: Any, args: Any, state: Any, *more: Any, **others: Any) -> None:
        if state.global_step == 1:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "RESAMPLES", 50)
        patch.setattr(cells._LastLine, "on_step_begin", kill, raising=False)
        with pytest.raises(Killed):
            run(given)
    (checkpoint,) = Path(given["output_dir"]).glob("cells/*/model/checkpoint-*")
    assert checkpoint.name == "checkpoint-1"
    return given


@pytest.mark.parametrize("how", ["moved", "relative", "another base's name", "older identity", "not claimed"])
def test_a_killed_cell_goes_on_wherever_its_folder_is(killed, tmp_path, monkeypatch, how):
    """What an older release called otherwise, or was killed before it was claimed, begins anew; the rest is resumed."""
    seen: list[str | None] = []
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda self: seen.append(self.checkpoint) or train(self))
    out = Path(shutil.copytree(killed["output_dir"], tmp_path / "elsewhere"))
    given = {**killed, "output_dir": str(out)}
    (model,) = out.glob("cells/sft*/model")
    if how == "relative":
        monkeypatch.chdir(tmp_path)
        given["output_dir"] = "./elsewhere"
    if how == "another base's name":
        given["base"] = str(next(out.glob("base/*/model")).rename(tmp_path / "base"))
    if how == "older identity":
        said = json.loads((model / "run.json").read_text())
        (model / "run.json").write_text(json.dumps({**said, "settings": {**said["settings"], "model": "old/base"}}))
    if how == "not claimed":
        (model / "run.json").unlink()
    table = run(given)
    assert len(seen) == 1  # neither the base model nor the reward model is trained again
    anew = how in ("older identity", "not claimed")
    assert (seen[0] is None) == anew
    assert table.rows[1].outcomes[0].trained["steps"] == 2


def test_a_cell_of_another_release_is_said(given):
    given = {**given, "methods": ["sft"]}
    table = run(given)
    assert not [note for note in table.write()["notes"] if "another clha-fast" in note]
    found = sorted(Path(given["output_dir"]).glob("cells/*/trained.json"))
    for path, version in zip(found, ("0.1.7", None), strict=True):
        said = {**json.loads(path.read_text()), "version": version}
        path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    (note,) = [note for note in run(given).write()["notes"] if "another clha-fast" in note]
    assert note.startswith("2 of 2 cells were made by another clha-fast (0.1.7, one that did not say which) than")
    assert note in Path(given["output_dir"], "table.md").read_text()


def test_a_row_that_failed_says_which_corruption_it_is(given):
    """Records without rewards can be trained on and not be corrupted."""
    rows = [{name: row[name] for name in ("prompt", "completions")} for row in records(0, 8)]
    write(Path(given["data"][2]["train"]), rows)
    table = Table(noise({**given, "methods": ["sft"], "kinds": ["flips"], "rates": [0.1, 0.5]}).comparison)
    table.run()
    table.write()
    lines = Path(given["output_dir"], "table.md").read_text().splitlines()
    failed = [line.partition(", n = 2: seed 1: ") for line in lines if "rewards: expected some" in line]
    assert [name for name, cut, _ in failed if cut] == ["SFT, flips 0.1", "SFT, flips 0.5"]


@pytest.mark.parametrize("name", ["train_file", "eval_file"])
def test_data_count_under_every_name_in_settings(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in "ab":
        (folder / f"{part}.jsonl").write_text(part)
    sources = [str(folder / "*.jsonl"), str(folder), "~/parts/[ab].jsonl", str(folder / "b.jsonl")]
    before = [with_contents({"train": {name: source}}) for source in sources]
    (folder / "b.jsonl").write_text("other")
    assert all(with_contents({"train": {name: s}}) != old for s, old in zip(sources, before, strict=True))
    moved = folder.rename(tmp_path / "moved")
    assert with_contents({"train": {name: str(moved / "b.jsonl")}}) == with_contents(
        {"train": {name: "~/moved/b.jsonl"}}
    )
    with pytest.raises(OSError, match="nothing"):
        with_contents({name: str(tmp_path / "nothing*.jsonl")})
