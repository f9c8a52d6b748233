"""What training on ranked responses gives on prompts held out: settings chosen before, several seeds, baselines beside.

    python -m benchmarks.heldout --train-file TRAIN.jsonl --folder runs/heldout [--test-file TEST.jsonl] [--output JSON]

1. Choosing. A quarter of the training file's prompts (`CHOOSE`: by a hash of the prompt) is set aside, each setting of
   `GRID` trains on the rest with one seed, and the one that ranks most of the kept pairs set aside right is taken; of
   equal ones the first. Without `--test-file` the script ends here; before, the test file is not opened.
2. Training. The chosen setting on the whole training file with every seed of `SEEDS`, and likelihood alone (preset
   sft_only) in the same number of steps. The model before its first step is the untrained one.
3. Figures on the test file, with 95% intervals (`Resamples`), beside length alone and chance.

Every training has a folder of its own, named after a hash of its settings and data: a script that was stopped goes on
where it was. `--output` gets what is needed to do it again, and beside it a CSV with the counts of every prompt;
`python -m benchmarks.render` makes the tables of it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import cpu_environment, versions
from clha_fast import CLHAOptions
from clha_fast.batching.batch import CandidateBatch
from clha_fast.cli.options import merge, read_config, split
from clha_fast.data.records import RankedRecord
from clha_fast.experiments.run import Run
from clha_fast.files import file_hash, write_json
from clha_fast.layout import Layout
from clha_fast.objectives.pairs import Pairs

ROOT = Path(__file__).resolve().parent.parent
Settings = dict[str, Any]
# What a setting is judged by, whatever it trains on itself: pairs whose rewards differ by more than 3.
JUDGE = CLHAOptions.preset("paper")
CRITERION = "most kept pairs (rewards more than 3 apart) of the prompts set aside ranked right; of equal ones the first"
CHOOSE: Settings = {"eval_fraction": 0.25, "seed": 1}


def _setting(rate: float, epochs: int, preset: str = "paper", reward_margin: float = 3.0) -> Settings:
    return {"preset": preset, "reward_margin": reward_margin, "learning_rate": rate, "num_train_epochs": epochs}


GRID: dict[str, Settings] = {
    "paper, 1e-3, 2 epochs": _setting(1e-3, 2),
    "paper, 3e-4, 5 epochs": _setting(3e-4, 5),
    "paper, 1e-3, 5 epochs": _setting(1e-3, 5),
    "paper, reward_margin 1, 1e-3, 2 epochs": _setting(1e-3, 2, reward_margin=1.0),
    "paper, reward_margin 1, 1e-3, 5 epochs": _setting(1e-3, 5, reward_margin=1.0),
    "published, 1e-3, 5 epochs": _setting(1e-3, 5, preset="published"),
}
SEEDS = (1, 2, 3, 4, 5)
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")

# A figure is the sum of the first count over that of the second, over prompts and seeds.
FIGURES = {
    "accuracy": ("kept_right", "kept"),
    "accuracy_all": ("ordered_right", "ordered"),
    "margin": ("kept_lead", "kept"),
    "nll": ("best_nll", "prompts"),
    "accuracy_against_length": ("against_right", "against"),
}
OF_DATA = ("prompts", "kept", "ordered", "against")
# Lead and likelihood are of scores in nats a token; lengths have neither.
OF_LENGTH = ("kept_right", "ordered_right", "against_right")
Counts = dict[str, list[float]]


def per_prompt(scores: Sequence[float], records: Sequence[RankedRecord]) -> Counts:
    """What every prompt adds to the `FIGURES`, for scores [C] of all its candidates, the higher the better.

    A pair counts in `kept` if its rewards are more than 3 apart, in `ordered` if they differ at all, in `against` if it
    is kept and its better response has fewer characters. Equal scores are half right: what a coin would make of them.
    """
    for record in records:
        if record.rewards is None:
            raise ValueError(f"{record.source}: rewards: expected one a response, which say what is right, got none")
    sizes = torch.tensor([len(record.completions) for record in records])
    rewards = torch.tensor([reward for record in records for reward in record.rewards or ()])
    layout = Layout.whole(sizes)
    pairs = Pairs.of(layout, rewards)
    better, worse = (torch.tensor(scores, dtype=torch.float64)[side] for side in (pairs.i, pairs.j))
    lengths = torch.tensor([len(text) for record in records for text in record.completions])
    # In the order of the rewards, which need not be the file's.
    lead = (better - worse) * pairs.order
    right = (lead > 0) + 0.5 * (lead == 0)
    kept, ordered = JUDGE.kept(pairs), pairs.order != 0
    against = kept & ((lengths[pairs.i] - lengths[pairs.j]) * pairs.order < 0)
    best = torch.tensor(scores, dtype=torch.float64)[layout.starts + torch.tensor([r.sft_index for r in records])]

    def total(values: torch.Tensor, chosen: torch.Tensor) -> list[float]:
        found = torch.zeros(len(records), dtype=torch.float64)
        return found.index_add_(0, layout.prompt[pairs.i[chosen]], values[chosen].double()).tolist()

    one = torch.ones_like(right)
    return {
        "prompts": [1.0] * len(records),
        **{name: total(one, chosen) for name, chosen in (("kept", kept), ("ordered", ordered), ("against", against))},
        "kept_right": total(right, kept),
        "ordered_right": total(right, ordered),
        "against_right": total(right, against),
        "kept_lead": total(lead, kept),
        "best_nll": (-best).tolist(),
    }


class Resamples:
    """Bootstrap over prompts and seeds: each resample draws as many of both, with replacement and independently.

    Args:
        prompts, seeds: how many there are.
    """

    def __init__(self, prompts: int, seeds: int) -> None:
        random = np.random.default_rng(0)
        self.prompts = random.multinomial(prompts, [1 / prompts] * prompts, size=10000)  # how often each was drawn
        self.seeds = random.multinomial(seeds, [1 / seeds] * seeds, size=10000)

    def values(self, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        """[count] of sum(top) / sum(bottom), `top` [seeds or 1, prompts] and `bottom` [prompts]; NaN where it is 0."""
        seeds = self.seeds if len(top) > 1 else np.full((len(self.seeds), 1), len(top))
        with np.errstate(invalid="ignore"):
            return (seeds @ top * self.prompts).sum(1) / (seeds.sum(1) * (self.prompts @ bottom))


def _interval(values: np.ndarray) -> list[float] | None:
    """The middle 95%; resamples without a pair to count are left out."""
    found = values[~np.isnan(values)]
    return [float(edge) for edge in np.quantile(found, (0.025, 0.975))] if len(found) else None


def figures(models: Mapping[str, Sequence[Counts]], seeds: int) -> dict[str, Any]:
    """Every model's figures: value, interval, each seed's; and how far its accuracy is above each length's.

    Args:
        models: name -> the counts of each seed, or of one where there is nothing random.
    """
    first = next(iter(models.values()))[0]
    resamples = Resamples(len(first["prompts"]), seeds)
    found: dict[str, Any] = {}
    accuracies = {}
    for name, runs in models.items():
        found[name] = rows = {}
        for figure, (top_name, bottom_name) in FIGURES.items():
            if top_name not in runs[0]:
                continue
            top, bottom = np.array([run[top_name] for run in runs]), np.array(first[bottom_name])
            if not bottom.sum():
                continue
            values = resamples.values(top, bottom)
            each = (top.sum(1) / bottom.sum()).tolist()
            rows[figure] = {"value": float(np.mean(each)), "interval": _interval(values), "seeds": each}
            if figure == "accuracy":
                accuracies[name] = values
            if figure == "accuracy_all":  # (right - wrong) / pairs, equal scores being neither
                tau = {key: (2 * np.array(value) - 1).tolist() for key, value in rows[figure].items()}
                rows["kendall_tau"] = tau
    for name, rows in found.items():
        for other in ("longer_characters", "longer_tokens"):
            if len(models[name]) > 1 and "accuracy" in rows:
                difference = rows["accuracy"]["value"] - found[other]["accuracy"]["value"]
                interval = _interval(accuracies[name] - accuracies[other])
                rows[f"accuracy_above_{other}"] = {"value": difference, "interval": interval}
    return found


# ---- trainings ----


@torch.no_grad()
def scores_of(run: Run) -> list[float]:
    """The length-normalised log-probability, nats a token, of every held-out candidate; draws no random number."""
    trainer, dataset = run.trainer, run.trainer.eval_dataset
    size, found = run.args.per_device_eval_batch_size, []
    run.model.eval()
    for first in range(0, len(dataset), size):
        features = [dataset[number] for number in range(first, min(first + size, len(dataset)))]
        batch = CandidateBatch.from_dict(trainer.eval_collator(features)).to(run.args.device)
        _, outputs = trainer.compute_loss(run.model, batch.as_dict(), return_outputs=True)
        found += outputs["metrics"].scores.tolist()
    return found


def lengths_of(run: Run) -> dict[str, Counts]:
    """The held-out candidates ranked by length alone: all characters, and the tokens that the model is shown."""
    records, dataset = run.held_out, run.trainer.eval_dataset
    characters = [float(len(text)) for record in records for text in record.completions]
    tokens = [float(len(ids)) for number in range(len(dataset)) for ids in dataset[number]["completion_ids"]]
    named = {"longer_characters": characters, "longer_tokens": tokens}
    return {
        name: {key: value for key, value in per_prompt(scores, records).items() if key in (*OF_DATA, *OF_LENGTH)}
        for name, scores in named.items()
    }


@functools.cache
def environment() -> dict[str, Any]:
    """Of this process, as it began: a commit made meanwhile is not what it runs."""
    return {**cpu_environment(), "versions": versions(*PACKAGES)}


def trained(settings: Settings, folder: Path) -> dict[str, Any]:
    """One training and its held-out counts, read from its folder where it is finished, gone on with where it is not.

    Returns:
        folder, seconds of training (None where it was stopped in between), environment; `before` and `after` training,
        `Counts` each; `lengths`; `metrics`, the trainer's own after training; `prompts` and `shared_prompts` counted.
    """
    data = {name: file_hash(settings[name]) for name in ("train_file", "eval_file") if name in settings}
    named = json.dumps([{name: value for name, value in settings.items() if name not in data}, data], sort_keys=True)
    place = folder / hashlib.sha256(named.encode()).hexdigest()[:16]
    result = place / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    stopped = (place / "run.json").exists()
    options, config, _ = split({**settings, "output_dir": str(place), "resume": stopped, "save_total_limit": 1})
    run = Run(options, config).prepare()
    before = per_prompt(scores_of(run), run.held_out)
    run.evaluate_before()
    start = time.monotonic()
    run.train()
    if run.interrupted:
        raise KeyboardInterrupt
    seconds = time.monotonic() - start
    run.report()
    found = {
        "folder": place.name,
        "seconds": None if stopped else seconds,
        "environment": environment(),
        "prompts": {"train": len(run.train_records), "held_out": len(run.held_out)},
        "shared_prompts": run.summary()[2],
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "before": before,
        "after": per_prompt(scores_of(run), run.held_out),
        "lengths": lengths_of(run),
        "metrics": {name: run.after[f"eval_{name}"] for name in ("rewards/accuracies", "kendall_tau", "sft_loss")},
    }
    write_json(str(result), found)
    return found


def choose(base: Settings, grid: Mapping[str, Settings], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what was tried and chosen, the trainings); `base` names the training file and no other."""
    runs, rows = [], {}
    for name, changes in grid.items():
        run = trained({**base, **CHOOSE, **changes}, folder)
        runs.append(run)
        found = figures({"model": [run["after"]], **{key: [counts] for key, counts in run["lengths"].items()}}, 1)
        rows[name] = {"changes": changes, "seconds": run["seconds"], **found["model"]}
        print(f"{name}: {rows[name]['accuracy']['value']:.4f}", flush=True)
    best = max(rows, key=lambda name: rows[name]["accuracy"]["value"])  # the first of equal ones
    print(f"chosen: {best}", flush=True)
    return {
        "criterion": CRITERION,
        **CHOOSE,
        "prompts": runs[0]["prompts"],
        "kept_pairs": int(sum(runs[0]["after"]["kept"])),
        "settings": rows,
        "lengths": {name: found[name]["accuracy"]["value"] for name in runs[0]["lengths"]},
        "chosen": best,
    }, runs


def held_out(
    base: Settings, grid: Mapping[str, Settings], seeds: Sequence[int], test_file: str | None, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the report, a row for every model, seed and prompt); without `test_file` what was chosen, and no rows.

    Args:
        base: options of `clha-fast train` with `train_file`; `grid` overrides them.
    """
    environment()
    choice, runs = choose(base, grid, folder)
    report: dict[str, Any] = {
        "data": {"train": _data(base["train_file"])},
        "base": {name: value for name, value in base.items() if name != "train_file"},
        "choosing": choice,
    }
    models: dict[str, list[Counts]] = {}
    if test_file is not None:
        setting = {**base, **grid[choice["chosen"]], "eval_file": test_file}
        final = {"clha": setting, "sft_only": {**setting, "preset": "sft_only"}}
        done = {name: [trained({**s, "seed": seed}, folder) for seed in seeds] for name, s in final.items()}
        runs += [run for found in done.values() for run in found]
        models = {name: [run["after"] for run in found] for name, found in done.items()}
        models["untrained"] = [run["before"] for run in done["clha"]]
        models |= {name: [counts] for name, counts in done["clha"][0]["lengths"].items()}
        one = done["clha"][0]
        report["data"]["test"] = _data(test_file) | {"shared_prompts": one["shared_prompts"]}
        report["test"] = {name: int(sum(one["after"][name])) for name in OF_DATA}
        report["parameters"] = one["parameters"]
        report["seeds"] = list(seeds)
        report["models"] = figures(models, len(seeds))
        for name, found in done.items():
            report["models"][name]["seconds"] = [run["seconds"] for run in found]
            report["models"][name]["trainer_metrics"] = [run["metrics"] for run in found]
    # Trainings of one report may come from several commits or machines, where it was stopped in between.
    report["environments"] = list({json.dumps(run["environment"]): run["environment"] for run in runs}.values())
    rows = [
        {"model": name, "seed": seed if len(found) > 1 else "", "prompt": number}
        | {key: round(values[number], 6) for key, values in counts.items()}
        for name, found in models.items()
        for seed, counts in zip(seeds, found, strict=False)
        for number in range(len(counts["prompts"]))
    ]
    return report, rows


def _data(path: str) -> dict[str, Any]:
    return {"file": os.path.basename(path), "sha256": file_hash(path)}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-file", required=True, help="ranked responses with rewards")
    parser.add_argument("--test-file", help="held-out ones, opened once the settings are chosen; none: choose only")
    parser.add_argument("--config", default=str(ROOT / "examples" / "alpacaeval.yaml"), help="what the grid overrides")
    parser.add_argument("--folder", type=Path, required=True, help="of the trainings, 50 MB each")
    parser.add_argument("--output", type=Path, help="JSON, with a CSV beside it; printed where it is not given")
    given = parser.parse_args(words)
    base = merge(read_config(given.config), {"train_file": given.train_file})
    report, rows = held_out(base, GRID, SEEDS, given.test_file, given.folder)
    files = {"--train-file": given.train_file, "--test-file": given.test_file, "--config": given.config}
    flags = " ".join(f"{flag} {os.path.basename(path)}" for flag, path in files.items() if path is not None)
    report = {"command": f"python -m benchmarks.heldout {flags} --folder FOLDER --output JSON", **report}
    if given.output is None:
        print(json.dumps(report, indent=1))
        return
    write_json(str(given.output), report)
    if rows:
        with given.output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
