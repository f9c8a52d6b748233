"""Pictures of a comparison: training curves of every method, and the figures with their intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clha_fast.evaluation.comparison_tables import figure_named, row_label
from clha_fast.evaluation.report import TOTAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

# Key in a line of the log -> how the panel is called.
_PANELS = {
    "rewards/margins": "margin s_i - s_j, nats a token",
    "rewards/accuracies": "ranking accuracy, kept pairs",
    "logps": "likelihood, nats a token",
    "noise": "noise: pairs dropped, share",
}


def training_curves(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str, ranking: Collection[str] | None = None
) -> None:
    """`curves_picture` as a PNG.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    curves_picture(logs, ranking).savefig(path, dpi=120, format="png")


def curves_picture(logs: Mapping[str, Sequence[Mapping[str, Any]]], ranking: Collection[str] | None = None) -> Picture:
    """Margin, accuracy, likelihood of chosen (solid) and rejected (dashed), and noise share over the steps.

    Args:
        logs: label -> the lines of a run's log.
        ranking: labels of methods that rank: of the others, which keep no pair, there is no noise. None is all that
            have kept a pair at some step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(picture)
    panels = dict(zip(_PANELS, picture.subplots(2, 2).flat, strict=True))
    for color, (label, log) in zip(_colors(len(logs)), logs.items(), strict=True):
        style: dict[str, Any] = {"color": color, "linewidth": 1.4}
        lines = [line for line in log if "loss" in line]
        for key in ("rewards/margins", "rewards/accuracies"):
            _draw(panels[key], lines, key, style, label)
        _draw(panels["logps"], lines, "logps/chosen", style, label)
        _draw(panels["logps"], lines, "logps/rejected", {**style, "linestyle": "--"}, None)
        counted = [line for line in lines if line.get("kept_pair_share") is not None]
        if any(line["kept_pair_share"] for line in counted) if ranking is None else label in ranking:
            dropped = [{**line, "noise": 1 - line["kept_pair_share"]} for line in counted]
            _draw(panels["noise"], dropped, "noise", style, label)
    for key, axes in panels.items():
        axes.set_title(_PANELS[key] + (" (chosen solid, rejected dashed)" if key == "logps" else ""), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    for key in ("rewards/accuracies", "noise"):
        panels[key].set_ylim(-0.03, 1.03)
    # A method need not have a line in every panel.
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels.values()]
    found = {label: handle for pair in pairs for handle, label in pair}
    names = [label for label in logs if label in found]
    if names:
        handles = [found[label] for label in names]
        picture.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), fontsize=9)
    return picture


def _colors(count: int) -> list[Any]:
    """A colour for each of so many lines, no two alike."""
    from matplotlib import colormaps

    if count <= 10:
        return [f"C{number}" for number in range(count)]
    return [colormaps["turbo"]((number + 0.5) / count) for number in range(count)]


def _draw(axes: Any, lines: Sequence[Mapping[str, Any]], key: str, style: Mapping[str, Any], label: str | None) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style, label=label, marker="." if len(points) < 12 else None)


def figure_bars(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: str) -> bool:
    """`bars_picture` as a PNG; nothing, and False, where no row has one of the figures.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    picture = bars_picture(rows, names)
    if picture is None:
        return False
    picture.savefig(path, dpi=120, format="png")
    return True


def bars_picture(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Picture | None:
    """Each figure over all test prompts, a line a row, with its interval.

    Args:
        rows: as `comparison_tables.markdown`. names: of `report.FIGURES`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    rows = [row for row in rows if row.get("figures")]
    names = [name for name in names if any(name in row["figures"][TOTAL] for row in rows)]
    if not names:
        return None
    picture = Picture(figsize=(3.4 * len(names) + 1.2, 0.34 * len(rows) + 1.3), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, len(names), sharey=True, squeeze=False)[0]
    several = len({row["length"] for row in rows}) > 1
    labels = [f"{row_label(row)}, n = {row['length']}" if several else row_label(row) for row in rows]
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
    return picture
