"""What a run shows for itself, as pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any


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
