"""Files of a GPU benchmark: JSON after every stage, a CSV of the main table, and plots."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

COLUMNS = (
    "shape",
    "mode",
    "entropy",
    "method",
    "computes",
    "seconds",
    "spread",
    "rounds",
    "over_bound",
    "peak_bytes",
    "flops",
    "bytes",
    "tflops_per_second",
    "failed",
)


def save(report: dict[str, Any], folder: Path) -> None:
    """gpu.json and gpu.csv, replaced as a whole: an interrupted run leaves its last stage behind."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "gpu.json.part"
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, folder / "gpu.json")
    with (folder / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for entry in report["shapes"]:
            common = {name: entry.get(name) for name in ("shape", "mode", "entropy")}
            for method, row in entry["methods"].items():
                writer.writerow(common | {"method": method} | row)


def table(entry: dict[str, Any]) -> str:
    """One shape and mode as lines of text."""
    lines = [f"{entry['shape']}, {entry['mode']}, softmax entropy {entry['entropy']:.1f} nats"]
    for name, row in entry["methods"].items():
        if "failed" in row:
            lines.append(f"  {name:28} {row['failed']}")
            continue
        ratio = f"{row['over_bound']:.2f} x" if "over_bound" in row else "-"
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB" if row.get("peak_bytes") else "-"
        lines.append(
            f"  {name:28} {row['seconds'] * 1e3:9.2f} ms  +-{row['spread'] * 50:4.1f}%  {ratio:>8}  {memory:>10}"
        )
    return "\n".join(lines)


def plots(report: dict[str, Any], folder: Path) -> list[str]:
    """Time over the bound, memory over N, time over n and over the kept share; a dry run is never drawn."""
    if report["dry_run"] or importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []

    def draw(name: str, title: str, across: str, up: str, series: dict[str, list[tuple[float, float]]]) -> None:
        if not any(series.values()):
            return
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for label, points in series.items():
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        axes.set(title=f"{title} ({report['environment']['device']})", xlabel=across, ylabel=up)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        figure.savefig(folder / f"{name}.png", dpi=130)
        written.append(f"{name}.png")

    scored = [e for e in report["shapes"] if e["mode"] == "scored"]
    over: dict[str, list[tuple[float, float]]] = {}
    for place, entry in enumerate(scored):
        for method, row in entry["methods"].items():
            if "over_bound" in row and row["over_bound"] < 12:
                over.setdefault(method, []).append((place, row["over_bound"]))
    names = "; ".join(f"{place}: {entry['shape']}" for place, entry in enumerate(scored))
    draw("gpu_time", "Forward and backward on scored tokens", names, "time over three bare GEMMs", over)
    extras = report["extras"]
    memory: dict[str, list[tuple[float, float]]] = {}
    for row in extras.get("memory_over_tokens", []):
        if row.get("peak_bytes"):
            memory.setdefault(row["method"], []).append((row["tokens"], row["peak_bytes"] / 2**30))
    draw("gpu_memory", "Peak memory above the inputs", "scored tokens", "GiB", memory)
    for key, name, field, label in (
        ("over_candidates", "gpu_candidates", "candidates", "candidates a prompt"),
        ("over_kept_share", "gpu_kept_share", "kept_share", "kept share of (token, block) pairs"),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in extras.get(key, []):
            for method, found in row["methods"].items():
                if "seconds" in found:
                    series.setdefault(method, []).append((row[field], found["seconds"] * 1e3))
        draw(name, f"Time over {label}", label, "ms", series)
    return written
