"""A language model of a run's own training answers, for a run whose model is not trained yet to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clha_fast.data.records import RankedRecord
from clha_fast.experiments.run import Run, RunOptions


def answers_of(records: Sequence[RankedRecord]) -> list[RankedRecord]:
    """Each answer as a record of its own: nothing of its rank or reward is left."""
    return [RankedRecord(record.prompt, (text,)) for record in records for text in record.completions]


def language_model_run(ranked: Run, options: RunOptions, settings: Mapping[str, Any]) -> Run:
    """A run, built and not yet trained, on every answer of `ranked`'s training part, held out on those of its other.

    Args:
        ranked: a run that has been split: no prompt that it holds out is trained on here. options, settings: of the
            new run, of `ranked`'s files.

    Raises:
        ValueError, OSError: as `Run`.
    """
    run = Run(options, settings)
    run.split(answers_of(ranked.train_records), answers_of(ranked.held_out))
    run.build()
    return run
