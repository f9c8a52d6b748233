"""Names of columns: which spell the same thing, which are near one that is meant, which may hold a prompt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clha_fast.data.records import is_number, is_sequence

_SIDES = ("chosen", "rejected")
_SCORES = ("score", "scores", "reward", "rewards", "rating", "ratings")
# What may stand beside side and score without meaning another thing.
_FILLERS = ("rm", "model", "overall", "avg", "average", "mean")
_RANKS = ("rank", "ranks", "ranking", "rankings")
# Names of what describes a row; such a column holds no prompt while its text is one word ("hh-rlhf", "en", "gpt-4").
_ABOUT = {
    *("annotator", "category", "dataset", "date", "domain", "hash", "id", "idx", "index", "judge", "key", "lang"),
    *("language", "license", "model", "origin", "policy", "source", "split", "subset", "tag", "task", "template"),
    *("timestamp", "topic", "type", "uid", "url", "uuid", "version"),
}
_PROMPTS = ("question", "query", "instruction", "messages", "conversation", "conversations", "input", "context", "text")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words(name: str) -> tuple[str, ...]:
    """The words of a column's name in any spelling: `chosen-rating`, `chosen_rating`, `chosenRating`."""
    return tuple(word.lower() for word in _WORD.findall(name))


def near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name that is closest, "" when none is close."""
    known = [str(item) for item in known]
    same = [item for item in known if sorted(words(item)) == sorted(words(name))]
    close = same or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def mapping_text(target: str, path: object) -> str:
    """How to say that `target` is read from `path`, in Python and on the command line."""
    text = f"[{', '.join(map(str, path))}]" if isinstance(path, (list, tuple)) else str(path)
    flag = "null" if path is None else f"'{text}'" if text.startswith("[") else text
    value = list(path) if isinstance(path, tuple) else path
    return f"columns={{{target!r}: {value!r}}} (--columns.{target} {flag})"


def pair_scores(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every two columns that hold the scores of chosen and rejected, by their names.

    A name is the side and score, reward or rating, in any order, number and spelling, and no other word than rm,
    model, overall or mean: `score_chosen`, `chosen-rating`, `rejectedRewards`, `rm_score_chosen`. One may be missing.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name in row:
        parts = words(str(name))
        sides = [word for word in parts if word in _SIDES]
        rest = tuple(sorted(word for word in parts if word not in _SIDES))
        kinds = [word for word in rest if word in _SCORES]
        if len(sides) != 1 or len(kinds) != 1 or not set(rest) <= {*_SCORES, *_FILLERS}:
            continue
        found.setdefault(rest, {}).setdefault(sides[0], str(name))
    pairs = []
    for rest, names in found.items():
        if len(names) == 1:  # named as its other half would be
            ((side, name),) = names.items()
            other = _SIDES[1 - _SIDES.index(side)]
            names[other] = name.replace(side, other) if side in name else "_".join((other, *rest))
        if any(row.get(name) is not None for name in names.values()):
            pairs.append((names["chosen"], names["rejected"]))
    return pairs


def names_scores(name: str) -> bool:
    """Whether a column's name says that it holds scores or ranks."""
    return any(word in (*_SCORES, *_RANKS) for word in words(name))


def scores_of(name: str, value: object, size: int) -> str | None:
    """The field (rewards or ranks) that a column seems to hold: named so, with a number for each response."""
    if not names_scores(name) or not is_sequence(value) or not isinstance(value, Sequence):
        return None
    if len(value) != size or not all(is_number(item) for item in value):
        return None
    return "ranks" if set(words(name)) & set(_RANKS) else "rewards"


def prompt_suspects(row: Mapping[str, Any], own: Iterable[str]) -> list[str]:
    """Columns beside `own` that may hold the prompt: a text or messages, but for one word of a description."""
    own = set(own)
    return [name for name, value in row.items() if name not in own and _may_hold_prompt(str(name), value)]


def _may_hold_prompt(name: str, value: object) -> bool:
    if isinstance(value, str):
        about = bool(_ABOUT & set(words(name)[-1:]))
        one = len(value.split()) == 1
        return bool(value.strip()) and not (one and (about or _is_number(value)))
    return is_sequence(value) and bool(value) and all(isinstance(item, Mapping) for item in value)  # type: ignore[attr-defined]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def suggested_prompt(suspects: Sequence[str]) -> str | list[str]:
    """The path, or paths, that read the prompt from the likeliest of `suspects`."""
    if {"instruction", "input"} <= set(suspects):
        return ["instruction", "input"]
    likely = [name for known in _PROMPTS for name in suspects if known in words(name)]
    return (likely or list(suspects))[0]
