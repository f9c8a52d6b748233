"""Figures of a comparison from its cells' assessments, and the tables in which they are shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha_fast.evaluation.spread import Spread, over_seeds_and_prompts, paired_difference

TOTAL = "Total"


@dataclass(frozen=True)
class Figure:
    """A figure as a ratio of sums over prompts.

    Attributes:
        top, bottom: entries of an assessment's `values`; None counts prompts. scale: factor on the ratio.
        better: +1 where more is better, -1 where less is, 0 where neither.
    """

    title: str
    top: str
    bottom: str | None = None
    scale: float = 1.0
    better: int = 0


FIGURES = {
    "bleu": Figure("BLEU (published)", "bleu", better=1),
    "reward": Figure("reward", "reward", better=1),
    "raw_reward": Figure("raw reward", "raw_reward", better=1),
    "nll": Figure("NLL of the best answer, nats a token", "nll", "nll_tokens", better=-1),
    "accuracy": Figure("ranking accuracy, all ordered pairs", "correct", "ordered", better=1),
    "kept_accuracy": Figure("ranking accuracy, kept pairs", "kept_correct", "kept", better=1),
    "tau": Figure("Kendall's tau", "concordance", "ordered", better=1),
    "words": Figure("words an answer", "words"),
    "empty": Figure("empty answers, %", "empty", scale=100.0, better=-1),
    "unfinished": Figure("answers cut off, %", "unfinished", scale=100.0, better=-1),
}
# Of all answers of a seed together; no sum over prompts, so no interval over them.
CORPUS = {"corpus_bleu": "corpus BLEU", "distinct_2": "distinct-2"}


def matrices(
    assessments: Sequence[Mapping[str, Any]], figure: Figure, subset: str = TOTAL
) -> tuple[np.ndarray, np.ndarray] | None:
    """(top, bottom) [seeds, prompts] of one figure; None where an assessment lacks it.

    Args:
        assessments: of one method, a seed each, over the same prompts.
    """
    tops, bottoms = [], []
    for found in assessments:
        values = found["values"]
        if figure.top not in values or (figure.bottom is not None and figure.bottom not in values):
            return None
        chosen = [subset in (TOTAL, name) for name in found["subsets"]]
        top = _array(values[figure.top])[chosen] * figure.scale
        tops.append(top)
        bottoms.append(np.ones_like(top) if figure.bottom is None else _array(values[figure.bottom])[chosen])
    return np.stack(tops), np.stack(bottoms)


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def figures_of(assessments: Sequence[Mapping[str, Any]], subsets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """subset -> figure -> `Spread` as a dictionary, `TOTAL` over all prompts among them."""
    found: dict[str, dict[str, Any]] = {}
    for subset in (*subsets, TOTAL):
        here = found.setdefault(subset, {})
        for name, figure in FIGURES.items():
            arrays = matrices(assessments, figure, subset)
            if arrays is not None and arrays[0].size:
                here[name] = over_seeds_and_prompts(*arrays).as_dict()
        for name in CORPUS:
            each = [(part.get("corpus") or {}).get(subset, {}).get(name) for part in assessments]
            known = [value for value in each if value is not None]
            if known:
                here[name] = Spread(sum(known) / len(known), None, None, tuple(each)).as_dict()
    return found


def difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str, subset: str = TOTAL
) -> Spread | None:
    """A figure of one method less another's, paired by seed and prompt; None where either lacks it.

    Raises:
        ValueError: other prompts, or another number of seeds.
    """
    if [part["prompts"] for part in ours] != [part["prompts"] for part in theirs]:
        raise ValueError("assessments: expected the same prompts and seeds on both sides, got different ones")
    figure = FIGURES[name]
    left, right = matrices(ours, figure, subset), matrices(theirs, figure, subset)
    if left is None or right is None or not left[0].size:
        return None
    return paired_difference(left, right)


def shown(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean with its interval, "-" for what is not there."""
    if found is None or found["mean"] is None:
        return "-"
    text = f"{found['mean']:.{digits}f}"
    return text if found["low"] is None else f"{text} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


_DIGITS = {"bleu": 1, "reward": 1, "words": 0, "empty": 1, "unfinished": 1, "corpus_bleu": 2}


def markdown(rows: Sequence[Mapping[str, Any]], subsets: Sequence[str]) -> str:
    """Rows as Markdown in the shape of the paper's Table 2: BLEU and reward by subset, then what stands beside them.

    Args:
        rows: `length`, `label`, `figures` (as `figures_of`), `seeds`, `learning_rate`, `kept_share`, `gate_share`,
            `scored_tokens`; or `error`, why there are no figures.
    """
    names = [*subsets, TOTAL] if list(subsets) != [TOTAL] else [TOTAL]
    rewarded = any("reward" in row.get("figures", {}).get(TOTAL, {}) for row in rows)
    generated = any("bleu" in row.get("figures", {}).get(TOTAL, {}) for row in rows)
    text = []
    if generated:
        measures = ["bleu", *(["reward"] if rewarded else [])]
        header = ["n", "method", *(f"{name} {FIGURES[m].title}" for name in names for m in measures)]
        text.append(_pipes(header, [_cells(row, [(n, m) for n in names for m in measures]) for row in rows]))
    beside = ["nll", "accuracy", "kept_accuracy", "tau", "words", "empty", "unfinished", "corpus_bleu", "distinct_2"]
    present = [m for m in beside if any(m in row.get("figures", {}).get(TOTAL, {}) for row in rows)]
    titles = [FIGURES[m].title if m in FIGURES else CORPUS[m] for m in present]
    header = ["n", "method", *titles, "kept pairs", "open gates", "scored tokens", "learning rate", "seeds"]
    lines = [[*_cells(row, [(TOTAL, m) for m in present]), *_setup(row)] for row in rows]
    text.append(_pipes(header, lines))
    return "\n\n".join(text) + "\n"


def _cells(row: Mapping[str, Any], places: Sequence[tuple[str, str]]) -> list[str]:
    figures = row.get("figures", {})
    cells = [shown(figures.get(name, {}).get(measure), _DIGITS.get(measure, 3)) for name, measure in places]
    noise = f", {noise_text(row['corruption'])}" if row.get("corruption") else ""
    return [str(row["length"]), f"{row['label']}{noise}", *cells]


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
    header = ["n", *(["training data"] if noisy else []), f"less {against}", *(FIGURES[m].title for m in present)]
    rows = []
    for row in found:
        cells = [str(row["length"]), *([noise_text(row["corruption"])] if noisy else []), row["label"]]
        for name in present:
            spread = row["differences"].get(name)
            text = shown(spread, _DIGITS.get(name, 3))
            clear = spread is not None and spread["low"] is not None and (spread["low"] > 0 or spread["high"] < 0)
            cells.append(f"**{text}**" if clear else text)
        rows.append(cells)
    seeds = sorted({len(row["seeds"]) for row in found})
    count = " or ".join(map(str, seeds)) or "0"
    text = f"{count} seeds; 95% intervals over seeds and prompts, paired; bold where 0 lies outside."
    return f"{_pipes(header, rows)}\n\n{text}\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a (row, subset, figure): mean, low, high, and the seeds' own values."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["length", "method", "label", "subset", "figure", "mean", "low", "high", "seeds"])
    for row in rows:
        for subset, figures in row.get("figures", {}).items():
            for name, found in figures.items():
                values = ["" if found[key] is None else repr(found[key]) for key in ("mean", "low", "high")]
                seeds = " ".join("" if value is None else repr(value) for value in found["seeds"])
                writer.writerow([row["length"], row["method"], row["label"], subset, name, *values, seeds])
    return out.getvalue()
