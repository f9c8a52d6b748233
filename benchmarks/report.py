"""Files of both benchmarks: JSON after every stage, a CSV of the main table, lines of text, and the GPU's plots."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GPU_COLUMNS = (
    *("shape", "mode", "entropy", "method", "computes", "seconds", "spread", "rounds", "over_bound", "peak_bytes"),
    *("flops", "bytes", "tflops_per_second", "failed"),
)
CPU_COLUMNS = (
    *("workload", "scored_tokens", "softmax_entropy", "method", "seconds", "fastest", "spread", "over_eager"),
    *("over_bare_gemms", "peak_bytes", "gradient_bytes", "kept_block_share", "dropped_mass", "dhidden_error"),
    *("dweight_error", "status"),
)


def _rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in report.get("shapes", []):
        common = {name: entry.get(name) for name in ("shape", "mode", "entropy")}
        for method, row in entry["methods"].items():
            yield common | {"method": method} | row
    for name, workload in report.get("workloads", {}).items():
        for method, row in workload["methods"].items():
            yield workload | {"workload": name, "method": method} | row


def save(report: dict[str, Any], path: Path) -> None:
    """The report as JSON and its main table as CSV, each replaced: an interrupted run leaves its last stage behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, path)
    columns = CPU_COLUMNS if "workloads" in report else GPU_COLUMNS
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rows(report))


def keep_old(path: Path) -> None:
    """Gives an earlier run's report and table a number of their own, so that the next run replaces nothing."""
    number = 1
    while path.with_name(f"{path.stem}.{number}{path.suffix}").exists():
        number += 1
    for file in (path, path.with_suffix(".csv")):
        if file.exists():
            file.rename(file.with_name(f"{file.stem}.{number}{file.suffix}"))


def workload_table(found: dict[str, Any]) -> str:
    """One workload of a CPU as Markdown."""
    lines = [
        f"{found['shape']}; gradients {found['gradient_bytes'] / 1e6:.0f} MB; "
        f"softmax entropy {found['softmax_entropy']:.2f} nats",
        "",
        "| method | time over eager | time over three bare GEMMs | median | fastest | peak memory above inputs |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["methods"].items():
        if "status" in row:
            lines.append(f"| {name} | {row['status']} | | | | |")
            continue
        memory = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else "-"
        low, high = row.get("over_bare_gemms_quartiles", [row["over_bare_gemms"]] * 2)
        bound = f"{row['over_bare_gemms']:.3f} x [{low:.3f}, {high:.3f}]"
        times = (f"{row['seconds']:.2f} s", f"{row['fastest']:.2f} s")
        cells = (f"{row['over_eager']:.2f} x", bound, *times, memory)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def first_look(found: dict[str, Any]) -> str:
    """A GPU's first look that a path has passed, as a line of text."""
    loss, memory = found["one_loss"], found["memory"]
    peak, counted = (memory[name] / 2**20 for name in ("peak_bytes", "counted_bytes"))
    worst = max(row["error"] / row["bar"] for row in loss["rows"])
    return (
        f"right on {found['device']['name']}: largest error {worst:.2f} of its bar, {loss['seconds']} s; "
        f"peak {peak:,.0f} MiB, {counted:,.0f} counted"
    )


def shape_table(entry: dict[str, Any]) -> str:
    """One shape and mode of a GPU as lines of text."""
    entropy = "unknown" if entry["entropy"] is None else f"{entry['entropy']:.1f} nats"
    lines = [f"{entry['shape']}, {entry['mode']}, softmax entropy {entropy}"]
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


Series = dict[str, list[tuple[float, float]]]


def _over_bound(report: dict[str, Any]) -> tuple[str, str, str, Series]:
    scored = [e for e in report["shapes"] if e["mode"] == "scored"]
    series: Series = {}
    for place, entry in enumerate(scored):
        for method, row in entry["methods"].items():
            if "over_bound" in row and row["over_bound"] < 12:
                series.setdefault(method, []).append((place, row["over_bound"]))
    names = textwrap.fill("; ".join(f"{place}: {entry['shape']}" for place, entry in enumerate(scored)), 80)
    return "Forward and backward on scored tokens", names, "time over three bare GEMMs", series


def _extra(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """An extra's rows: none where it was not reached, or is the reason why there are none."""
    found = report["extras"].get(name)
    return found if isinstance(found, list) else []


def _memory(report: dict[str, Any]) -> tuple[str, str, str, Series]:
    series: Series = {}
    for row in _extra(report, "memory_over_tokens"):
        if row.get("peak_bytes"):
            series.setdefault(row["method"], []).append((row["tokens"], row["peak_bytes"] / 2**30))
    return "Peak memory above the inputs", "scored tokens", "GiB", series


def _times(report: dict[str, Any], extra: str, field: str, label: str) -> tuple[str, str, str, Series]:
    series: Series = {}
    for row in _extra(report, extra):
        for method, found in row.get("methods", {}).items():
            if "seconds" in found:
                series.setdefault(method, []).append((row[field], found["seconds"] * 1e3))
    return f"Time over {label}", label, "ms", series


PICTURES: dict[str, Callable[[dict[str, Any]], tuple[str, str, str, Series]]] = {
    "gpu_time": _over_bound,
    "gpu_memory": _memory,
    "gpu_candidates": lambda report: _times(report, "over_candidates", "candidates", "candidates a prompt"),
    "gpu_kept_share": lambda report: _times(
        report, "over_kept_share", "kept_share", "kept share of (token, block) pairs"
    ),
}


def _draw(path: Path, device: str, title: str, across: str, up: str, series: Series) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, points in series.items():
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes.set(title=f"{title} ({device})", xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def plots(report: dict[str, Any], folder: Path) -> list[str]:
    """Time over the bound, memory over N, time over n and over the kept share; a dry run is never drawn.

    A picture that fails is left out, whatever the reason, and all that failed are one sentence on stderr: what was
    measured is saved by then, and what the run says at its end must still come.
    """
    if report["dry_run"] or importlib.util.find_spec("matplotlib") is None:
        return []
    written, failed = [], []
    for name, picture in PICTURES.items():
        try:
            *words, series = picture(report)
            if any(series.values()):
                _draw(folder / f"{name}.png", report["environment"]["device"], *words, series)
                written.append(f"{name}.png")
        except Exception as failure:
            reason = next(iter(str(failure).strip().splitlines()), "")
            failed.append(f"{name}.png ({type(failure).__name__}: {reason})")
    if failed:
        print(f"benchmarks.gpu: not drawn: {', '.join(failed)}; the figures are saved", file=sys.stderr)
    return written
