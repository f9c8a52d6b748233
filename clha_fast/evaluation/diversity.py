"""How long answers are, and how much they repeat."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def words(answers: Sequence[str]) -> list[int]:
    """Words of each answer, split at blanks."""
    return [len(answer.split()) for answer in answers]


def distinct_2(answer: str) -> float | None:
    """Different pairs of neighbouring words over all such pairs of the answer; None of less than two words."""
    pairs = list(itertools.pairwise(answer.split()))
    return len(set(pairs)) / len(pairs) if pairs else None


def corpus_distinct_2(answers: Sequence[str]) -> float | None:
    """Different pairs of neighbouring words over all of them, all answers together: it falls as answers are added."""
    pairs = [pair for answer in answers for pair in itertools.pairwise(answer.split())]
    return len(set(pairs)) / len(pairs) if pairs else None
