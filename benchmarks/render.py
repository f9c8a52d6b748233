"""Renders the README's table from committed results: `python -m benchmarks.render` (`--check` only compares)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
START, END = "<!-- cpu-table: rendered by benchmarks/render.py -->", "<!-- /cpu-table -->"
LABELS = {
    "clha_fast_torch": "**clha-fast, torch backend**",
    "eager": "eager, scored tokens only",
    "torch_linear_cross_entropy": "`F.linear_cross_entropy`, then the ranking loss",
    "published": "published code's way: all tokens, one forward a candidate",
    "bare_gemms": "three bare matrix products, no loss at all (the bound)",
}


def render(report: dict[str, Any]) -> str:
    """Markdown of the report: one table a workload, its origin below."""
    parts = []
    for workload in report["workloads"].values():
        methods = workload["methods"]
        lines = [
            f"{workload['shape']}; the gradients alone are {workload['gradient_bytes'] / 1e6:.0f} MB.",
            "",
            "| forward + backward of the loss | time over eager | peak memory above inputs |",
            "|---|---|---|",
        ]
        for name, label in LABELS.items():
            if name in methods:
                row = methods[name]
                memory = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else "-"
                lines.append(f"| {label} | {row['over_eager']:.2f} x | {memory} |")
        parts.append("\n".join(lines))
    e = report["environment"]
    origin = (
        f"Measured by `make bench-cpu` on {e['date']}: {e['cpu']}, {e['threads']} threads, torch {e['torch']}, "
        f"commit {e['commit']}; medians of interleaved rounds. GPU: not measured."
    )
    return "\n\n".join([*parts, origin])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the README is not what would be rendered")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n{render(json.loads(RESULTS.read_text()))}\n{END}{after}"
    if args.check and new != text:
        raise SystemExit("README.md: the CPU table is not the one that benchmarks/results/cpu.json renders to")
    readme.write_text(new)


if __name__ == "__main__":
    main()
