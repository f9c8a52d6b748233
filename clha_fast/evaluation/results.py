"""Figures of a comparison's methods from the evaluations of their seeds, and differences between methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clha_fast.evaluation.intervals import Array
from clha_fast.evaluation.report import TOTAL, Evaluation, Figure, figures_of
from clha_fast.evaluation.spread import Spread, over_seeds_and_prompts, paired_difference


def rows_of(assessments: Sequence[Evaluation], figure: Figure, subset: str = TOTAL) -> Array:
    """[seeds, rows, K], what each row of a subset adds to a figure; `prompts_of` says whose rows they are.

    Args:
        assessments: of one method, a seed each, over the same prompts.
    """
    chosen = assessments[0].parts().get(subset, [])
    return np.stack([figure.rows(found.values, chosen) for found in assessments])


def prompts_of(assessments: Sequence[Evaluation], subset: str = TOTAL) -> list[str]:
    """The prompt of each row of `rows_of`."""
    return [assessments[0].prompts[k] for k in assessments[0].parts().get(subset, [])]


def shared_figures(assessments: Sequence[Evaluation]) -> dict[str, Figure]:
    """The figures that all of them have."""
    made = [figures_of(found.values) for found in assessments]
    return {name: figure for name, figure in made[0].items() if all(name in other for other in made)}


def spreads(assessments: Sequence[Evaluation]) -> dict[str, dict[str, dict[str, Any]]]:
    """subset -> figure -> `Spread` as a dictionary; last `TOTAL`, over all prompts."""
    return {
        subset: {
            name: over_seeds_and_prompts(
                figure.of,
                rows_of(assessments, figure, subset),
                prompts=prompts_of(assessments, subset),
                least=figure.least,
                most=figure.most,
            ).as_dict()
            for name, figure in shared_figures(assessments).items()
        }
        for subset in assessments[0].parts()
    }


def difference(ours: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> dict[str, Spread]:
    """Figure -> that of one method less another's, paired by seed and prompt.

    Raises:
        ValueError: other prompts, or another number of seeds.
    """
    if [found.prompts for found in ours] != [found.prompts for found in theirs]:
        raise ValueError("assessments: expected the same prompts and seeds on both sides, got different ones")
    both = shared_figures([*ours, *theirs])
    return {
        name: paired_difference(
            figure.of,
            rows_of(ours, figure),
            rows_of(theirs, figure),
            prompts=prompts_of(ours),
            least=figure.least,
            most=figure.most,
        )
        for name, figure in both.items()
    }
