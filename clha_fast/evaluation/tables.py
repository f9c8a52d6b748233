"""What a run shows for itself, as small tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context
from typing import Any, NamedTuple

import torch

# Key in the evaluation's metrics -> how it is called in the table.
EVALUATION_ROWS = {
    "eval_rewards/accuracies": "ranking accuracy (kept pairs)",
    "eval_kendall_tau": "Kendall's tau (all ordered pairs)",
    "eval_rewards/margins": "margin (nats a token)",
    "eval_logps/chosen": "log-probability of the better side (nats a token)",
    "eval_logps/rejected": "log-probability of the worse side (nats a token)",
    "eval_loss": "loss",
    "eval_rank_loss": "  rank term",
    "eval_sft_loss": "  SFT term",
}


class Result(NamedTuple):
    """What a run found on held-out prompts: a table, and what is to be said of it."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    @property
    def text(self) -> str:
        """To be printed."""
        return "\n".join([*([table(self.header, self.rows)] if self.rows else []), *self.notes])


NO_RESULT = Result([], [], ["no held-out set: not evaluated"])


def number(value: Any) -> str:
    """Four significant digits, "-" for what is missing or undefined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fixed(value: float, digits: int) -> str:
    """With so many digits behind the point; what rounds to zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


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


def margin_of(gap: float, digits: int = 3) -> str:
    """A reward margin of so many digits that drops a gap of float32: the nearest, else the one above.

    To the nearest alone, all pairs of a gap that many have might be kept.
    """
    nearest = f"{gap:.{digits}g}"
    if torch.tensor(float(nearest), dtype=torch.float32) >= torch.tensor(gap, dtype=torch.float32):
        return nearest
    above = Context(prec=digits, rounding=ROUND_CEILING).create_decimal_from_float(gap)
    return f"{float(above):.{digits}g}"


def margin_text(quartiles: Sequence[float], flag: str) -> str:
    """Reward margins that fit the data, from `objectives.pairs.gap_quartiles`; "" of none."""
    if not quartiles:
        return ""
    values = ", ".join(map(margin_of, quartiles))
    return f"quartiles of the reward gaps {values}: {flag} of these drops at least 25, 50, 75% of the pairs as noise"


def evaluation_result(before: Mapping[str, float], after: Mapping[str, float], own: Sequence[str] = ()) -> Result:
    """Held-out metrics before and after training; `eval_step` is the step of the weights where it is not the last.

    Args:
        own: names of the objective's own metrics.
    """
    names = {**EVALUATION_ROWS, **{f"eval_{name}": name for name in own}}
    rows = [[name, number(before.get(key)), number(after.get(key))] for key, name in names.items()]
    return Result(["held out", "before", after_text(after)], rows, [])


def after_text(after: Mapping[str, Any]) -> str:
    """What figures after training are called: `eval_step` is the step of the weights where it is not the last."""
    return f"after (best, step {int(after['eval_step'])})" if "eval_step" in after else "after"


def answers_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """One prompt and its answers at two steps, lines of `samples.jsonl`."""
    rows = [("question", before["prompt"])]
    for line in (before, after) if after["step"] > before["step"] else (after,):
        end = "" if line["finished"] else " ..."
        rows.append((f"answer at step {line['step']}", line["completion"].strip() + end))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {' '.join(text.split()) or '(empty)'}" for name, text in rows)


def memory_table(peaks: Mapping[str, int], names: Mapping[str, str]) -> str:
    """Peak memory of loss variants; the last column is relative to the first row."""
    first = next(iter(peaks.values()))
    rows = [[names[key], f"{peak / 2**20:.1f} MiB", f"{peak / first:.1f} x"] for key, peak in peaks.items()]
    return table(["peak memory of the loss, gradients included", "above inputs", ""], rows)
