"""The demo's settings, chosen on splits of its training part alone, and what they give on the prompts it holds out.

python -m benchmarks.demo --folder runs/demo --output benchmarks/results/demo.json

A setting is judged on prompts set aside from the demo's training part: of those under which the better answers lose
less than one nat a token of their log-probability, the one with the most kept pairs ranked right is chosen. Only then
are the prompts that the demo holds out looked at, with several seeds of the model. A run that is stopped goes on.

python -m benchmarks.demo --picture demo-run/metrics.json    # docs/demo.png, of a demo that has run
python -m benchmarks.demo --render                           # the section of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback
from transformers.utils import logging

from benchmarks.measure import cpu_environment, versions
from benchmarks.render import ROOT, _fill
from clha_fast.cli.demo import SECOND, first_part
from clha_fast.cli.options import merge, split
from clha_fast.data.split import split_records
from clha_fast.experiments.run import Run
from clha_fast.files import write_json

RESULT = ROOT / "benchmarks" / "results" / "demo.json"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- demo: rendered by benchmarks/demo.py -->", "<!-- /demo -->")
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
        (1.0, 0.5, 1e-3, 3),
        (0.3, 1.0, 5e-4, 3),
    )
}
SPLITS = (11, 12)
MOST_LOST = 1.0  # nats a token of the better answers' log-probability
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
    """A run whose held-out prompts are the demo's, or of whose training part alone some are set aside, by a number."""

    aside: int | None

    def split(self, records: Any, held_out: Any) -> None:
        train, held_out = split_records(records, SECOND["eval_fraction"], SECOND["seed"])
        self.train_records, self.held_out = (
            (train, held_out) if self.aside is None else split_records(train, 0.25, self.aside)
        )


def _trained(settings: Mapping[str, Any], folder: Path, name: str, aside: int | None) -> dict[str, Any]:
    """Figures before and after, CPU seconds; read where they are there already."""
    result = folder / f"{name.replace(', ', '_').replace(' ', '-')}-{aside}-{settings['seed']}.json"
    if result.exists():
        return json.loads(result.read_text())
    base = folder / f"base-{aside}-{settings['seed']}"
    options = merge(settings, {"output_dir": str(folder / f"run-{os.getpid()}"), "model": str(base)})
    run_options, config, _ = split(
        {key: value for key, value in options.items() if key not in ("model_config", "build_tokenizer")}
    )
    run = _Part(run_options, config)
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


def choice(rows: Mapping[str, Any]) -> str:
    """The setting with the most kept pairs right of those that lose less than `MOST_LOST`.

    Raises:
        ValueError: every one loses more.
    """
    fluent = {
        name: row["after"]["accuracy"]
        for name, row in rows.items()
        if row["after"]["better"] > row["before"]["better"] - MOST_LOST
    }
    if not fluent:
        raise ValueError(
            f"settings: expected one that loses less than {MOST_LOST} nats a token, got no setting that does"
        )
    return max(fluent, key=lambda name: fluent[name])


def choose(folder: Path) -> dict[str, Any]:
    """Every setting's figures, means over the splits, and the one that is chosen."""
    rows = {}
    for name, changes in GRID.items():
        runs = [_trained({**SECOND, **QUIET, **changes}, folder, name, aside) for aside in SPLITS]
        rows[name] = {part: {key: _mean(runs, part, key) for key in SHOWN} for part in ("before", "after")}
    return {"splits": list(SPLITS), "settings": rows, "chosen": choice(rows)}


# ---- what is shown ----


def page(report: Mapping[str, Any]) -> str:
    """Markdown: every setting on the prompts set aside, and the chosen one on the demo's held-out prompts."""
    columns = "kept pairs right | Kendall's tau | better answers | worse answers"
    first = next(iter(report["settings"].values()))["before"]
    lines = [
        f"| means of {len(report['splits'])} splits | {columns} |",
        "|---|---|---|---|---|",
        _row("the language model before", first),
    ]
    for name, row in report["settings"].items():
        lines.append(_row(f"**{name}** (chosen)" if name == report["chosen"] else name, row["after"]))
    lines += [
        "",
        f"| the demo's held-out prompts | {columns} |",
        "|---|---|---|---|---|",
    ]
    for seed, found in report["held_out"].items():
        lines += [_row(f"seed {seed}, {part}", found[part]) for part in ("before", "after")]
    e, runs = report["environment"], list(report["held_out"].values())
    seconds = sum(run["cpu_seconds"] + run["language_model"]["cpu_seconds"] for run in runs) / len(runs)
    lines += [
        "",
        f"Log-probabilities in nats a token, means over the two sides of the kept pairs. Both parts of a training took "
        f"{seconds:.0f} seconds of CPU time. `python -m benchmarks.demo`, {e['date']}: {e['cpu']}, {e['threads']} "
        f"thread{'s' if e['threads'] > 1 else ''}, torch {e['torch']}, transformers {e['versions']['transformers']}.",
    ]
    return "\n".join(lines)


def _row(name: str, found: Mapping[str, float]) -> str:
    cells = (f"{found['accuracy']:.3f}", f"{found['tau']:.3f}", f"{found['better']:.2f}", f"{found['worse']:.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def picture(metrics: Mapping[str, Any], path: Path) -> None:
    """A demo's evaluations over its steps: ranking accuracy, and the log-probability of both sides."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    held_out = {line["step"]: line for line in metrics["log"] if "eval_loss" in line}
    last = max(line["step"] for line in metrics["log"])
    held_out |= {0: metrics["before"], last: metrics["after"]}
    steps = sorted(held_out)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), dpi=110, layout="constrained")
    left.plot(steps, [held_out[step]["eval_rewards/accuracies"] for step in steps], "o-")
    left.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    left.set(title="held-out pairs ranked right", xlabel="step", ylabel="share of the kept pairs", ylim=(0, 1))
    for key, label in (("chosen", "better answers"), ("rejected", "worse answers")):
        right.plot(steps, [held_out[step][f"eval_logps/{key}"] for step in steps], "o-", label=label)
    right.set(title="their log-probability", xlabel="step", ylabel="nats a token")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the trainings")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON")
    parser.add_argument("--picture", type=Path, help="metrics.json of a demo")
    parser.add_argument("--render", action="store_true", help="the section of docs/benchmarks.md, from the JSON")
    given = parser.parse_args()
    if given.picture:
        picture(json.loads(given.picture.read_text()), PAGE.with_name("demo.png"))
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        logging.set_verbosity_error()
        about = {**cpu_environment(), "versions": versions("torch", "transformers")}
        report: dict[str, Any] = {"environment": about, **choose(given.folder)}
        name = report["chosen"]
        setting = {**SECOND, **QUIET, **GRID[name]}
        report["held_out"] = {
            str(seed): _trained({**setting, "seed": seed}, given.folder, name, None) for seed in SEEDS
        }
        write_json(str(given.output), report)
    if given.render:
        PAGE.write_text(_fill(PAGE.read_text(), MARKS, page(json.loads(given.output.read_text()))))


if __name__ == "__main__":
    main()
