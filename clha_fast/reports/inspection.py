"""What a file of ranked responses holds, and how a model will read it: figures, and a few records token by token."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from clha_fast.batching.batch import CandidateFeature, inert_mask
from clha_fast.batching.collator import RankedCollator
from clha_fast.data.notes import Notes
from clha_fast.data.readers import Source, iter_records
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.data.rendering import plain_template
from clha_fast.data.split import prompt_key
from clha_fast.evaluation.tables import margin_of
from clha_fast.objectives import Objective
from clha_fast.objectives.pairs import keeps, leads, quantiles
from clha_fast.reports.data_summary import DataSummary, summarise, template_text

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # of the quantiles
_LETTER = 4  # tokens of one byte that a letter may have
DIGITS = 4  # of a suggested margin
ENOUGH = 0.5  # a reward margin that keeps this share of the pairs needs no other


@dataclass(frozen=True)
class Lengths:
    """How long one kind of text is, in the unit of the inspection: its quantiles at `SHARES`, mean and largest."""

    name: str
    quantiles: tuple[float, ...]
    mean: float
    largest: int

    @classmethod
    def of(cls, name: str, values: Sequence[int]) -> Lengths:
        """The values' own; of no value NaN and 0."""
        if not values:
            return cls(name, (math.nan,) * len(SHARES), math.nan, 0)
        return cls(name, _quantiles(torch.tensor(values)), sum(values) / len(values), max(values))


@dataclass(frozen=True)
class Gaps:
    """|r_i - r_j| over all pairs: quantiles at `SHARES`, the share of pairs above each, and a margin that fits.

    Attributes:
        kept: the share of the pairs whose gap is above each quantile: what the noise rule `abs` keeps with that margin.
        margin_kept: what it keeps with the objective's own margin, NaN where it has none.
        suggested: a reward_margin: the objective's own where that keeps half of the pairs or more, else the gaps'
            lower quartile, which drops the quarter of the pairs that rewards tell apart least, or half of that where
            many gaps are equal to it and it keeps less than half of the pairs.
        suggested_kept: the share of the pairs that it keeps.
    """

    quantiles: tuple[float, ...]
    kept: tuple[float, ...]
    margin_kept: float
    suggested: float
    suggested_kept: float


@dataclass(frozen=True)
class Token:
    """One token of an example: its text alone; special, scored, or cut away by the limits (never seen by the model)."""

    text: str
    special: bool = False
    scored: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Candidate:
    """A response of an example; inert: training does not run it, for neither loss nor gradients depend on it."""

    tokens: tuple[Token, ...]
    reward: float | None
    target: bool
    inert: bool


@dataclass(frozen=True)
class Example:
    """A record as the model reads it: the prompt's tokens, then each response's."""

    source: str
    prompt: tuple[Token, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_file` found.

    Attributes:
        name: of the source. unit: of all lengths, "tokens" or "characters" (without a tokenizer).
        more: whether the source goes on behind what was read. bad: errors of records that could not be used.
        summary: of the records that have rewards, where only some do. rewarded: how many have.
        sizes: records by number of responses. repeated_prompts: records whose prompt another one before has, too.
        repeated_answers: responses that a record before has, too. sentences: what else a user has to know.
        lengths: of prompts, responses, and prompts with their longest response; in tokens as the limits leave them.
        unequal_pairs: pairs with different rewards. reversed_pairs: those whose worse-ranked one has the higher.
        first: by the name of one of these counts, where the first record is that it counts.
    """

    name: str
    unit: str
    more: bool
    bad: list[RecordError]
    summary: DataSummary
    rewarded: int
    sizes: Mapping[int, int]
    repeated_prompts: int
    repeated_answers: int
    sentences: list[str]
    lengths: list[Lengths]
    cut_prompts: int
    cut_completions: int
    unequal_pairs: int
    reversed_pairs: int
    gaps: Gaps | None
    examples: list[Example] = field(default_factory=list)
    first: Mapping[str, str] = field(default_factory=dict)

    @property
    def records(self) -> int:
        return sum(self.sizes.values())


def inspect_file(
    source: Source,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    format: str = "auto",
    columns: Mapping[str, Any] | None = None,
    rank_by_reward: bool = False,
    limits: Mapping[str, int | None] | None = None,
    examples: int = 3,
    most: int | None = 10_000,
    positions: int | None = None,
    progress: bool = True,
) -> Inspection:
    """Reads up to `most` records from the beginning of a source; memory is bounded by them where rows can be streamed.

    Args:
        source, format, columns, rank_by_reward: as `clha_fast.data.iter_records`.
        objective: whose pairs and gates are counted. tokenizer: None counts characters, and shows no example.
        limits: max_length, max_prompt_length, max_completion_length of the collator.
        examples: records to show token by token. positions: of the model, None where that is not known.

    Raises:
        RecordError, ValueError, OSError: as `iter_records`, where no record can be used.
    """
    bad: list[RecordError] = []
    notes = Notes(str(source) if isinstance(source, str) else "records")
    stream = iter_records(source, format, rank_by_reward, bad, columns=columns, notes=notes)
    found = _Found(objective, tokenizer, dict(limits or {}), examples)
    bar: dict[str, Any] = {"desc": "Reading", "unit": " records"}
    # None: on a terminal alone.
    shown = logging.tqdm(itertools.islice(stream, most), disable=None if progress else True, **bar)
    for record in shown:
        try:
            found.see(record)
        except RecordError as error:  # a limit or a template that this record does not agree with
            bad.append(error)
    # Without the record that may follow.
    read = dataclasses.replace(notes, unread=Counter(notes.unread), first=dict(notes.first))
    more = most is not None and next(stream, None) is not None
    if not found.records:
        raise bad[0]
    return found.inspection(read, more, bad, positions)


class _Found:
    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase | None,
        limits: dict[str, Any],
        examples: int,
    ) -> None:
        self.objective, self.tokenizer, self.most_examples = objective, tokenizer, examples
        self.whole = self.cut = None
        if tokenizer is not None:
            # Reference log-probabilities are held to other limits than these.
            self.cut = RankedCollator(tokenizer, objective, signals=(), **limits)
            self.whole = RankedCollator(tokenizer, objective, signals=())
        self.records: list[RankedRecord] = []
        self.sizes: Counter[int] = Counter()
        self.prompts: set[bytes] = set()
        self.answers: set[bytes] = set()
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.texts = self.repeated_prompts = self.repeated_answers = self.cut_prompts = self.cut_completions = 0
        self.lengths: dict[str, list[int]] = {"prompt": [], "response": [], "prompt and longest response": []}
        self.examples: list[Example] = []
        self.first: dict[str, str] = {}

    def see(self, record: RankedRecord) -> None:
        if self.cut is None:
            text = record.prompt if isinstance(record.prompt, str) else plain_template(record.prompt)
            prompt, responses = len(text), [len(answer) for answer in record.completions]
        else:
            feature, prompt_cut, cut = self.cut.tokenize_counted(record)
            prompt, responses = len(feature["prompt_ids"]), [len(ids) for ids in feature["completion_ids"]]
            self.cut_prompts += prompt_cut
            self.cut_completions += cut
            if len(self.examples) < self.most_examples:
                self.examples.append(self._example(record, feature))
        self.lengths["prompt"].append(prompt)
        self.lengths["response"] += responses
        self.lengths["prompt and longest response"].append(prompt + max(responses))
        self.sizes[len(record.completions)] += 1
        self.texts += isinstance(record.prompt, str)
        if record.rewards is None:
            self.first.setdefault("unrewarded", record.source)
        key = _hash(prompt_key(record))
        if key in self.prompts:
            self.repeated_prompts += 1
            self.first.setdefault("repeated_prompts", record.source)
        self.prompts.add(key)
        own = {_hash(answer.strip()) for answer in record.completions}
        if both := len(own & self.answers):
            self.repeated_answers += both
            self.first.setdefault("repeated_answers", record.source)
        self.answers |= own
        # Texts are not needed any more.
        self.records.append(RankedRecord("", ("-",) * len(record.completions), record.rewards, record.sft_index))

    def inspection(self, notes: Notes, more: bool, bad: list[RecordError], positions: int | None) -> Inspection:
        rewarded = [record for record in self.records if record.rewards is not None]
        sentences = [sentence.removeprefix(f"{notes.name}: ") for sentence in notes.sentences()]
        if 0 < len(rewarded) < len(self.records) and self.objective.markers is None:
            sentences.append(
                f"{len(rewarded):,} of {len(self.records):,} records have rewards (the first without: "
                f"{self.first['unrewarded']}): training refuses a mixture, or leaves out the fewer with "
                "skip_bad_records=True (--skip_bad_records); clha-fast score --reward-model MODEL writes rewards"
            )
        if self.cut is not None and (said := template_text(self.texts, len(self.records), self.templated)):
            sentences.append(said)
        longest = max(self.lengths["prompt and longest response"])
        if positions is not None and self.cut is not None and longest > positions:
            over = sum(length > positions for length in self.lengths["prompt and longest response"])
            sentences.append(
                f"{over:,} of {len(self.records):,} records are longer than the model's {positions:,} positions; "
                f"max_length={positions} cuts them"
            )
        return Inspection(
            name=notes.name,
            unit="characters" if self.cut is None else "tokens",
            more=more,
            bad=bad,
            summary=summarise(rewarded or self.records, self.objective),
            rewarded=len(rewarded),
            sizes=dict(sorted(self.sizes.items())),
            repeated_prompts=self.repeated_prompts,
            repeated_answers=self.repeated_answers,
            sentences=sentences,
            lengths=[Lengths.of(name, values) for name, values in self.lengths.items()],
            cut_prompts=self.cut_prompts,
            cut_completions=self.cut_completions,
            unequal_pairs=notes.pairs,
            reversed_pairs=notes.reversed,
            gaps=_gaps(rewarded, self.objective),
            examples=self.examples,
            first=self.first | ({"reversed_pairs": notes.first["reversed"]} if notes.reversed else {}),
        )

    def _example(self, record: RankedRecord, feature: CandidateFeature) -> Example:
        assert self.whole is not None
        whole = self.whole.tokenize_record(record)
        kept, all_of = list(feature["prompt_ids"]), list(whole["prompt_ids"])
        lost = len(all_of) - len(kept)
        # Cut on the left, behind what the tokenizer puts in front.
        same = (a == b for a, b in zip(kept, all_of, strict=False))
        front = len(list(itertools.takewhile(bool, same)))
        prompt = [
            *self._tokens(all_of[:front]),
            *self._tokens(all_of[front : front + lost], cut=True),
            *self._tokens(all_of[front + lost :]),
        ]
        count = len(feature["completion_ids"])
        chained = feature.get("completion_mask") is not None
        rewards = None if record.rewards is None or chained else torch.tensor(record.rewards)
        inert = [False] * count
        if not chained:
            sizes, target = torch.tensor([count]), torch.tensor([record.sft_index])
            inert = inert_mask(rewards, sizes, target, self.objective).tolist()
        masks = feature.get("completion_mask") or [[1] * len(ids) for ids in feature["completion_ids"]]
        candidates = []
        for number, (ids, full, mask) in enumerate(
            zip(feature["completion_ids"], whole["completion_ids"], masks, strict=True)
        ):
            seen = [
                Token(token.text, token.special, bool(scored))
                for token, scored in zip(self._tokens(list(ids)), mask, strict=True)
            ]
            rest = [] if chained else self._tokens(list(full)[len(ids) :], cut=True)
            reward = None if rewards is None else record.rewards[number]  # type: ignore[index]
            target_here = not chained and number == record.sft_index
            candidates.append(Candidate((*seen, *rest), reward, target_here, inert[number]))
        return Example(record.source, tuple(prompt), tuple(candidates))

    def _tokens(self, ids: Sequence[int], cut: bool = False) -> list[Token]:
        assert self.tokenizer is not None
        special = set(self.tokenizer.all_special_ids)
        special |= {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        texts = _texts(self.tokenizer, list(ids))
        return [Token(text, token in special, cut=cut) for token, text in zip(ids, texts, strict=True)]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Each token's text; a letter that several tokens make stands at the first of them."""
    found: list[str] = []
    while len(found) < len(ids):
        start = len(found)
        runs = (ids[start : start + size] for size in range(1, min(_LETTER, len(ids) - start) + 1))
        whole = next((run for run in runs if "\ufffd" not in tokenizer.decode(run)), ids[start : start + 1])
        text, piece = tokenizer.decode(whole), tokenizer.convert_ids_to_tokens(ids[start])
        # SentencePiece's blank, which decoding takes off a text's front.
        blank = " " if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ") else ""
        found += [blank + text, *[""] * (len(whole) - 1)]
    return found


def _gaps(records: Sequence[RankedRecord], objective: Objective) -> Gaps | None:
    sizes = [len(record.rewards or ()) for record in records]
    # Subtracted in float32, as the loss does.
    rewards = torch.tensor([reward for record in records for reward in record.rewards or ()], dtype=torch.float32)
    found = quantiles(lambda: leads(sizes, rewards), SHARES)
    if not found:
        return None
    margin = getattr(objective, "reward_margin", None)
    lower = float(margin_of(found[SHARES.index(0.25)], DIGITS))  # what is said is what is counted
    half = float(margin_of(lower / 2, DIGITS))
    *kept, own, at_lower, at_half = _shares_above(leads(sizes, rewards), (*found, margin or 0.0, lower, half))
    if margin is None:
        own = math.nan
    if margin is not None and own >= ENOUGH:
        suggested, share = margin, own
    elif at_lower >= ENOUGH:
        suggested, share = lower, at_lower
    else:  # gaps as coarse as those of ratings: what is equal to the margin is dropped
        suggested, share = half, at_half
    return Gaps(found, tuple(kept), own, suggested, share)


def _shares_above(gaps: Iterable[Tensor], margins: Sequence[float]) -> list[float]:
    """Of all pairs, those that the noise rule `abs` keeps with each margin."""
    kept, pairs = [0] * len(margins), 0
    for block in gaps:
        pairs += len(block)
        kept = [count + int(keeps(block, "abs", margin).sum()) for count, margin in zip(kept, margins, strict=True)]
    return [count / pairs for count in kept]


def _quantiles(values: Tensor) -> tuple[float, ...]:
    """At `SHARES`, each one of the values."""
    ordered = values.sort().values
    return tuple(float(ordered[max(math.ceil(share * len(ordered)) - 1, 0)]) for share in SHARES)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()
