"""What a run shows for itself: small tables, and the loss curve as a picture."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Key in the evaluation's metrics -> how it is called in the table.
EVALUATION_ROWS = {
    "eval_rewards/accuracies": "ranking accuracy (kept pairs)",
    "eval_kendall_tau": "Kendall's tau (all ordered pairs)",
    "eval_rewards/margins": "margin (nats a token)",
    "eval_loss": "loss",
    "eval_rank_loss": "  rank term",
    "eval_sft_loss": "  SFT term",
}


def number(value: Any) -> str:
    """Four significant digits, "-" for what is missing or undefined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_flags(text: str) -> str:
    """A message of the library in the words of the command line: `overwrite=True` is ``--overwrite`` there."""
    return re.sub(r"\b(resume|overwrite)=True\b", r"--\1", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    text = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join([text[0], "-" * (sum(widths) + 2 * len(widths) - 2), *text[1:]])


def evaluation_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Held-out metrics before and after training."""
    rows = [[name, number(before.get(key)), number(after.get(key))] for key, name in EVALUATION_ROWS.items()]
    return table(["held out", "before", "after"], rows)


def memory_table(peaks: Mapping[str, int], names: Mapping[str, str]) -> str:
    """Peak memory of loss variants; the last column is relative to the first row."""
    first = next(iter(peaks.values()))
    rows = [[names[key], f"{peak / 2**20:.1f} MiB", f"{peak / first:.1f} x"] for key, peak in peaks.items()]
    return table(["peak memory of the loss, gradients included", "above inputs", ""], rows)


def can_plot() -> bool:
    """Whether matplotlib (the plot extra) is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def loss_curve(
    log: Sequence[Mapping[str, Any]], before: Mapping[str, float], after: Mapping[str, float], path: str
) -> None:
    """Draw loss and ranking accuracy over the steps of a run's log, training and held out, as a PNG.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    last = max((int(line["step"]) for line in log), default=0)
    for axes, key, label in ((left, "loss", "loss"), (right, "rewards/accuracies", "ranking accuracy")):
        train = [(line["step"], line[key]) for line in log if "loss" in line and key in line]
        name = f"eval_{key}"
        held = [(line["step"], line[name]) for line in log if name in line and 0 < line["step"] < last]
        ends = [(step, found[name]) for step, found in ((0, before), (last, after)) if name in found]
        for points, style, title in ((train, "-", "training"), (sorted(held + ends), "o--", "held out")):
            if points:
                axes.plot(*zip(*points, strict=True), style, label=title, markersize=4)
        axes.set_xlabel("step")
        axes.set_title(label)
        axes.grid(alpha=0.3)
        if train or held or ends:
            axes.legend()
    right.set_ylim(0, 1)
    figure.savefig(path, dpi=120, format="png")
