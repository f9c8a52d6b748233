"""`report.html`: what a run was, and what came of it, on one page that loads nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clha_fast.evaluation import plots
from clha_fast.evaluation.tables import Result, number
from clha_fast.reports import page

REPORT_FILE = "report.html"
_MOST_ROWS = 40  # of a log that is shown as a table


def run_page(
    name: str,
    facts: Iterable[tuple[str, str]],
    settings: Mapping[str, Any],
    result: Result,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]] | None = None,
    panels: Sequence[plots.Panel] = plots.PANELS,
) -> str:
    """The page of one training run.

    Args:
        facts: what was trained, on what, how. settings: those that are not the defaults.
        result: what the command prints of the held-out prompts; before, after: evaluation metrics, {} without any.
        log: a trainer's `state.log_history`. samples: lines of `samples.jsonl`; None for a run that writes no answers.
        panels: what is drawn.
    """
    known = [row for row in result.rows if any(cell not in ("", "-") for cell in row[1:])]
    notes = "\n".join(
        page.paragraph(f"{note[0].upper()}{note[1:]}".removesuffix(".") + ".", "note") for note in result.notes
    )
    return page.page(
        f"Training run: {name}",
        [
            page.section("What was trained", page.facts(facts)),
            page.section(
                "Held out, before and after",
                page.table(result.header, known, "figures on the prompts that were held out"),
                notes,
            ),
            page.section("Along the way", _curves(log, before, after, panels)),
            page.section("Answers to held-out prompts", "" if samples is None else _samples(samples)),
            page.section(
                "Settings that are not the defaults",
                page.facts((key, _value(value)) for key, value in sorted(settings.items())),
            ),
        ],
    )


def read_samples(path: str) -> list[dict[str, Any]]:
    """The lines of a run's `samples.jsonl`, [] where it has none."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _curves(
    log: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    panels: Sequence[plots.Panel],
) -> str:
    if plots.can_plot():
        label = page.escape(", ".join(panel.title for panel in panels))
        svg = plots.curves_svg(log, before, after, panels)
        points = len(plots.series_of(log, before, after, panels[0].lines[0][0]).held_out)
        hint = "Held out was evaluated before and after alone; eval_strategy: steps shows what lies between."
        return (
            f'<div class="wide" role="img" aria-label="{label}, over the steps">{svg}</div>'
            f"{page.paragraph(hint if points == 2 else '', 'note')}"
        )
    keys = [(key, f"{panel.title} {label}".strip()) for panel in panels for key, label, _ in panel.lines]
    found = {key: plots.series_of(log, before, after, key) for key, _ in keys}
    tables = []
    for part, title in (("training", "Training"), ("held_out", "Held out")):
        values = {key: dict(getattr(series, part)) for key, series in found.items()}
        steps = sorted({step for points in values.values() for step in points})
        every = -(-len(steps) // _MOST_ROWS) if steps else 1
        rows = [
            [str(step), *(number(values[key].get(step)) for key, _ in keys)]
            for place, step in enumerate(steps)
            if place % every == 0 or place == len(steps) - 1
        ]
        tables.append(page.table(["step", *(name for _, name in keys)], rows, title))
    note = "Drawn where matplotlib is installed (pip install 'clha-fast[plot]')."
    return "\n".join([*filter(None, tables), page.paragraph(note, "note")])


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last answer to each prompt."""
    if not samples:
        return page.paragraph("None were asked for: eval_samples: 3 writes them at every evaluation.", "note")
    first, last = samples[0]["step"], samples[-1]["step"]
    parts = []
    for line in samples:
        if line["step"] == first:
            end = next((other for other in samples if (other["step"], other["index"]) == (last, line["index"])), None)
            shown = [line] if end is None or last == first else [line, end]
            parts.append(f"<h3>{page.escape(line['prompt'])}</h3>")
            for sample in shown:
                ended = "" if sample["finished"] else ", cut"
                judged = f", reward {number(sample['reward'])}" if "reward" in sample else ""
                parts.append(page.paragraph(f"after step {sample['step']}{ended}{judged}", "note"))
                parts.append(f"<pre>{page.escape(sample['completion']) or '(empty)'}</pre>")
    return "\n".join(parts)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
