"""What a run shows for itself, as pictures."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Panel(NamedTuple):
    """One picture of a run: its title with the unit, and per line a key of the log, a label and a colour.

    Attributes:
        bounds: of the vertical axis, where the figure has any.
    """

    title: str
    lines: tuple[tuple[str, str, str], ...]
    bounds: tuple[float, float] | None = None


PANELS = (
    Panel("loss (nats)", (("loss", "", "C0"),)),
    Panel("ranking accuracy (kept pairs)", (("rewards/accuracies", "", "C0"),), (-0.03, 1.03)),
    Panel("Kendall's tau (all ordered pairs)", (("kendall_tau", "", "C0"),), (-1.05, 1.05)),
    Panel("margin, better less worse (nats a token)", (("rewards/margins", "", "C0"),)),
    Panel(
        "log-probability of kept pairs (nats a token)",
        (("logps/chosen", "better", "C0"), ("logps/rejected", "worse", "C1")),
    ),
    Panel("terms of the loss (nats)", (("rank_loss", "rank", "C0"), ("sft_loss", "SFT", "C1"))),
)
REWARD_PANELS = (
    PANELS[0],
    Panel("accuracy (all pairs)", (("rewards/accuracies", "", "C0"),), (-0.03, 1.03)),
    Panel("margin, reward of the better less the worse", (("rewards/margins", "", "C0"),)),
)
ROLLOUT_PANELS = (
    Panel("reward (mean over answers)", (("reward", "", "C0"),)),
    Panel("tokens an answer", (("answer_tokens", "", "C0"),)),
    Panel(
        "share of answers",
        (("unfinished_share", "unfinished", "C0"), ("empty_share", "empty", "C1")),
        (-0.03, 1.03),
    ),
    Panel("loss", (("loss", "", "C0"),)),
    Panel("ratios that are clipped (share of tokens)", (("clip_share", "", "C0"),)),
)
_COLUMNS = 3


class Series(NamedTuple):
    """Points (step, value) of one key: in training, means since the line before; held out, at each evaluation."""

    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def series_of(
    log: Sequence[Mapping[str, Any]], before: Mapping[str, float], after: Mapping[str, float], key: str
) -> Series:
    """The points of a run's log; `before` and `after` stand at its ends."""
    last = max((int(line["step"]) for line in log), default=0)
    training = [(int(line["step"]), line[key]) for line in log if "loss" in line and line.get(key) is not None]
    name = f"eval_{key}"
    held = {int(line["step"]): line[name] for line in log if line.get(name) is not None and 0 < line["step"] < last}
    # Where an earlier step's weights are back, what was measured is theirs.
    end = int(after.get("eval_step", last))
    for step, found in ((0, before), (end, after)):
        if found.get(name) is not None:
            held[step] = found[name]
    return Series(training, sorted(held.items()))


def can_plot() -> bool:
    """Whether matplotlib (the plot extra) is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def loss_curve(
    log: Sequence[Mapping[str, Any]], before: Mapping[str, float], after: Mapping[str, float], path: str
) -> None:
    """Draw `PANELS` over the steps of a run's log, training and held out, as a PNG.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    _figure(log, before, after, PANELS).savefig(path, dpi=120, format="png")


def curves_svg(
    log: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    panels: Sequence[Panel] = PANELS,
) -> str:
    """`panels` as an <svg> element, to stand in a page; two calls give the same text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "clha-fast", "svg.fonttype": "none"}):
        figure = _figure(log, before, after, panels)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(
    log: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    panels: Sequence[Panel],
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, _COLUMNS).flat
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(places, panels, strict=False):
        drawn = False
        for (key, label, colour), marker in zip(panel.lines, "os", strict=False):
            training, held_out = series_of(log, before, after, key)
            name = f"{label}, " if label else ""
            style: dict[str, Any] = {"color": colour}
            if training:
                # A line of one point is not seen.
                thin = {**style, "alpha": 0.55, "linewidth": 1.2, "marker": "x" if len(training) == 1 else None}
                axes.plot(*zip(*training, strict=True), label=f"{name}training", **thin)
            if held_out:
                # Two points say nothing of what lies between them.
                line = f"{marker}--" if len(held_out) > 2 else marker
                axes.plot(*zip(*held_out, strict=True), line, label=f"{name}held out", markersize=5, **style)
            drawn = drawn or bool(training or held_out)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if panel.bounds is not None:
            axes.set_ylim(*panel.bounds)
        if drawn:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "no figures", ha="center", va="center", transform=axes.transAxes, color="0.4")
    return figure
