"""What a run of `clha-fast table2` found, kept with all that repeats it, and shown in docs/table2.md.

python -m benchmarks.table2 runs/table2-cpu examples/table2_cpu.yaml runs/pairs runs/triples --commit COMMIT
python -m benchmarks.table2 --render
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import cpu_environment, versions
from benchmarks.render import ROOT, _fill
from clha_fast.evaluation.comparison_tables import figure_named, shown

RESULT = ROOT / "benchmarks" / "results" / "table2_cpu.json"
PAGE = ROOT / "docs" / "table2.md"
MARKS = ("<!-- table2: rendered by benchmarks/table2.py -->", "<!-- /table2 -->")
SHOWN = ("bleu", "nll", "accuracy", "words", "empty")


def collect(folder: Path, config: Path, data: list[Path], commit: str) -> dict[str, Any]:
    """The run's rows, and its configuration, data and machine."""
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    sources = {}
    for place in data:
        summary = json.loads((place / "prepare.json").read_text(encoding="utf-8"))
        sources[place.name] = {name: summary[name] for name in ("settings", "files", "written")}
    environment = {**cpu_environment(), **versions("transformers", "accelerate", "scipy", "nltk", "sacrebleu")}
    return {
        "environment": {**environment, "commit": commit},
        "config": yaml.safe_load(config.read_text(encoding="utf-8")),
        "data": sources,
        **{name: table[name] for name in ("criterion", "reward_models", "notes", "rows")},
    }


def page(found: dict[str, Any]) -> str:
    """The table of the documentation."""
    titles = [figure_named(name).title for name in SHOWN]
    header = ["n", "method", *titles, "kept in training", "learning rate"]
    lines = [header, ["---"] * len(header)]
    for row in found["rows"]:
        total = row["figures"]["Total"]
        cells = [shown(total.get(name), figure_named(name).digits) for name in SHOWN]
        kept, rate = row.get("kept_share"), row.get("learning_rate")
        share = "-" if kept is None else f"{100 * kept:.0f}%"
        lines.append([row["length"], row["label"], *cells, share, "-" if rate is None else f"{rate:g}"])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = len(found["config"]["seeds"])
    environment = found["environment"]
    machine = f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}"
    notes = "\n".join(f"- {note[0].upper()}{note[1:]}" for note in found["notes"])
    return f"{text}\n\n{seeds} seeds; {machine}, commit {environment['commit']}.\n\n{notes}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the output folder of the run")
    parser.add_argument("config", type=Path, nargs="?", help="its configuration")
    parser.add_argument("data", type=Path, nargs="*", help="the folders of clha-fast prepare")
    parser.add_argument("--commit", default="unknown", help="of the library that ran")
    parser.add_argument("--render", action="store_true", help="fill the page from what is kept")
    given = parser.parse_args()
    if not given.render:
        found = collect(given.folder, given.config, given.data, given.commit)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(_fill(PAGE.read_text(encoding="utf-8"), MARKS, page(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
