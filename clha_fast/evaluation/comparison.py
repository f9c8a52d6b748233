"""Two sets of answers, or two models, on the prompts that both were measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clha_fast.data.records import as_compared
from clha_fast.evaluation.intervals import Estimate, difference, estimate, ratio
from clha_fast.evaluation.report import (
    CUT,
    LIMITS,
    NO_SUBSET,
    RAW,
    REWARD,
    TOTAL,
    Column,
    Evaluation,
    Figure,
    figures_of,
    shown,
)
from clha_fast.evaluation.tables import table
from clha_fast.generation.answers import occurrences

# Figures that are measured against the reference answers.
_AGAINST_REFERENCES = {"bleu", "corpus_bleu", "nll", "accuracy", "kept_accuracy", "kept_share", "tau", "prompt_tau"}
_KEPT = {"kept_accuracy", "kept_share"}
_BY_LIKELIHOOD = {"nll", "accuracy", "kept_accuracy", "tau", "prompt_tau"}


@dataclass(frozen=True)
class Difference:
    """A figure of A, of B, and A less B with the interval of both resampled together; `better` as `Figure` has it."""

    title: str
    a: Estimate
    b: Estimate
    difference: Estimate
    digits: int = 3
    better: int = 0


@dataclass(frozen=True)
class Wins:
    """Pairs of answers of which A's has the higher raw reward, the same (two empty answers too), the lower one.

    Attributes:
        rate: wins and half of the ties over pairs of answers, with its interval; 0.5 is no difference.
    """

    wins: int
    ties: int
    losses: int
    rate: Estimate


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    prompts: that both have. records: as which they have them; more than prompts where one was given twice. only_a,
        only_b: records that one has alone.
    differences: subset -> figure -> `Difference`. wins: subset -> reward model -> `Wins`. notes: sentences.
    """

    prompts: int
    records: int
    only_a: int
    only_b: int
    differences: dict[str, dict[str, Difference]]
    wins: dict[str, dict[str, Wins]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: plain(item) for name, item in value.items()}
            return plain(vars(value)) if isinstance(value, (Difference, Wins, Estimate)) else value

        found: dict[str, Any] = plain(vars(self))
        return found


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """A against B, paired by prompt.

    A reward model is the same on both sides where its weights are, whatever it is called; where one side does not say
    which model judged, rewards of that name are not compared. Figures that one side lacks,
    or that were measured against other references or with other settings, are named in the notes and left out; so are
    likelihood and ranking where the two sides had other limits of length and something was cut.

    Raises:
        ValueError: no prompt in common.
        ImportError: scipy is not installed.
    """
    ours, theirs = _aligned(a, b)
    left, names = _renamed(a, b)
    notes = _told_of_either(a.notes, b.notes) + [f"{text}: {name}" for name, text in names.items()]
    made, other = figures_of(left.values), figures_of(b.values)
    shared = {name: figure for name, figure in made.items() if name in other}
    missing = [figure.title for name, figure in {**made, **other}.items() if name not in shared]
    if missing:
        notes.append(f"only one side has {', '.join(missing)}")
    dropped = _incomparable(left, b, ours, theirs, notes)
    shared = {name: figure for name, figure in shared.items() if name not in dropped}
    differences: dict[str, dict[str, Difference]] = {}
    wins: dict[str, dict[str, Wins]] = {}
    subsets = [left.subsets[k] for k in ours]
    for part, chosen in Evaluation([a.prompts[k] for k in ours], subsets, [], {}).parts().items():
        here = [ours[k] for k in chosen], [theirs[k] for k in chosen]
        prompts = [a.prompts[k] for k in here[0]]
        differences[part] = {
            name: _difference(figure, left.values, b.values, *here, prompts) for name, figure in shared.items()
        }
        wins[part] = {}
        for name in shared:
            if name.startswith(RAW):
                both = [left.values[name][k] for k in here[0]], [b.values[name][k] for k in here[1]]
                wins[part][name.removeprefix(RAW)] = _wins(*both, prompts)
    alone = len(a.prompts) - len(ours), len(b.prompts) - len(ours)
    return Comparison(len({a.prompts[k] for k in ours}), len(ours), *alone, differences, wins, notes)


def _aligned(a: Evaluation, b: Evaluation) -> tuple[list[int], list[int]]:
    """Positions of the common prompts in both, in the order of A."""
    place = {name: k for k, name in enumerate(occurrences(b.prompts))}
    both = [(k, place[name]) for k, name in enumerate(occurrences(a.prompts)) if name in place]
    if not both:
        raise ValueError(
            f"compare: expected prompts in common, got none among {len(a.prompts):,} and {len(b.prompts):,}"
        )
    return [k for k, _ in both], [k for _, k in both]


def _told_of_either(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """What was said when either side was measured: answers left out, a reward model that cannot be believed."""
    sides = {note: [name for name, notes in (("A", a), ("B", b)) if note in notes] for note in (*a, *b)}
    return [note if len(side) == 2 else f"{side[0]}: {note}" for note, side in sides.items()]


def _renamed(a: Evaluation, b: Evaluation) -> tuple[Evaluation, dict[str, str]]:
    """A with B's names for the same reward models; and what is to be said of names that mean two models."""
    theirs = [name.removeprefix(RAW) for name in b.values if name.startswith(RAW)]
    names = {_fingerprint(b, name): name for name in theirs}
    names.pop(None, None)
    values: dict[str, Column] = {}
    said: dict[str, str] = {}
    for column, numbers in a.values.items():
        prefix = next((text for text in (REWARD, RAW) if column.startswith(text)), None)
        if prefix is None:
            values[column] = numbers
            continue
        name = column.removeprefix(prefix)
        judge = _fingerprint(a, name)
        new = names.get(judge)
        if new is None and name in theirs:
            unknown = [side for side, own in (("A", judge), ("B", _fingerprint(b, name))) if own is None]
            said[name] = "two reward models of one name are not compared"
            if unknown:
                said[name] = f"rewards are not compared, for {' and '.join(unknown)} do not say which model judged"
            new = f"{name} (A's)"
        values[prefix + (new or name)] = numbers
    return Evaluation(a.prompts, a.subsets, a.references, values, a.corpus, a.checks, a.notes, a.about), said


def _fingerprint(evaluation: Evaluation, name: str) -> str | None:
    """Of a reward model's weights; None where nothing is known of them."""
    found = evaluation.checks.get(name, {}).get("fingerprint")
    return None if found is None else str(found)


def _incomparable(a: Evaluation, b: Evaluation, ours: list[int], theirs: list[int], notes: list[str]) -> set[str]:
    dropped: set[str] = set()
    others = sum(a.references[i] != b.references[j] for i, j in zip(ours, theirs, strict=True))
    if others:
        dropped |= _AGAINST_REFERENCES
        notes.append(
            f"{others:,} of {len(ours):,} prompts have other references on the two sides: BLEU, likelihood and ranking "
            "are not compared"
        )
    left, right = (found.values.get("nll_tokens") for found in (a, b))
    if not others and left and right and any(left[i] != right[j] for i, j in zip(ours, theirs, strict=True)):
        dropped.add("nll")
        notes.append("NLL a token is not compared: the best answers are other tokens on the two sides")
    dropped |= _otherwise_cut(a, b, ours, theirs, notes)
    changed = [name for name in ("noise_rule", "reward_margin") if a.about.get(name) != b.about.get(name)]
    if changed and "kept" in a.values and "kept" in b.values:
        dropped |= _KEPT
        what = ", ".join(f"{name} {a.about.get(name)!r} and {b.about.get(name)!r}" for name in changed)
        notes.append(f"kept pairs are not compared: {what}")
    return dropped


def _otherwise_cut(a: Evaluation, b: Evaluation, ours: list[int], theirs: list[int], notes: list[str]) -> set[str]:
    """Figures of likelihood, where the models have read other parts of the same texts; what is to be said of limits."""
    given = [found.about.get("generation") or {} for found in (a, b)]
    prompts = [own.get("max_prompt_length") for own in given]
    if all(given) and prompts[0] != prompts[1] and any(found.about.get("prompts_cut") != 0 for found in (a, b)):
        notes.append(
            f"the answers are to prompts of other lengths: max_prompt_length {prompts[0]} and {prompts[1]}; what is "
            "measured of them is compared as it is"
        )
    if "nll" not in a.values or "nll" not in b.values:
        return set()
    silent = [side for side, found in (("A", a), ("B", b)) if any(name not in found.about for name in LIMITS)]
    if silent:
        who = "A and B do" if len(silent) == 2 else f"{silent[0]} does"
        notes.append(f"likelihood and ranking are compared as they are: {who} not say at which lengths texts were cut")
        return set()
    other = [name for name in LIMITS if a.about[name] != b.about[name]]
    none = [0.0] * max(len(a.prompts), len(b.prompts))
    left, right = (found.values.get(CUT, none) for found in (a, b))
    cut = sum(bool(left[i] or right[j]) for i, j in zip(ours, theirs, strict=True))
    if not other or not cut:
        return set()
    what = ", ".join(f"{name} {a.about[name]} and {b.about[name]}" for name in other)
    # max_length is what a model has positions for: no option makes the two alike.
    same = "with the same --max-prompt-length" if LIMITS[0] in other else "on records that fit both"
    notes.append(
        f"likelihood and ranking are not compared: {what}, and {cut:,} of {len(ours):,} records were cut on a side or "
        f"on both; measure both {same}"
    )
    return _BY_LIKELIHOOD


def _difference(
    figure: Figure,
    a: Mapping[str, Column],
    b: Mapping[str, Column],
    ours: list[int],
    theirs: list[int],
    prompts: Sequence[str],
) -> Difference:
    left, right = figure.rows(a, ours), figure.rows(b, theirs)
    valued = np.flatnonzero(~(np.isnan(left).any(1) | np.isnan(right).any(1))).tolist()
    left, right, whose = left[valued], right[valued], [prompts[k] for k in valued]
    return Difference(
        figure.title,
        estimate(figure.of, left, prompts=whose),
        estimate(figure.of, right, prompts=whose),
        difference(figure.of, left, right, prompts=whose),
        figure.digits,
        figure.better,
    )


def _wins(a: Column, b: Column, prompts: Sequence[str]) -> Wins:
    """By raw score, which does not saturate; an empty answer has none and loses to any other."""
    sides = [as_compared(-math.inf if value is None else value for value in side) for side in (a, b)]
    scores = list(zip(*sides, strict=True))
    points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in scores]
    counts = (points.count(1.0), points.count(0.5), points.count(0.0))
    return Wins(*counts, estimate(ratio, np.column_stack([points, np.ones(len(points))]), prompts=prompts))


def comparison_table(found: Comparison) -> str:
    """Win rates and differences, subset after subset, and the sentences that belong to them."""
    common = f" in {found.records:,} records" if found.records > found.prompts else ""
    alone = f"{found.only_a:,} records stand in A alone, {found.only_b:,} in B alone"
    lines = [f"{found.prompts:,} prompts in common{common}; {alone}"]
    for part, here in found.differences.items():
        lines.append(f"\n{part or NO_SUBSET}")
        for name, wins in found.wins[part].items():
            lines.append(
                f"win rate of A by {name}: {shown(wins.rate, 3)} ({wins.wins:,} won, {wins.ties:,} tied, "
                f"{wins.losses:,} lost)"
            )
        rows = [
            [row.title, *(shown(e, row.digits) for e in (row.a, row.b, row.difference)), f"{row.difference.prompts:,}"]
            for row in here.values()
        ]
        lines.append(table(["", "A", "B", "A - B, paired", "prompts"], rows))
    lines.append("\n95% bootstrap intervals over prompts; a difference whose interval holds 0 may be chance")
    notes = {row.difference.note for row in found.differences[TOTAL].values() if row.difference.note}
    return "\n".join([*lines, *sorted(notes), *found.notes, *_verdict(found)])


def _verdict(found: Comparison) -> list[str]:
    """Which side is first by which figure of all prompts, and by which the intervals do not tell."""
    named = [(f"win rate of A by {name} (", wins.rate, 0.5, 3, 1) for name, wins in found.wins[TOTAL].items()]
    for row in found.differences[TOTAL].values():
        if row.better:
            named.append((f"{row.title} (A - B ", row.difference, 0.0, row.digits, row.better))
    first: dict[str, list[str]] = {"A": [], "B": [], "": []}
    for title, result, middle, digits, better in named:
        if result.value is None:
            continue
        low, high = (None if end is None else round(end, digits) for end in (result.low, result.high))  # as shown
        side = ""
        if low is not None and high is not None and not low <= middle <= high:
            side = "A" if (low > middle) == (better > 0) else "B"
        first[side].append(f"{title}{shown(result, digits)})")
    lines = [f"{side} is first by {'; '.join(titles)}" for side, titles in first.items() if side and titles]
    if first[""]:
        none = "" if lines else "neither is first: "
        lines.append(f"{none}the intervals do not tell A from B by {'; '.join(first[''])}")
    return lines
