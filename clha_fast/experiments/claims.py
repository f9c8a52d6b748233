"""The paper's own questions: what each part of CLHA gives (`ablate`), and what noise does to it (`noise`).

Both are comparisons whose rows are variants of one method, against which the others are held, paired by seed and
prompt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clha_fast.evaluation.comparison_tables import differences_markdown
from clha_fast.evaluation.report import REWARD
from clha_fast.evaluation.results import difference
from clha_fast.experiments.comparison import Comparison, parse_comparison
from clha_fast.experiments.corruption import KINDS, Corruption
from clha_fast.experiments.methods import Method, parse_methods
from clha_fast.experiments.table import Row, Table
from clha_fast.files import write_json, write_text

# Below every reward, so that the gate of each SFT target is open.
_NO_FLOOR = -1e30
SHOWN = ("accuracy", "kept_accuracy", "tau", "nll", "bleu", REWARD + "evaluation", "words")


@dataclass(frozen=True)
class Claim:
    """A comparison, and the method against which the others are held."""

    comparison: Comparison
    against: str


def ablation(given: Mapping[str, Any]) -> Claim:
    """`clha-fast ablate`: CLHA whole, without each of its parts, and with other margins.

    Args:
        given: keys of a `Comparison` without `methods`; `clha`, the whole method's settings; `sweeps`, `margin` and
            `reward_margin` (numbers, or quantiles such as "q0.5" of the training file's reward differences) -> a list.

    Raises:
        ValueError: an unknown key or value.
    """
    comparison = parse_comparison(_without_methods(given), ("clha", "sweeps"))
    whole = _whole(given)
    variants: list[dict[str, Any]] = [
        {"name": "clha", "label": "CLHA"},
        {"name": "no-rescoring", "label": "no rescoring (all pairs kept)", "noise_rule": "none"},
        {"name": "no-margin", "label": "no margin", "margin": 0.0},
        {"name": "no-sft", "label": "no SFT term", "sft_weight": 0.0},
        {"name": "no-gate", "label": "SFT without its gate", "reward_floor": _NO_FLOOR},
    ]
    sweeps = given.get("sweeps") or {}
    if not isinstance(sweeps, Mapping) or set(sweeps) - {"margin", "reward_margin"}:
        raise ValueError(f"sweeps: expected lists under margin and reward_margin, got {sweeps!r}")
    for name, values in sweeps.items():
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"sweeps.{name}: expected a list, got {values!r}")
        for value in values:
            if name == "margin" and isinstance(value, str):
                raise ValueError(
                    f"sweeps.margin: expected numbers (nats a token, no quantile of rewards), got {value!r}"
                )
            variants.append({"name": f"{name}-{value}", "label": f"{name} {value}", name: value})
    return Claim(replace(comparison, methods=_methods(variants, whole)), "clha")


def noise(given: Mapping[str, Any]) -> Claim:
    """`clha-fast noise`: the three noise rules on data that were corrupted at several rates, tested on clean data.

    Args:
        given: keys of a `Comparison`; without `methods` they are CLHA with the rules none, abs and signed, and `clha`
            are the settings of all three. `kinds`: of `corruption.KINDS`, both by default. `rates`: numbers above 0,
            one list for both or a mapping kind -> list; clean data are always there.

    Raises:
        ValueError: an unknown key or value.
    """
    more = ("clha", "kinds", "rates", "against")
    comparison = parse_comparison(given, more)
    methods = list(comparison.methods)
    if not methods:
        rules = [
            {"name": rule, "label": f"CLHA, rule {rule}", "noise_rule": rule} for rule in ("none", "abs", "signed")
        ]
        methods = _methods(rules, _whole(given))
    elif "clha" in given:
        raise ValueError("clha: expected none beside methods, whose settings are their own")
    against = given.get("against", methods[0].name)
    if against not in [method.name for method in methods]:
        raise ValueError(f"against: expected one of {', '.join(m.name for m in methods)}, got {against!r}")
    kinds = given.get("kinds", KINDS)
    rates = given.get("rates", {"flips": [0.1, 0.3], "rewards": [0.5, 1.0]})
    corruptions: list[Corruption | None] = [None]
    for kind in kinds if isinstance(kinds, (list, tuple)) else [kinds]:
        listed = rates.get(kind, ()) if isinstance(rates, Mapping) else rates
        if not isinstance(listed, (list, tuple)) or not listed:
            raise ValueError(f"rates: expected a list of numbers for {kind}, got {listed!r}")
        for rate in listed:
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
                raise ValueError(f"rates: expected numbers above 0 (clean data are always there), got {rate!r}")
            corruptions.append(Corruption(kind, float(rate)))
    return Claim(replace(comparison, methods=methods, corruptions=corruptions), against)


def _without_methods(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if "methods" in given:
        raise ValueError("methods: expected none (the variants of clha are the rows), got some")
    return given


def _whole(given: Mapping[str, Any]) -> Mapping[str, Any]:
    whole = given.get("clha") or {}
    if not isinstance(whole, Mapping) or {"objective", "name", "label"} & set(whole):
        raise ValueError(f"clha: expected settings of the CLHA loss, such as {{preset: paper}}, got {whole!r}")
    return whole


def _methods(variants: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]) -> list[Method]:
    return parse_methods([{"objective": "clha", **whole, **variant} for variant in variants])


def differences(rows: Sequence[Row], against: str) -> list[dict[str, Any]]:
    """Each trained row's figures less those of the method `against`, of the same ranking length and corruption."""
    found = []
    for row in rows:
        if not row.method.trains or row.method.name == against:
            continue
        same = [
            other
            for other in rows
            if other.method.name == against
            and (other.cell.length, other.cell.corruption) == (row.cell.length, row.cell.corruption)
        ]
        theirs = {outcome.cell.seed: outcome.assessment for other in same for outcome in other.outcomes}
        ours = {outcome.cell.seed: outcome.assessment for outcome in row.outcomes}
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            continue
        corruption = row.cell.corruption
        spreads = difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        found.append(
            {
                "length": row.cell.length,
                "method": row.method.name,
                "label": row.method.label,
                "corruption": None if corruption is None else {"kind": corruption.kind, "rate": corruption.rate},
                "against": against,
                "seeds": seeds,
                "differences": {name: spread.as_dict() for name, spread in spreads.items()},
            }
        )
    return found


def write_differences(table: Table, claim: Claim) -> list[dict[str, Any]]:
    """`differences.json` and `differences.md` in the output folder."""
    found = differences(table.rows, claim.against)
    folder = claim.comparison.output_dir
    write_json(os.path.join(folder, "differences.json"), found)
    label = next(method.label for method in claim.comparison.methods if method.name == claim.against)
    write_text(os.path.join(folder, "differences.md"), differences_markdown(found, label, SHOWN))
    return found
