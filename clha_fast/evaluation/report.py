"""One set of answers, or one model, measured: what every prompt adds, the figures of it, and their table."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clha_fast.data.prompts import prompt_hash, subset_of
from clha_fast.data.records import RankedRecord
from clha_fast.evaluation.bleu import STATISTICS, corpus_bleu, corpus_statistics, published_bleu
from clha_fast.evaluation.diversity import corpus_distinct_2, distinct_2, words
from clha_fast.evaluation.intervals import Array, Estimate, estimate, ratio
from clha_fast.evaluation.likelihood import candidate_scores, likelihood_values
from clha_fast.evaluation.rewards import answer_rewards, check_reward_model, judge_of
from clha_fast.evaluation.tables import fixed, table
from clha_fast.generation.answers import Answer, occurrences
from clha_fast.models.positions import positions_of
from clha_fast.rewards.reward_model import RewardModel

TOTAL = "Total"
CUT = "cut"
LIMITS = ("max_prompt_length", "max_length")
NO_SUBSET = "(no subset)"
REWARD, RAW = "reward: ", "raw reward: "
Column = list[float | None]


@dataclass(frozen=True)
class Figure:
    """A figure of sums over prompts.

    Attributes:
        columns: of `Evaluation.values`; one column alone is averaged over the prompts that have it.
        of: sums [..., K] to the figure [...]. scale: factor on the first column. digits: behind the point, in tables.
        least, most: what the figure cannot be below or above. better: 1 where more of it is better, -1 where less is,
            0 where neither goes without saying.
    """

    title: str
    columns: tuple[str, ...]
    of: Callable[[Array], Array] = ratio
    scale: float = 1.0
    digits: int = 3
    least: float = -math.inf
    most: float = math.inf
    better: int = 0

    def rows(self, values: Mapping[str, Column], chosen: Sequence[int]) -> Array:
        """[R, K] for `estimate`, a row for each of `chosen`; NaN where it has no value."""
        columns = [[values[name][k] for k in chosen] for name in self.columns]
        found = np.array(columns, dtype=np.float64).T.reshape(len(chosen), len(columns))
        found[:, 0] *= self.scale
        return np.hstack([found, np.ones((len(chosen), 1))]) if len(self.columns) == 1 else found


_SHARE: dict[str, Any] = {"least": 0, "most": 1}
_PERCENT: dict[str, Any] = {"least": 0, "most": 100}
FIGURES = {
    "bleu": Figure("BLEU over characters (published)", ("bleu",), digits=2, **_PERCENT, better=1),
    "corpus_bleu": Figure(
        "BLEU, corpus (sacrebleu)", tuple(f"bleu_{n}" for n in STATISTICS), corpus_bleu, digits=2, **_PERCENT, better=1
    ),
    "words": Figure("words an answer", ("words",), digits=1, least=0),
    "distinct_2": Figure("distinct-2 within an answer", ("distinct_2",), **_SHARE),
    "empty": Figure("empty answers, %", ("empty",), scale=100.0, digits=1, **_PERCENT, better=-1),
    "unfinished": Figure(
        "answers that nothing ended, %", ("unfinished",), scale=100.0, digits=1, **_PERCENT, better=-1
    ),
    "nll": Figure("NLL of the best answer, nats a token", ("nll", "nll_tokens"), least=0, better=-1),
    "accuracy": Figure("ranking accuracy, all ordered pairs (by reward)", ("correct", "ordered"), **_SHARE, better=1),
    "kept_accuracy": Figure("ranking accuracy, kept pairs (by rank)", ("kept_correct", "kept"), **_SHARE, better=1),
    "kept_share": Figure("kept pairs", ("kept", "pairs"), **_SHARE),
    "tau": Figure("Kendall's tau, pooled over pairs", ("concordance", "ordered"), least=-1, most=1, better=1),
    "prompt_tau": Figure("Kendall's tau, mean over prompts", ("tau",), least=-1, most=1, better=1),
}


def figures_of(values: Mapping[str, Column]) -> dict[str, Figure]:
    """The figures whose columns are there; those of reward models first."""
    found = {}
    for name in values:
        if name.startswith(REWARD):
            found[name] = Figure(f"{name}, 100 sigmoid", (name,), digits=2, **_PERCENT, better=1)
        elif name.startswith(RAW):
            found[name] = Figure(name, (name,), better=1)
    return found | {name: figure for name, figure in FIGURES.items() if set(figure.columns) <= set(values)}


@dataclass(frozen=True)
class Evaluation:
    """What was measured, answer by answer; a prompt that was given twice has two rows, and is one draw of an interval.

    Attributes:
        prompts: hash of each row's prompt. subsets: its part of the data, "" without parts. references: hash of the
            record that it was measured against.
        values: column -> one number a row, None where it has none; `FIGURES` says what is made of them. `CUT`: 1 where
            the limits of likelihood and ranking, which `about` has, cut something of the row's record.
        corpus: subset -> figures of all its answers together, which no prompt adds to and which have no interval.
        checks: reward model -> its `fingerprint`, its held-out pair `accuracy`, `refused`, why it is not reported, and
            `notes`, where something of those pairs was cut.
        notes: sentences to be shown. about: where it came from, and the settings.
    """

    prompts: list[str]
    subsets: list[str]
    references: list[str]
    values: dict[str, Column]
    corpus: dict[str, dict[str, float | None]] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> dict[str, list[int]]:
        """Subset -> positions of its prompts; last `TOTAL`, all prompts: a mean over prompts, not over subsets.

        A subset that is called like another column of the tables is called "... (subset)".
        """
        names = list(dict.fromkeys(self.subsets))
        found: dict[str, list[int]] = {}
        for name in names if names != [""] else ():
            called = name
            while called in (TOTAL, NO_SUBSET) or (called != name and called in names):
                called += " (subset)"
            found[called] = [k for k, own in enumerate(self.subsets) if own == name]
        return {**found, TOTAL: list(range(len(self.prompts)))}

    def figures(self) -> dict[str, dict[str, Estimate]]:
        """Subset -> figure -> its estimate."""
        made = figures_of(self.values)
        found = {}
        for part, chosen in self.parts().items():
            prompts = [self.prompts[k] for k in chosen]
            found[part] = {
                name: estimate(figure.of, figure.rows(self.values, chosen), prompts=prompts)
                for name, figure in made.items()
            }
        return found

    def as_dict(self, figures: Mapping[str, Mapping[str, Estimate]] | None = None) -> dict[str, Any]:
        """For `metrics.json`: the fields, and the figures made of them."""
        made = self.figures() if figures is None else figures
        shown = {part: {name: found.as_dict() for name, found in here.items()} for part, here in made.items()}
        return {"figures": shown, **vars(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], source: str = "metrics") -> Evaluation:
        """The inverse of `as_dict`.

        Raises:
            ValueError: a field is missing, or the columns are not of one length.
        """
        names = ("prompts", "subsets", "references", "values")
        for name in names:
            if name not in found:
                raise ValueError(f"{source}: expected the metrics of `clha-fast eval` with {', '.join(names)}")
        columns = [found["prompts"], found["subsets"], found["references"], *found["values"].values()]
        if len(set(map(len, columns))) != 1:
            raise ValueError(f"{source}: expected one value a prompt in every column, got {sorted(map(len, columns))}")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


@dataclass(frozen=True)
class Paired:
    """Records and the answers to their prompts, in the order of the answers; what has no partner is counted."""

    records: list[RankedRecord]
    answers: list[Answer]
    without_reference: int
    without_answer: int

    def notes(self) -> list[str]:
        found = []
        if self.without_reference:
            found.append(f"{self.without_reference:,} answers have no reference and are left out")
        if self.without_answer:
            found.append(f"{self.without_answer:,} references have no answer and are left out")
        return found


def pair_answers(answers: Sequence[Answer], references: Sequence[RankedRecord]) -> Paired:
    """Each answer with the reference of the same prompt; of a prompt that stands there twice, in the order given.

    Raises:
        ValueError: they have no prompt in common.
    """
    known = dict(zip(occurrences([prompt_hash(record) for record in references]), references, strict=True))
    names = occurrences([answer.prompt_hash for answer in answers])
    both = [(known[name], answer) for name, answer in zip(names, answers, strict=True) if name in known]
    if not both:
        raise ValueError(
            f"references: expected records for the prompts of the answers, got {len(references):,} for other prompts"
        )
    records, found = (list(side) for side in zip(*both, strict=True))
    return Paired(records, found, len(answers) - len(both), len(references) - len(both))


def evaluate(
    references: Sequence[RankedRecord],
    answers: Sequence[Answer] | None = None,
    *,
    reward_models: Mapping[str, Callable[[], RewardModel]] | None = None,
    reward_check: Sequence[RankedRecord] | None = None,
    checks: Mapping[str, Mapping[str, Any]] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    noise_rule: str = "abs",
    reward_margin: float = 3.0,
    max_prompt_length: int | None = 384,
    answer_prefix: str = "",
    batch_size: int = 8,
    layout: str = "padded",
    progress: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure answers against ranked references, and the model itself where it is given.

    Args:
        references: held-out records; the first response is the best.
        answers: None measures the model alone. They are paired by `pair_answers`.
        reward_models: name -> what loads it; each is loaded, used and dropped before the next. One whose held-out pair
            accuracy does not lie above 0.5 with its whole interval adds no column, but a note.
        reward_check: ranked records to measure reward models on; None takes the references.
        checks: of an earlier evaluation with the same reward models, records and batch size, taken as they are.
        model, tokenizer: a causal language model, for likelihood and ranking (`likelihood.candidate_scores`).
        noise_rule, reward_margin: which pairs are kept. max_prompt_length, answer_prefix: of the model's prompts.
        batch_size: rows of a forward pass. layout: of the model's rows, as `clha_fast.attach` has it.
        about: what is kept beside the figures; with a model also its `LIMITS` in tokens, None for no limit.

    Raises:
        ValueError: neither answers nor a model; an argument about a model or about reward models where none is given;
            no prompt in common; as `pair_answers` and `candidate_scores`.
        ScoringError: as `clha_fast.rewards.scoring.score_file`. ImportError: a package of the extra `eval` is missing.
    """
    if answers is None and (model is None or reward_models):
        raise ValueError("answers: expected some to measure (a model alone has no rewards), got None")
    if reward_check is not None and not reward_models:
        raise ValueError("reward_check: expected reward_models that it is for, got none")
    if model is None:
        of_the_model = {"tokenizer": tokenizer, "noise_rule": noise_rule, "reward_margin": reward_margin}
        of_the_model |= {"max_prompt_length": max_prompt_length, "answer_prefix": answer_prefix, "layout": layout}
        for name, value in of_the_model.items():
            if value != (evaluate.__kwdefaults__ or {})[name]:
                raise ValueError(f"{name}: expected none without a model, which it is about, got {value!r:.100}")
    records, subsets = list(references), [subset_of(record) for record in references]
    values: dict[str, Column] = {}
    notes: list[str] = []
    checked: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    if answers is not None:
        paired = pair_answers(answers, records)
        records, notes, texts = paired.records, paired.notes(), [answer.answer for answer in paired.answers]
        pairs = zip(paired.records, paired.answers, strict=True)
        subsets = [subset_of(record) or answer.subset for record, answer in pairs]
        values = text_values(paired)
        for name, load in (reward_models or {}).items():
            held_out = references if reward_check is None else reward_check
            known = (checks or {}).get(name)
            own: list[str] = []
            checked[name], columns = _rewarded(name, load, records, texts, held_out, known, batch_size, progress, own)
            values |= columns
            notes += [*checked[name].get("notes", ()), *(f"{name}: {text}" for text in own)]
        notes += [check["refused"] for check in checked.values() if check["refused"]]
    limits: dict[str, int | None] = {}
    if model is not None:
        limits = {"max_prompt_length": max_prompt_length, "max_length": positions_of(model)}
        cut: list[bool] = []
        scores, tokens = candidate_scores(
            model,
            tokenizer,
            records,
            batch_size=batch_size,
            layout=layout,
            answer_prefix=answer_prefix,
            progress=progress,
            notes=notes,
            cut=cut,
            **limits,
        )
        values[CUT] = [*map(float, cut)]
        values |= likelihood_values(records, scores, tokens, noise_rule=noise_rule, reward_margin=reward_margin)
    found = Evaluation(
        [prompt_hash(record) for record in records],
        subsets,
        [_reference_hash(record) for record in records],
        values,
        checks=checked,
        notes=notes,
        about={**(about or {}), **limits, "noise_rule": noise_rule, "reward_margin": reward_margin},
    )
    if texts:
        for part, chosen in found.parts().items():
            found.corpus[part] = {"distinct_2": corpus_distinct_2([texts[k] for k in chosen])}
    return found


def _rewarded(
    name: str,
    load: Callable[[], RewardModel],
    records: Sequence[RankedRecord],
    texts: Sequence[str],
    held_out: Sequence[RankedRecord],
    known: Mapping[str, Any] | None,
    batch_size: int,
    progress: bool,
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, Column]]:
    """(what is kept of the check, the columns of the answers' rewards); {} for a model that cannot be believed.

    `notes` gets sentences about the answers.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    kept = dict(known or {})
    reward_model = None if kept.get("refused") else load()
    if reward_model is not None and not kept:
        check = check_reward_model(name, held_out, reward_model, **settings)
        kept["fingerprint"] = judge_of(reward_model)
        kept |= {"accuracy": check.accuracy.as_dict(), "refused": check.refused}
        kept |= {"notes": list(check.notes)} if check.notes else {}
    if reward_model is None or kept["refused"]:
        return kept, {}
    rewards, raw = answer_rewards(records, texts, reward_model, **settings, notes=notes)
    return kept, {REWARD + name: [*rewards], RAW + name: raw}


def text_values(paired: Paired) -> dict[str, Column]:
    """The columns that need nothing but texts."""
    texts = [answer.answer for answer in paired.answers]
    best = [record.completions[0] for record in paired.records]
    columns: dict[str, Column] = {"bleu": [*published_bleu(texts, best)]}
    statistics = corpus_statistics(texts, best)
    for place, name in enumerate(STATISTICS):
        columns[f"bleu_{name}"] = [*(row[place] for row in statistics)]
    columns["words"] = [float(count) for count in words(texts)]
    columns["distinct_2"] = [distinct_2(text) for text in texts]
    columns["empty"] = [float(not text) for text in texts]
    if any(answer.finish for answer in paired.answers):
        columns["unfinished"] = [float(a.finish == "length") if a.finish else None for a in paired.answers]
    return columns


def _reference_hash(record: RankedRecord) -> str:
    text = json.dumps([record.completions, record.rewards])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shown(found: Estimate, digits: int) -> str:
    """A value with its interval; "-" for what is not there."""
    if found.value is None:
        return "-"
    text = fixed(found.value, digits)
    if found.low is None or found.high is None:
        return text
    return f"{text} [{fixed(found.low, digits)}, {fixed(found.high, digits)}]"


def evaluation_table(evaluation: Evaluation, figures: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Figures with their intervals by subset and in total, then the sentences that belong to them."""
    made = figures_of(evaluation.values)
    rows = [
        [figure.title, *(shown(figures[part][name], figure.digits) for part in figures)]
        for name, figure in made.items()
    ]
    parts = evaluation.parts().values()
    counts = [["prompts", *(f"{len({evaluation.prompts[k] for k in chosen}):,}" for chosen in parts)]]
    if len(set(evaluation.prompts)) < len(evaluation.prompts):
        counts.append(["records (a prompt may have several)", *(f"{len(chosen):,}" for chosen in parts)])
    lines = [table(["", *(part or NO_SUBSET for part in figures)], [*counts, *rows])]
    lines += _sentences(evaluation, figures[TOTAL])
    return "\n".join(lines)


def _sentences(evaluation: Evaluation, total: Mapping[str, Estimate]) -> list[str]:
    found = ["", "95% bootstrap intervals over prompts; Total is over all prompts, not over subsets"]
    for name, check in evaluation.checks.items():
        if check["refused"]:
            continue
        accuracy = Estimate(**check["accuracy"])
        share = f"{shown(accuracy, 3)} of the held-out pairs of {accuracy.prompts:,} prompts"
        found.append(f"{name} prefers the better answer in {share}")
    distinct = evaluation.corpus.get(TOTAL, {}).get("distinct_2")
    if distinct is not None:
        found.append(f"distinct-2 of all answers together {distinct:.3f}")
    made = figures_of(evaluation.values)
    said: dict[str, list[str]] = {}
    for name, result in total.items():
        if result.note and name not in ("empty", "unfinished"):
            said.setdefault(result.note, []).append(made[name].title)
    found += [f"{note} ({'; '.join(titles)})" for note, titles in said.items()]
    return found + evaluation.notes
