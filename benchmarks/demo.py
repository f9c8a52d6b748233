"""The demo's settings, chosen on splits of its training part alone, and what they give on the prompts it holds out.

python -m benchmarks.demo --folder runs/demo --output benchmarks/results/demo.json

A setting is judged on prompts set aside from the demo's training part: of those under which the better answers are on
average no less likely afterwards than before, the one with the most kept pairs ranked right. Only then are the prompts
that the demo holds out looked at, with several seeds of the model. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback
from transformers.utils import logging

from benchmarks.measure import cpu_environment, versions
from clha_fast.cli.demo import SECOND, first_part
from clha_fast.cli.options import merge, split
from clha_fast.data.split import split_records
from clha_fast.experiments.run import Run
from clha_fast.files import write_json

# Weight and margin in nats a token, learning rate, epochs.
GRID: dict[str, dict[str, Any]] = {
    f"margin {margin:g}, SFT {weight:g}, {rate:g}, {epochs} epochs": {
        "margin": margin,
        "sft_weight": weight,
        "learning_rate": rate,
        "num_train_epochs": epochs,
    }
    for margin, weight, rate, epochs in (
        (3.0, 0.05, 5e-4, 3),
        (1.0, 0.05, 5e-4, 3),
        (1.0, 0.5, 5e-4, 3),
        (0.5, 0.5, 5e-4, 3),
        (0.5, 0.5, 1e-3, 3),
        (0.5, 1.0, 1e-3, 3),
    )
}
SPLITS = (11, 12)
SEEDS = (1, 2, 3)
SHOWN = {
    "accuracy": "eval_rewards/accuracies",
    "tau": "eval_kendall_tau",
    "better": "eval_logps/chosen",
    "worse": "eval_logps/rejected",
}
QUIET = {
    "memory_report": False,
    "logging_steps": 1000,
    "eval_samples": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "overwrite": True,
}


class _Part(Run):
    """A run on the demo's training part alone, some of whose prompts are set aside by the split's number."""

    aside: int

    def split(self, records: Any, held_out: Any) -> None:
        train, _ = split_records(records, self.options.eval_fraction or 0, 1)  # the demo's own split
        self.train_records, self.held_out = split_records(train, 0.25, self.aside)


def _trained(settings: Mapping[str, Any], folder: Path, name: str, aside: int | None) -> dict[str, Any]:
    """Figures before and after, CPU seconds; read where they are there already."""
    result = folder / f"{name.replace(', ', '_').replace(' ', '-')}-{aside}-{settings['seed']}.json"
    if result.exists():
        return json.loads(result.read_text())
    base = folder / f"base-{aside}-{settings['seed']}"
    options = merge(settings, {"output_dir": str(folder / "run"), "model": str(base)})
    run_options, config, _ = split(
        {key: value for key, value in options.items() if key not in ("model_config", "build_tokenizer")}
    )
    kind = Run if aside is None else _Part
    run: Run = kind(run_options, config)
    if isinstance(run, _Part):
        run.aside = aside
    run.split(*run.read())
    start = time.process_time()
    if not (base / "done.json").exists():
        first = first_part(run, {**settings, "output_dir": str(base)})
        first.trainer.remove_callback(PrinterCallback)
        first.evaluate_before()
        first.train()
        first.report()
        nll = {name: found["eval_target_nll"] for name, found in (("before", first.before), ("after", first.after))}
        write_json(str(base / "done.json"), {**nll, "cpu_seconds": time.process_time() - start})
    start = time.process_time()
    run.build()
    run.trainer.remove_callback(PrinterCallback)
    run.evaluate_before()
    run.train()
    run.after = run.trainer.evaluate()
    found = {
        part: {short: values[key] for short, key in SHOWN.items()}
        for part, values in (("before", run.before), ("after", run.after))
    }
    found |= {
        "cpu_seconds": time.process_time() - start,
        "language_model": json.loads((base / "done.json").read_text()),
    }
    write_json(str(result), found)
    print(f"{name}, {aside}, {settings['seed']}: {json.dumps(found)}", flush=True)
    return found


def _mean(runs: list[dict[str, Any]], part: str, key: str) -> float:
    return sum(run[part][key] for run in runs) / len(runs)


def choose(folder: Path) -> dict[str, Any]:
    """Every setting's figures, means over the splits, and the one that is chosen."""
    rows = {}
    for name, changes in GRID.items():
        runs = [_trained({**SECOND, **QUIET, **changes}, folder, name, aside) for aside in SPLITS]
        rows[name] = {part: {key: _mean(runs, part, key) for key in SHOWN} for part in ("before", "after")}
    fluent = {name: row for name, row in rows.items() if row["after"]["better"] >= row["before"]["better"]}
    chosen = max(fluent or rows, key=lambda name: rows[name]["after"]["accuracy"])
    return {"splits": list(SPLITS), "settings": rows, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the trainings")
    parser.add_argument("--output", type=Path, help="JSON; printed where it is not given")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    report = {
        "environment": {**cpu_environment(), "versions": versions("torch", "transformers")},
        **choose(given.folder),
    }
    changes = GRID[report["chosen"]]
    report["held_out"] = {
        seed: _trained({**SECOND, **QUIET, **changes, "seed": seed}, given.folder, "held out", None) for seed in SEEDS
    }
    if given.output is None:
        print(json.dumps(report, indent=1))
    else:
        write_json(str(given.output), report)


if __name__ == "__main__":
    main()
