"""A comparison's configuration: what is read, what is refused by name; methods, quantiles, cells and their folders."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from clha_fast.data.records import RankedRecord
from clha_fast.experiments.bases import idle_of_bases
from clha_fast.experiments.cells import Cell, cell_folder, idle_of
from clha_fast.experiments.claims import ablation, noise
from clha_fast.experiments.comparison import parse_comparison
from clha_fast.experiments.contents import data_hash, model_hash, with_contents
from clha_fast.experiments.corruption import Corruption
from clha_fast.experiments.methods import parse_methods, with_quantiles
from clha_fast.experiments.reading import read_file, rewarded_alike
from clha_fast.experiments.table import _of_files as of_files
from clha_fast.objectives.pairs import keeps

FILES = {"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"}
WHOLE = {"output_dir": "out", "data": {2: FILES}, "base": "model", "methods": ["sft", "clha"]}


def test_what_is_not_given_has_its_default():
    found = parse_comparison(WHOLE)
    assert [method.name for method in found.methods] == ["sft", "clha"]
    assert [method.label for method in found.methods] == ["SFT", "CLHA"]
    assert (found.seeds, found.learning_rates, found.criterion, found.budget_tokens) == ((1,), (1e-5,), None, None)
    assert found.data["2"].dev == "dev.jsonl"
    assert found.corruptions == (None,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output_dir": None}, "output_dir: expected a folder"),
        ({"bse": "model"}, "configuration: unknown key 'bse'; did you mean 'base'?"),
        ({"base": {"pretrained": {}}}, "base: expected a model's path or name, or `pretrain: {...}`"),
        ({"data": {2: {"train": "a", "test": "b"}}}, "data.2: expected the files train, dev and test"),
        ({"data": {2: {**FILES, "dev": "test.jsonl"}}}, "data.2: expected different files for dev and test"),
        ({"methods": ["clhaa"]}, "methods[0]: expected `objective` to be one of"),
        ({"methods": ["clha", "clha"]}, "methods: expected each name once, got 'clha' 2 times"),
        ({"methods": [{"name": "clha", "margn": 1}]}, "methods[0]: unknown key 'margn'; did you mean 'margin'?"),
        ({"methods": [{"name": "clha", "seed": 3}]}, "methods[0]: expected none of"),
        ({"methods": "clha"}, "methods: expected a list of methods"),
        ({"methods": ["rlhf"]}, "reward_models: expected a label model, which judges what rlhf answers"),
        ({"methods": [{"name": "x", "rollout": 3}]}, "methods[0]: expected `rollout` to be true or false"),
        ({"seeds": [1, 1]}, "seeds: expected each number once"),
        ({"seeds": [1.5]}, "seeds: expected whole numbers"),
        ({"learning_rates": []}, "learning_rates: expected a list of numbers"),
        ({"learning_rates": ["fast"]}, "learning_rates: expected numbers, got 'fast'"),
        *(({"keep_models": value}, "keep_models: expected true or false, got") for value in ("false", "no", 0, None)),
        ({"criterion": "bleu"}, "criterion: expected one of reward, accuracy, nll, got 'bleu'"),
        ({"criterion": "reward"}, "criterion: expected reward_models.label"),
        ({"budget_tokens": 0}, "budget_tokens: expected a positive whole number, got 0"),
        ({"budget_tokens": 9, "settings": {"max_steps": 3}}, "budget_tokens: expected neither max_steps"),
        ({"settings": {"seed": 1}}, "settings: expected no seed, which the comparison sets itself"),
        ({"settings": {"objective": "dpo"}}, "settings: expected no objective, which each method sets for itself"),
        ({"settings": {"learnin_rate": 1}}, "settings: unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
        ({"settings": {"reward_mrgin": 1}}, "settings: unknown key 'reward_mrgin'; did you mean 'reward_margin'?"),
        ({"run": {"dtpe": "bfloat16"}}, "run: unknown key 'dtpe'; did you mean 'dtype'?"),
        ({"run": {"resume": True}}, "run: expected no resume, which the comparison sets itself"),
        ({"settings": [1]}, "settings: expected a mapping, got [1]"),
        ({"reward_models": {"judge": "x"}}, "reward_models: unknown key 'judge'"),
        ({"reward_models": {"label": 3}}, "reward_models.label: expected a path"),
        ({"checkpoints": {"LLaMA": 7}}, "checkpoints.LLaMA: expected a model's path"),
        ({"checkpoints": {"base": "x"}}, "checkpoints.base: expected labels that differ"),
        ({"checkpoints": {"m 1": "x", "m-1": "y"}}, "checkpoints.m-1: expected labels that differ"),
        (
            {"checkpoints": {"sft": "x"}},
            "methods: expected names that neither a checkpoint nor the base has, got 'sft'",
        ),
        ({"data": {2: {**FILES, "dev": "./test.jsonl"}}}, "data.2: expected different files for dev and test"),
        ({"data": {2: {**FILES, "train": "test.jsonl"}}}, "data.2: expected different files for train and test"),
        (
            {"budget_tokens": 9, "settings": {"max_tokens_per_batch": 64}},
            "budget_tokens: expected no max_tokens_per_batch",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_comparison({**WHOLE, **change})


def test_a_method_is_an_objective_with_settings_of_the_trainer():
    abs_rule, named = parse_methods(
        [{"name": "abs", "label": "CLHA, abs", "objective": "clha", "noise_rule": "abs"}, "pro"]
    )
    assert abs_rule.settings == {"objective": "clha", "noise_rule": "abs"}
    assert (named.label, named.settings) == ("PRO", {"objective": "pro"})
    with pytest.raises(ValueError, match="expected a name of letters"):
        parse_methods([{"name": "../up", "objective": "clha"}])


GAPS = [RankedRecord("p", ("a", "b", "c"), (5.0, 4.0, 1.0)), RankedRecord("q", ("a", "b"), (0.0, 2.0))]


@pytest.mark.parametrize(("quantile", "value"), [("q0", 1.0), ("q0.5", 2.5), ("q1", 4.0), ("q.25", 1.75)])
def test_a_margin_is_a_quantile_of_all_reward_differences(quantile, value):
    # 1, 3, 4 and 2, by hand
    assert with_quantiles({"reward_margin": quantile}, GAPS)["reward_margin"] == pytest.approx(value)
    nested = with_quantiles({"objective": {"name": "clha", "reward_margin": quantile}}, GAPS)
    assert nested["objective"]["reward_margin"] == pytest.approx(value)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("quantile", "kept"), [("q0", 20), ("q0.5", 10), ("q0.75", 5), ("q1", 0)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])
def test_the_pair_at_the_quantile_is_dropped(seed, quantile, kept, scale):
    """Of 21 pairs with a gap each: the loss compares in float32, in which the gap has another last bit."""
    draw = np.random.default_rng(seed)
    records = [RankedRecord("p", ("a", "b"), tuple(scale * draw.standard_normal(2))) for _ in range(21)]
    margin = with_quantiles({"reward_margin": quantile}, records)["reward_margin"]
    rewards = torch.tensor([record.rewards for record in records], dtype=torch.float32)
    assert int(keeps(rewards[:, 0] - rewards[:, 1], "abs", margin).sum()) == kept


@pytest.mark.parametrize("text", ["q1.5", "0.5", "median", "q"])
def test_another_text_is_no_quantile(text):
    with pytest.raises(ValueError, match="reward_margin: expected a number, or a quantile"):
        with_quantiles({"reward_margin": text}, GAPS)


def test_a_quantile_needs_rewards():
    with pytest.raises(ValueError, match="expected records with rewards for the quantile"):
        with_quantiles({"reward_margin": "q0.5"}, [RankedRecord("p", ("a", "b"))])


@pytest.fixture
def comparison(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completions": ["a", "b"]}) + "\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in FILES}
    return parse_comparison({**WHOLE, "output_dir": str(tmp_path / "out"), "data": {2: files}, "base": str(model)})


def cell_of(comparison, **changes):
    cell = Cell(comparison.methods[1], "2", comparison.data["2"], 1, 1e-5)
    return dataclasses.replace(cell, **changes)


def test_whatever_decides_the_weights_is_in_the_folders_name(comparison, tmp_path):
    base = str(comparison.base)

    def folder(cell, other=comparison):
        return cell_folder(other, cell, base)

    one = cell_of(comparison)
    others = [
        folder(cell_of(comparison, seed=2)),
        folder(cell_of(comparison, learning_rate=2e-5)),
        folder(cell_of(comparison, corruption=Corruption("flips", 0.1))),
        folder(
            cell_of(comparison, method=dataclasses.replace(one.method, settings={"objective": "clha", "margin": 1}))
        ),
        folder(one, dataclasses.replace(comparison, budget_tokens=5)),
        folder(one, dataclasses.replace(comparison, settings={"per_device_train_batch_size": 2})),
        folder(one, dataclasses.replace(comparison, run={"dtype": "bfloat16"})),
    ]
    before = folder(one)
    (tmp_path / "train.jsonl").write_text('{"prompt": "other", "completions": ["a", "bb"]}\n')
    others.append(folder(one))
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 8}')
    others.append(folder(one))
    assert len({before, *others}) == 1 + len(others)


def test_what_is_only_evaluated_otherwise_lies_in_the_same_folder(comparison):
    base = str(comparison.base)
    other = dataclasses.replace(comparison, generation={"max_new_tokens": 3}, test_limit=2, seeds=(1, 2))
    assert cell_folder(comparison, cell_of(comparison), base) == cell_folder(other, cell_of(comparison), base)


@pytest.mark.parametrize(("lacking", "few"), [(0, False), (2, False), (1, True)])
def test_records_unlike_most_are_left_out_of_a_table_and_said(comparison, lacking, few):
    rows = [{"prompt": f"train {k}", "completions": ["a", "b"], "rewards": [1.0, 0.0]} for k in range(3)]
    for place, row in enumerate(rows):
        if (place == lacking) != few:
            del row["rewards"]
    train = comparison.data["2"].train
    with open(train, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = dataclasses.replace(
        comparison, methods=parse_methods(["sft" if few else "rrhf"]), run={"skip_bad_records": True}
    )
    (said,) = of_files(found, new=True)
    what = "with rewards, which most lack," if few else "without rewards, as most have,"
    assert said == f"Records of train (n = 2) {what} that are left out: 1 of 3."
    records = read_file(train, found.run)
    assert few or len(Corruption("flips", 0.5).apply(rewarded_alike(records, found.run))) == 2
    assert rewarded_alike(records, {}) == records
    assert len(rewarded_alike(records[lacking : lacking + 1], found.run)) == 1, "where none has any, none lacks them"


def test_a_name_on_the_hub_is_its_own_content():
    assert model_hash("organisation/model") == "organisation/model"


@pytest.mark.parametrize(
    "name", ["config.json", "merges.txt", "vocab.txt", "pytorch_model.pt", "code.py", "deep/x.bin"]
)
def test_every_file_of_a_model_counts_but_for_a_runs_reports(tmp_path, name):
    (tmp_path / "deep").mkdir()
    (tmp_path / name).write_text("one")
    before = model_hash(str(tmp_path))
    for report in ("run.json", "metrics.json", "README.md", "loss_curve.png", "training_args.bin"):
        (tmp_path / report).write_text("a report")
    assert model_hash(str(tmp_path)) == before
    (tmp_path / name).write_text("other")
    assert model_hash(str(tmp_path)) != before


def test_what_a_run_says_of_how_its_model_is_asked_and_reads_counts(tmp_path):
    run, judge = tmp_path / "run.json", tmp_path / "reward_model.json"
    found = []
    for path, told in (
        (run, {"settings": {}, "lead": None}),
        (run, {"settings": {"objective": "coh"}}),
        (run, {"settings": {}, "answer_prefix": "A helpful answer:"}),
        (run, {"settings": {}, "lead": "<think>\n"}),
        (judge, {"accuracy": 0.7}),
        (judge, {"responses_begin_with_blank": False}),
    ):
        path.write_text(json.dumps(told))
        found.append(model_hash(str(tmp_path)))
        path.unlink()
    assert found[1] == found[2], "the marker of such a run"
    assert found[0] == found[4] == model_hash(str(tmp_path))
    assert len(set(found)) == 4


def test_the_model_under_an_adapter_counts(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (base / "model.safetensors").write_text("one")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = model_hash(str(adapter))
    (base / "model.safetensors").write_text("other")
    assert model_hash(str(adapter)) != before


def test_data_count_under_every_name_that_they_are_read_by(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "set" / "split"
    folder.mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "set/split/part.arrow"):
        (tmp_path / name).write_text("one")
    sources = ["~/a.jsonl", str(tmp_path / "*.jsonl"), str(tmp_path / "set")]
    before = [data_hash(source) for source in sources]
    for name in ("a.jsonl", "set/split/part.arrow"):
        (tmp_path / name).write_text("other")
    assert all(data_hash(source) != old for source, old in zip(sources, before, strict=True))


def test_settings_that_name_a_folder_count_with_what_is_in_it(tmp_path):
    (tmp_path / "config.json").write_text("one")
    settings = {"objective": {"name": "dpo"}, "reference": str(tmp_path), "optim": "adamw_torch"}
    before = with_contents(settings)
    assert before["optim"] == "adamw_torch"
    (tmp_path / "config.json").write_text("other")
    assert with_contents(settings) != before
    assert with_contents({"tokenizer": "organisation/name"}) == {"tokenizer": "organisation/name"}


def test_the_ablation_takes_one_part_at_a_time():
    given = {key: value for key, value in WHOLE.items() if key != "methods"}
    claim = ablation({**given, "clha": {"preset": "paper"}, "sweeps": {"margin": [1, 2], "reward_margin": ["q0.5"]}})
    settings = {method.name: dict(method.settings) for method in claim.comparison.methods}
    whole = {"objective": "clha", "preset": "paper"}
    assert settings.pop("no-gate")["reward_floor"] < -1e29
    assert settings == {
        "clha": whole,
        "no-rescoring": {**whole, "noise_rule": "none"},
        "no-margin": {**whole, "margin": 0.0},
        "no-sft": {**whole, "sft_weight": 0.0},
        "margin-1": {**whole, "margin": 1},
        "margin-2": {**whole, "margin": 2},
        "reward_margin-q0.5": {**whole, "reward_margin": "q0.5"},
    }
    assert claim.against == "clha"


def test_noise_has_clean_data_beside_every_kind_and_rate():
    given = {key: value for key, value in WHOLE.items() if key != "methods"}
    claim = noise({**given, "kinds": ["flips", "rewards"], "rates": {"flips": [0.1, 0.2], "rewards": [1]}})
    assert [method.name for method in claim.comparison.methods] == ["none", "abs", "signed"]
    assert claim.comparison.corruptions == [
        None,
        Corruption("flips", 0.1),
        Corruption("flips", 0.2),
        Corruption("rewards", 1.0),
    ]
    assert claim.against == "none"
    assert noise({**WHOLE, "against": "clha"}).against == "clha"


@pytest.mark.parametrize(
    ("make", "change", "said"),
    [
        (ablation, {}, "methods: expected none"),
        (ablation, {"methods": None, "sweeps": {"floor": [1]}}, "sweeps: expected lists under margin"),
        (ablation, {"methods": None, "sweeps": {"margin": ["q0.5"]}}, "sweeps.margin: expected numbers"),
        (ablation, {"methods": None, "sweeps": {"margin": 3}}, "sweeps.margin: expected a list, got 3"),
        (ablation, {"methods": None, "clha": {"name": "pro"}}, "clha: expected settings of the CLHA loss"),
        (noise, {"rates": [0.0]}, "rates: expected numbers above 0"),
        (noise, {"rates": {"flips": [0.1]}}, "rates: expected a list of numbers for rewards"),
        (noise, {"kinds": ["typos"], "rates": [0.1]}, "kind: expected one of rewards, flips, got 'typos'"),
        (noise, {"against": "pro"}, "against: expected one of sft, clha, got 'pro'"),
        (noise, {"clha": {"margin": 1}}, "clha: expected none beside methods"),
    ],
)
def test_claims_refuse_by_name(make, change, said):
    given = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(said)):
        make(given)


TRAINS = {"train": {"model": "m", "eval_steps": 5}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"settings": {"save_strategy": "steps", "save_steps": 5, "logging_steps": 3}}, []),
        ({"settings": {"save_steps": 5}}, ["Unused: save_steps: acts with save_strategy='steps', "]),
        ({"settings": {"hub_model_id": "me/it"}}, ["Unused: hub_model_id: acts with push_to_hub="]),
        ({"methods": ["sft", {"name": "clha", "eval_steps": 2}]}, ["Unused by CLHA: eval_steps: acts with eval_str"]),
        ({"methods": ["sft", {"name": "clha", "reward_margin": "q0.5", "save_steps": 2}]}, ["Unused by CLHA: save_"]),
        (
            {"reward_models": {"label": TRAINS, "evaluation": "m"}, "methods": ["rlhf"], "settings": {"eval_steps": 2}},
            ["Unused by reward_models.label.train: eval_steps: ", "Unused: eval_steps: "],
        ),
        ({"base": {"pretrain": {"hub_model_id": "me/it"}}}, ["Unused by base.pretrain: hub_model_id: "]),
    ],
)
def test_settings_that_nothing_reads_are_said_once(changes, said):
    comparison = parse_comparison({**WHOLE, **changes})
    found = [*idle_of_bases(comparison), *idle_of(comparison)]
    assert len(found) == len(said), found
    assert all(line.startswith(start) and line.endswith(" out.") for line, start in zip(found, said, strict=True))
