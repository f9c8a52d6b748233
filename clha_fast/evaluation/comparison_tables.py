"""A comparison's rows as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from clha_fast.evaluation.report import FIGURES, NO_SUBSET, REWARD, TOTAL, Figure, figures_of
from clha_fast.evaluation.tables import fixed


def shown(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean with its interval, "-" for what is not there."""
    if found is None or found["value"] is None:
        return "-"
    text = fixed(found["value"], digits)
    return text if found["low"] is None else f"{text} [{fixed(found['low'], digits)}, {fixed(found['high'], digits)}]"


def figure_named(name: str) -> Figure:
    """A figure of `report.FIGURES`, or a reward model's column."""
    return FIGURES[name] if name in FIGURES else figures_of({name: []})[name]


def markdown(rows: Sequence[Mapping[str, Any]], subsets: Sequence[str]) -> str:
    """Rows as Markdown in the shape of the paper's Table 2: BLEU and reward by subset, then what stands beside them.

    Args:
        rows: `length`, `label`, `figures` (as `results.spreads`), `seeds`, `learning_rate`, `kept_share`, `gate_share`,
            `scored_tokens`; or `error`, why there are no figures.
    """
    present: dict[str, None] = {}
    for row in rows:
        present.update(dict.fromkeys(row.get("figures", {}).get(TOTAL, {})))
    main = [name for name in present if name == "bleu" or name.startswith(REWARD)]
    main.sort(key=lambda name: name != "bleu")
    text = []
    if main:
        places = [(part, name) for part in (*subsets, TOTAL) for name in main]
        header = ["n", "method", *(f"{part or NO_SUBSET}: {figure_named(name).title}" for part, name in places)]
        text.append(_pipes(header, [_cells(row, places) for row in rows]))
    beside = [name for name in present if name not in main]
    titles = [figure_named(name).title for name in beside]
    header = ["n", "method", *titles, "kept in training", "open gates", "scored tokens", "learning rate", "seeds"]
    lines = [[*_cells(row, [(TOTAL, name) for name in beside]), *_setup(row)] for row in rows]
    text.append(_pipes(header, lines))
    return "\n\n".join(text) + "\n"


def _cells(row: Mapping[str, Any], places: Sequence[tuple[str, str]]) -> list[str]:
    figures = row.get("figures", {})
    cells = [shown(figures.get(name, {}).get(measure), figure_named(measure).digits) for name, measure in places]
    return [str(row["length"]), row_label(row), *cells]


def _setup(row: Mapping[str, Any]) -> list[str]:
    def share(name: str) -> str:
        value = row.get(name)
        return "-" if value is None else f"{100 * value:.0f}%"

    rate, tokens = row.get("learning_rate"), row.get("scored_tokens")
    return [
        share("kept_share"),
        share("gate_share"),
        "-" if tokens is None else f"{tokens:,.0f}",
        "-" if rate is None else f"{rate:g}",
        str(len(row.get("seeds") or ())) if row.get("seeds") else "-",
    ]


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def row_label(row: Mapping[str, Any]) -> str:
    """How a row is called among those of its ranking length: its method, and what was done to the training data."""
    noise = f", {noise_text(row['corruption'])}" if row.get("corruption") else ""
    return f"{row['label']}{noise}"


def noise_text(corruption: Mapping[str, Any] | None) -> str:
    """How a table calls what was done to the training data."""
    if corruption is None:
        return "clean"
    what = "flips" if corruption["kind"] == "flips" else "reward noise, sd"
    return f"{what} {corruption['rate']:g}"


def differences_markdown(found: Sequence[Mapping[str, Any]], against: str, names: Sequence[str]) -> str:
    """Paired differences from the method called `against`, as Markdown; an interval without 0 is bold."""
    present = [name for name in names if any(name in row["differences"] for row in found)]
    noisy = any(row["corruption"] is not None for row in found)
    header = ["n", *(["training data"] if noisy else []), f"less {against}", *(figure_named(m).title for m in present)]
    rows = []
    for row in found:
        cells = [str(row["length"]), *([noise_text(row["corruption"])] if noisy else []), row["label"]]
        for name in present:
            spread = row["differences"].get(name)
            text = shown(spread, figure_named(name).digits + 1)
            clear = spread is not None and spread["low"] is not None and (spread["low"] > 0 or spread["high"] < 0)
            cells.append(f"**{text}**" if clear else text)
        rows.append(cells)
    seeds = sorted({len(row["seeds"]) for row in found})
    if seeds == [1]:
        text = "1 seed: 95% intervals over prompts alone, paired; bold where 0 lies outside."
    else:
        count = " or ".join(map(str, seeds)) or "0"
        text = f"{count} seeds; 95% intervals over seeds and prompts, paired; bold where 0 lies outside."
    return f"{_pipes(header, rows)}\n\n{text}\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a (row, subset, figure): mean, low, high, and the seeds' own values.

    `corruption` and `rate` say what was done to the training data; "" and 0.0 are clean ones.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    of_row, of_figure = ("length", "method", "label", "corruption", "rate"), ("value", "low", "high", "seeds")
    writer.writerow([*of_row, "subset", "figure", *of_figure])
    for row in rows:
        corruption = row.get("corruption") or {"kind": "", "rate": 0.0}
        which = [row["length"], row["method"], row["label"], corruption["kind"], repr(float(corruption["rate"]))]
        for subset, figures in row.get("figures", {}).items():
            for name, found in figures.items():
                values = ["" if found[key] is None else repr(found[key]) for key in ("value", "low", "high")]
                seeds = " ".join("" if value is None else repr(value) for value in found["seeds"])
                writer.writerow([*which, subset, name, *values, seeds])
    return out.getvalue()
