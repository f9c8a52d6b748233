"""The benchmark on held-out prompts: its counts and intervals by hand, a whole run, and one that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import render
from benchmarks.heldout import Counts, Resamples, figures, per_prompt
from clha_fast import CLHAOptions
from clha_fast.data.records import RankedRecord
from tests.support.helpers import ROOT

# Three responses, then two whose rewards contradict the order of the file, then two equal rewards.
RECORDS = [
    RankedRecord("a", ("long one", "two", "mid"), (5.0, 1.0, 0.0)),
    RankedRecord("b", ("worst of all", "best"), (-4.0, 4.0)),
    RankedRecord("c", ("x", "y"), (1.0, 1.0)),
]


def test_counts_of_each_prompt_by_hand() -> None:
    found = per_prompt([-1.0, -2.0, -2.0, -3.0, -0.5, -1.0, -9.0], RECORDS)
    assert found["prompts"] == [1, 1, 1]
    assert found["kept"] == [2, 1, 0]  # 5 - 1, 5 - 0 and 8 are more than 3; 1 - 0 is not
    assert found["ordered"] == [3, 1, 0]
    assert found["against"] == [0, 1, 0]
    assert found["kept_right"] == [2, 1, 0]
    assert found["ordered_right"] == [2.5, 1, 0]  # equal scores are half right
    assert found["against_right"] == [0, 1, 0]
    assert found["kept_lead"] == [2, 2.5, 0]
    assert found["best_nll"] == [1, 3, 1]


def test_a_difference_of_exactly_three_is_not_kept() -> None:
    record = RankedRecord("a", ("one", "two"), (3.0, 0.0))
    assert per_prompt([0.0, 1.0], [record])["kept"] == [0]
    assert per_prompt([0.0, 1.0], [record])["ordered_right"] == [0]


def test_without_rewards_nothing_is_right() -> None:
    with pytest.raises(ValueError, match=r"here:1: rewards: expected one a response"):
        per_prompt([0.0, 1.0], [RankedRecord("a", ("one", "two"), None, source="here:1")])


def test_resamples_are_of_prompts_and_of_seeds() -> None:
    """Each half right: a mean of 0, 1/2 or 1 with odds 1:2:1, so 95% reach from end to end."""
    resamples = Resamples(2, 2)
    one = np.ones(2)
    prompts = resamples.values(np.array([[1.0, 0.0], [1.0, 0.0]]), one)
    seeds = resamples.values(np.array([[1.0, 1.0], [0.0, 0.0]]), one)
    for values in (prompts, seeds):
        shares = [float((values == mean).mean()) for mean in (0, 0.5, 1)]
        assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    both = resamples.values(np.array([[1.0, 0.0], [0.0, 0.0]]), one)  # the product of two shares of 0, 1/2, 1
    assert float((both == 1).mean()) == pytest.approx(1 / 16, abs=0.01)
    assert float(both.mean()) == pytest.approx(1 / 4, abs=0.01)
    # Independently of each other.
    assert abs(np.corrcoef(prompts, seeds)[0, 1]) < 0.05
    assert (resamples.values(np.array([[1.0, 1.0], [1.0, 1.0]]), one) == 1).all()
    # A prompt without a pair adds nothing; a resample of such prompts alone has no figure.
    sparse = resamples.values(np.array([[1.0, 0.0]]), np.array([2.0, 0.0]))
    assert set(sparse[~np.isnan(sparse)]) == {0.5}
    assert float(np.isnan(sparse).mean()) == pytest.approx(0.25, abs=0.02)


def test_figures_by_hand() -> None:
    def counts(right: float) -> Counts:
        data = {"prompts": [1.0, 1.0], "kept": [3.0, 1.0], "ordered": [4.0, 4.0], "against": [0.0, 0.0]}
        return {**data, "kept_right": [right, 1.0], "ordered_right": [right, 1.0], "against_right": [0.0, 0.0]}

    lengths = {"longer_characters": [counts(2.0)], "longer_tokens": [counts(3.0)]}
    found = figures({"clha": [counts(1.0), counts(3.0)], **lengths}, 2)
    assert found["clha"]["accuracy"]["seeds"] == [0.5, 1.0]
    assert found["clha"]["accuracy"]["value"] == 0.75
    assert found["clha"]["kendall_tau"]["value"] == pytest.approx(2 * 3 / 8 - 1)
    assert found["clha"]["accuracy_above_longer_characters"]["value"] == 0
    assert found["clha"]["accuracy_above_longer_tokens"]["value"] == -0.25
    # Seeds 1 and 3 of 3 with the first prompt alone, to nothing wrong at all.
    assert found["clha"]["accuracy"]["interval"] == pytest.approx([1 / 3, 1])
    assert "accuracy_against_length" not in found["clha"]  # no such pair
    assert "margin" not in found["longer_tokens"]


def test_the_tables_are_those_of_the_figures() -> None:
    report = json.loads(render.TRAINED.read_text())
    assert render.brief(report) in (ROOT / "README.md").read_text()
    for table in (render.choosing(report), render.held_out(report, against_length=True)):
        assert table in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_example_has_the_settings_that_were_chosen() -> None:
    choice = json.loads(render.TRAINED.read_text())["choosing"]
    settings = yaml.safe_load((ROOT / "examples" / "alpacaeval.yaml").read_text())
    chosen = choice["settings"][choice["chosen"]]["changes"]
    defaults = CLHAOptions.preset(settings["preset"])
    assert {name: settings.get(name, getattr(defaults, name, None)) for name in chosen} == chosen


# ---- whole runs ----

TINY: dict[str, Any] = {
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "build_tokenizer": {"vocab_size": 400},
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "save_steps": 3,
    "use_cpu": True,
}
# Notes how many trainings were finished whenever the test file was opened; dies while it writes a second checkpoint.
PROGRAM = """
import os, pathlib, sys
test_file, folder, kill = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3] == "kill"
finished, checkpoints = [], []

def watch(event, args):
    if event == "open" and str(args[0]) == test_file:
        finished.append(len(list(folder.glob("*/result.json"))))
    if event == "os.rename" and "checkpoint-" in str(args[1]):
        checkpoints.append(str(args[1]))
        if kill and len(finished) > 4 and args[1].endswith("checkpoint-6"):
            os._exit(9)

sys.addaudithook(watch)
from benchmarks import heldout
heldout.GRID = {"slow": heldout._setting(1e-3, 2), "fast": heldout._setting(1e-2, 2, reward_margin=1.0)}
heldout.SEEDS = (1, 2)
heldout.main(sys.argv[4:])
print("finished before the test file was opened:", min(finished, default=None))
"""


def program(folder: Path, *flags: str, kill: bool = False, output: str = "found.json") -> tuple[int, str]:
    test_file = str(folder.parent / "test.jsonl")
    words = ["--train-file", str(folder.parent / "train.jsonl"), "--config", str(folder.parent / "tiny.yaml")]
    words += ["--folder", str(folder), "--output", str(folder.parent / output), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, test_file, str(folder), "kill" if kill else "live", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 9), done.stderr[-3000:]
    return done.returncode, done.stdout


def comparable(path: Path) -> dict[str, Any]:
    """Without what differs between two runs of the same: seconds, the day, and what was edited in the meantime."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items() if name not in ("seconds", "environments")}
        return value

    return plain(json.loads(path.read_text()))


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    lines = (ROOT / "clha_fast" / "demo" / "ranked_demo.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:24]), "utf-8")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    # Choosing needs no test file: there is none yet.
    _, said = program(tmp_path / "whole", output="chosen.json")
    assert "finished before the test file was opened: None" in said
    (tmp_path / "test.jsonl").write_text("".join(lines[24:34]), "utf-8")
    given = ("--test-file", str(tmp_path / "test.jsonl"))
    _, said = program(tmp_path / "fresh", *given, output="fresh.json")
    assert "finished before the test file was opened: 2" in said
    report = comparable(tmp_path / "fresh.json")
    assert report["choosing"] == comparable(tmp_path / "chosen.json")["choosing"]

    tried = {name: row["accuracy"]["value"] for name, row in report["choosing"]["settings"].items()}
    assert tried[report["choosing"]["chosen"]] == max(tried.values())
    assert sum(report["choosing"]["prompts"].values()) == 24
    assert report["data"]["test"]["shared_prompts"] == 0
    for name in ("clha", "sft_only"):  # the trainer's own evaluation is another way to the same
        for seed, metrics in enumerate(report["models"][name]["trainer_metrics"]):
            for ours, theirs in (("accuracy", "rewards/accuracies"), ("kendall_tau", "kendall_tau")):
                assert report["models"][name][ours]["seeds"][seed] == pytest.approx(metrics[theirs], abs=1e-6)
    for seed, metrics in enumerate(report["models"]["sft_only"]["trainer_metrics"]):
        assert report["models"]["sft_only"]["nll"]["seeds"][seed] == pytest.approx(metrics["sft_loss"], rel=1e-5)
    rows = (tmp_path / "fresh.csv").read_text().splitlines()
    assert len(rows) == 1 + 10 * (3 * 2 + 2)
    written = json.loads((tmp_path / "fresh.json").read_text())
    for table in (render.held_out(written, against_length=True), render.choosing(written)):
        assert "nan" not in table

    # Killed in the middle of a training, gone on with, and once more when all is done.
    status, _ = program(tmp_path / "stopped", *given, kill=True, output="stopped.json")
    assert status == 9
    assert not (tmp_path / "stopped.json").exists()
    for _ in range(2):
        status, _ = program(tmp_path / "stopped", *given, output="stopped.json")
        assert status == 0
        assert comparable(tmp_path / "stopped.json") == report
        assert (tmp_path / "stopped.csv").read_text().splitlines() == rows
        models = json.loads((tmp_path / "stopped.json").read_text())["models"]
        # One training went on from its first checkpoint, so nobody knows how long it took.
        assert [models[name]["seconds"].count(None) for name in ("clha", "sft_only")] == [1, 0]
