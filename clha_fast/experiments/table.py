"""A whole comparison: base and reward models, learning rates chosen on dev, every seed trained, all of it on test."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clha_fast.data.records import RecordError
from clha_fast.data.split import prompt_key
from clha_fast.evaluation.comparison_tables import as_csv, figure_named, markdown, row_label
from clha_fast.evaluation.intervals import check_extra
from clha_fast.evaluation.report import REWARD, TOTAL, Evaluation
from clha_fast.evaluation.results import spreads
from clha_fast.experiments.assess import Assessment, Assessor, device_of, drop_weights, figure_of
from clha_fast.experiments.bases import idle_of_bases, ready_base, ready_reward_models
from clha_fast.experiments.cells import (
    Cell,
    cell_folder,
    cells_of,
    check_records,
    check_settings,
    idle_of,
    train_cell,
    trained,
)
from clha_fast.experiments.comparison import BASE_NAME, Comparison
from clha_fast.experiments.execution import Failure, run_all
from clha_fast.experiments.methods import Method
from clha_fast.experiments.reading import read_file, rewarded_alike
from clha_fast.files import write_json, write_text
from clha_fast.version import __version__

BASE = Method(BASE_NAME, "base model", {}, "")


@dataclass(frozen=True)
class Outcome:
    """A cell that is done: what training said, and what the evaluation found."""

    cell: Cell
    trained: Mapping[str, Any]
    assessment: Evaluation


@dataclass(frozen=True)
class Row:
    """A method at one ranking length (and one corruption): its cells, a seed each, or why there are none.

    Attributes:
        trials: learning rate -> the criterion on dev; {} where there was nothing to choose.
    """

    method: Method
    cell: Cell
    outcomes: Sequence[Outcome]
    trials: Mapping[float, float | None]
    failures: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        first = self.outcomes[0] if self.outcomes else None
        corruption = self.cell.corruption
        found: dict[str, Any] = {
            "length": self.cell.length,
            "method": self.method.name,
            "label": self.method.label,
            "settings": dict(self.method.settings),
            "corruption": None if corruption is None else {"kind": corruption.kind, "rate": corruption.rate},
            "learning_rate": first.cell.learning_rate if first else None,
            "trials": {f"{rate:g}": value for rate, value in self.trials.items()},
            "seeds": [outcome.cell.seed for outcome in self.outcomes] if self.method.trains else [],
        }
        if first:
            for name in ("kept_share", "gate_share"):
                found[name] = first.trained.get(name)
            tokens = [outcome.trained.get("scored_tokens") for outcome in self.outcomes]
            known = [value for value in tokens if value is not None]
            found["scored_tokens"] = sum(known) / len(known) if known else None
            found["figures"] = spreads([outcome.assessment for outcome in self.outcomes])
        if self.failures:
            found["error"] = "; ".join(self.failures)
        return found


Say = Callable[[str], None]


class Table:
    """Runs a comparison, or what of it is not done yet.

    Args:
        comparison: what to run. say: gets a line for each step. ray, address: as `execution.run_all`.

    Attributes:
        rows: once run.
    """

    def __init__(
        self, comparison: Comparison, say: Say = lambda line: None, *, ray: bool = False, address: str | None = None
    ) -> None:
        self.comparison, self.say = comparison, say
        self._run_all = functools.partial(run_all, ray=ray, address=address, use_cpu=_on_cpu(comparison))
        self._elsewhere = ray
        self.rows: list[Row] = []
        self._empty: list[str] = []

    def run(self) -> list[Row]:
        """Everything; a cell that fails leaves a row without figures and the reason.

        Raises:
            ValueError, OSError: files, base or reward models that cannot be used.
        """
        comparison = self.comparison
        # What is missing, and what there is to say of files, is said before hours of training.
        check_extra()
        new = not (self._elsewhere or os.path.isdir(comparison.output_dir))  # what is done may be from another machine
        if new:
            check_settings(comparison)
        self._of_files = _of_files(comparison, new)
        self._idle = [*idle_of_bases(comparison), *idle_of(comparison)]
        for line in self._idle:
            self.say(line)
        os.makedirs(comparison.output_dir, exist_ok=True)
        with _quiet():
            self.base = ready_base(comparison, self.say)
            self.reward_models = ready_reward_models(comparison, self.base, self.say)
            self.comparison = comparison = replace(comparison, label_model=self.reward_models.get("label"))
            self.assessor = Assessor.of(comparison, self.reward_models)
        chosen = self._choose(self._starts())
        self.rows = self._finish(chosen)
        return self.rows

    def _starts(self) -> list[Cell]:
        comparison = self.comparison
        fixed = [replace(BASE, checkpoint=self.base), *comparison.checkpoints]
        starts = []
        for length, files in comparison.data.items():
            starts += [Cell(method, length, files, comparison.seeds[0]) for method in fixed]
            for corruption in comparison.corruptions:
                starts += [
                    Cell(method, length, files, comparison.seeds[0], comparison.learning_rates[0], corruption)
                    for method in comparison.methods
                ]
        return starts

    def _choose(self, starts: Sequence[Cell]) -> list[tuple[Cell, dict[float, float | None], list[str]]]:
        """(the cell with its learning rate, the trials, what failed) of each start."""
        many = len(self.comparison.learning_rates) > 1
        trials = [trial for cell in starts if cell.method.trains and many for trial in cells_of(self.comparison, cell)]
        work = functools.partial(_try, self.comparison, self.base, self.assessor)
        found: dict[str, Any] = {}
        for number, (cell, result) in enumerate(self._run_all(trials, work), start=1):
            found[cell.key] = result
            text = f"failed: {result.message}" if isinstance(result, Failure) else f"dev {_number(result.criterion)}"
            if not isinstance(result, Failure) and result.empty:
                text += f", {result.empty:.1f}% of the answers empty"
            self.say(f"trial {number}/{len(trials)}  {cell.title}: {text}")
        done = [(trial, found[trial.key]) for trial in trials]
        self._empty = [f"{cell.title}: {got.empty:.1f}%" for cell, got in done if isinstance(got, _Trial) and got.empty]
        chosen = []
        for start in starts:
            values: dict[float, float | None] = {}
            failures = []
            for trial in cells_of(self.comparison, start) if start.method.trains and many else []:
                result = found[trial.key]
                assert trial.learning_rate is not None
                if isinstance(result, Failure):
                    failures.append(f"learning rate {trial.learning_rate:g}: {result.message}")
                values[trial.learning_rate] = None if isinstance(result, Failure) else result.criterion
            known = {rate: value for rate, value in values.items() if value is not None}
            if known:
                # The first of equal ones, in the order of the configuration.
                best = max(known, key=lambda rate: known[rate] * self.assessor.sign)
                start = replace(start, learning_rate=best)
                if not self.comparison.keep_models:
                    for rate in set(values) - {best}:
                        drop_weights(self.comparison, replace(start, learning_rate=rate), self.base)
            if values and not known and not failures:
                failures = [f"no learning rate can be chosen: {self.assessor.criterion} has no value on dev"]
            chosen.append((start, values, failures if values and not known else []))
        return chosen

    def _finish(self, chosen: Sequence[tuple[Cell, dict[float, float | None], list[str]]]) -> list[Row]:
        cells = []
        for cell, _, failures in chosen:
            if failures:
                continue
            seeds = self.comparison.seeds if cell.method.trains else self.comparison.seeds[:1]
            cells += [replace(cell, seed=seed) for seed in seeds]
        work = functools.partial(_do, self.comparison, self.base, self.assessor)
        found: dict[str, Any] = {}
        for number, (cell, result) in enumerate(self._run_all(cells, work), start=1):
            found[cell.key] = result
            text = f"failed: {result.message}" if isinstance(result, Failure) else _line(result)
            self.say(f"cell {number}/{len(cells)}  {cell.title}: {text}")
        rows = []
        for start, trials, failures in chosen:
            mine = [(cell, found[cell.key]) for cell in cells if replace(cell, seed=start.seed).key == start.key]
            failed = [f"seed {cell.seed}: {got.message}" for cell, got in mine if isinstance(got, Failure)]
            done = [got for _, got in mine if not isinstance(got, Failure)]
            rows.append(Row(start.method, start, done, trials, [*failures, *failed]))
        return rows

    def subsets(self) -> list[str]:
        """Names of the subsets of the test files, [] where there is only one."""
        found: dict[str, None] = {}
        for row in self.rows:
            for outcome in row.outcomes:
                found.update(dict.fromkeys(outcome.assessment.parts()))
        return [name for name in found if name != TOTAL]

    def _other_versions(self) -> list[str]:
        """A sentence where cells that were found are of another release."""
        outcomes = [outcome for row in self.rows for outcome in row.outcomes]
        made = [{of.trained.get("version"), of.assessment.about.get("version")} - {__version__} for of in outcomes]
        count = sum(map(bool, made))
        if not count:
            return []
        names = sorted({"one that did not say which" if name is None else str(name) for own in made for name in own})
        return [
            f"{count:,} of {len(outcomes):,} cells were made by another clha-fast ({', '.join(names)}) than this, "
            f"{__version__}, and stand as they were found; another output_dir makes all of them with this one."
        ]

    def write(self, notes: Sequence[str] = ()) -> dict[str, Any]:
        """`table.json`, `table.md` and `table.csv` in the output folder; what stands in the first."""
        subsets = self.subsets()
        rows = [row.as_dict() for row in self.rows]
        below = [*self._of_files, *self._idle, *self.assessor.notes(), *notes]
        below += self._other_versions()
        if self._empty:
            below.append(
                "Learning rates were chosen by rewards of which some are of empty answers, whose reward is 0: "
                f"{'; '.join(self._empty)}."
            )
        found = {
            "subsets": subsets,
            "rows": rows,
            "criterion": self.assessor.criterion,
            "reward_models": self.assessor.checks,
            "notes": below,
        }
        folder = self.comparison.output_dir
        write_json(os.path.join(folder, "table.json"), found)
        write_text(os.path.join(folder, "table.csv"), as_csv(rows))
        failed = [f"{row_label(row)}, n = {row['length']}: {row['error']}" for row in rows if "error" in row]
        text = markdown(rows, subsets)
        for line in (*below, *failed):
            text += f"\n{line}\n"
        write_text(os.path.join(folder, "table.md"), text)
        return found


_SKIPS = "where others are good, skip_bad_records: true in run leaves it out"


def _on_cpu(comparison: Comparison) -> bool:
    """Whether no cell would use a GPU."""
    if not comparison.methods:
        return device_of(comparison.settings) == "cpu"
    return all(device_of({**comparison.settings, **method.settings}) == "cpu" for method in comparison.methods)


def _of_files(comparison: Comparison, new: bool) -> list[str]:
    """A sentence for each pair of files that share prompts, and for each of which records are left out.

    Args:
        new: whether nothing is trained yet, and training files are tried on every method.

    Raises:
        ValueError: as `check_records`; or nothing is left to test on: all prompts of a test file are in the file that
            is trained or chosen on.
    """
    prompts: dict[str, set[str]] = {}
    found = []
    for length, files in comparison.data.items():
        for name, path in vars(files).items():
            if path not in prompts:
                bad: list[RecordError] = []
                records = read_file(path, comparison.run, bad, _SKIPS)
                prompts[path] = {prompt_key(record) for record in records}
                kept = rewarded_alike(records, comparison.run) if name == "train" else records
                if new and name == "train":
                    check_records(comparison, kept, path)
                if bad:
                    found.append(f"Malformed records of {name} (n = {length}) that are left out: {len(bad):,}.")
                if len(kept) < len(records):
                    count = f"{len(records) - len(kept):,} of {len(records):,}"
                    what = (
                        "with rewards, which most lack,"
                        if kept[0].rewards is None
                        else "without rewards, as most have,"
                    )
                    found.append(f"Records of {name} (n = {length}) {what} that are left out: {count}.")
    for length, files in comparison.data.items():
        test = prompts[files.test]
        for name in ("train", "dev"):
            shared = len(test & prompts[getattr(files, name)])
            if shared == len(test):
                raise ValueError(f"data.{length}: expected test prompts that {name} does not have, got none")
            if shared:
                found.append(f"{shared:,} of {len(test):,} test prompts (n = {length}) are in {name}, too.")
    return found


@dataclass(frozen=True)
class _Trial:
    """The criterion on dev, and where that is a reward, how many answers are empty, in percent."""

    criterion: float | None
    empty: float | None


def _try(comparison: Comparison, base: str, assessor: Assessor, cell: Cell) -> _Trial:
    assessment = Assessment(comparison, cell, base, assessor, "dev")
    found = assessment.found()
    if found is None:
        with _quiet():
            train_cell(comparison, cell, base)
            found = assessment.run()
    empty = figure_of(found, "empty") if assessor.criterion == "reward" else None
    return _Trial(assessor.criterion_of(found), empty)


def _do(comparison: Comparison, base: str, assessor: Assessor, cell: Cell) -> Outcome:
    assessment = Assessment(comparison, cell, base, assessor, "test")
    found = assessment.found()
    if found is not None:
        return Outcome(cell, trained(cell_folder(comparison, cell, base)), found)
    with _quiet():
        said = train_cell(comparison, cell, base)
        found = assessment.run()
    if not comparison.keep_models:
        drop_weights(comparison, cell, base)
    return Outcome(cell, said, found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What there is to say of the files has been said; each cell would say it again, in a process of its own too."""
    loggers = [logging.getLogger(name) for name in ("clha_fast", "transformers")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _line(outcome: Outcome) -> str:
    parts = []
    for name, short in {REWARD + "evaluation": "reward", "accuracy": "accuracy", "nll": "nll", "bleu": "BLEU"}.items():
        value = figure_of(outcome.assessment, name)
        if value is not None:
            parts.append(f"{short} {value:.{figure_named(name).digits}f}")
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
