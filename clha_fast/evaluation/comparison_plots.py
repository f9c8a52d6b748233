"""Pictures of a comparison: training curves of every method, and the figures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clha_fast.evaluation.comparison_tables import figure_named
from clha_fast.evaluation.report import TOTAL

# Key in a line of the log -> how the panel is called.
_PANELS = {
    "rewards/margins": "margin s_i - s_j, nats a token",
    "rewards/accuracies": "ranking accuracy, kept pairs",
    "logps": "likelihood, nats a token",
    "noise": "noise: pairs dropped, share",
}


def training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str) -> None:
    """Margin, accuracy, likelihood of chosen (solid) and rejected (dashed), and noise share over the steps, as a PNG.

    Args:
        logs: label -> the lines of a run's log.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(picture)
    panels = dict(zip(_PANELS, picture.subplots(2, 2).flat, strict=True))
    for number, (label, log) in enumerate(logs.items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "linewidth": 1.4}
        lines = [line for line in log if "loss" in line]
        for key in ("rewards/margins", "rewards/accuracies"):
            _draw(panels[key], lines, key, style, label)
        _draw(panels["logps"], lines, "logps/chosen", style, label)
        _draw(panels["logps"], lines, "logps/rejected", {**style, "linestyle": "--"}, None)
        # A method that ranks nothing keeps no pair, which is not noise.
        ranks = [line for line in lines if line.get("kept_pair_share")]
        dropped = [{**line, "noise": 1 - line["kept_pair_share"]} for line in ranks]
        _draw(panels["noise"], dropped, "noise", style, label)
    for key, axes in panels.items():
        axes.set_title(_PANELS[key] + (" (chosen solid, rejected dashed)" if key == "logps" else ""), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    for key in ("rewards/accuracies", "noise"):
        panels[key].set_ylim(-0.03, 1.03)
    handles, labels = panels["rewards/margins"].get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)
    picture.savefig(path, dpi=120, format="png")


def _draw(axes: Any, lines: Sequence[Mapping[str, Any]], key: str, style: Mapping[str, Any], label: str | None) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style, label=label, marker="." if len(points) < 12 else None)


def figure_bars(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: str) -> None:
    """Each figure over all test prompts, a line a method, with its interval, as a PNG.

    Args:
        rows: as `results.markdown`. names: of `results.FIGURES`.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    rows = [row for row in rows if row.get("figures")]
    names = [name for name in names if any(name in row["figures"][TOTAL] for row in rows)]
    if not names:
        return
    picture = Picture(figsize=(3.4 * len(names) + 1.2, 0.34 * len(rows) + 1.3), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, len(names), sharey=True, squeeze=False)[0]
    several = len({row["length"] for row in rows}) > 1
    labels = [f"{row['label']}, n = {row['length']}" if several else str(row["label"]) for row in rows]
    for axes, name in zip(panels, names, strict=True):
        for at, row in enumerate(rows):
            found = row["figures"][TOTAL].get(name)
            if found is None or found["value"] is None:
                continue
            axes.plot([found["value"]], [at], "o", color="C0")
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [at, at], "-", color="C0", linewidth=2, alpha=0.6)
        axes.set_title(figure_named(name).title, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), labels)
    panels[0].invert_yaxis()
    picture.savefig(path, dpi=120, format="png")
