"""Ranked responses as a reward model trains on them: one row a response, and the pairs of each prompt."""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clha_fast.batching.batch import CandidateFeature
from clha_fast.batching.collator import RankedDataset
from clha_fast.batching.segments import RowTokens
from clha_fast.batching.workers import Example, as_record, is_table
from clha_fast.data.containers import table_rows
from clha_fast.data.prompts import begin_with_blank
from clha_fast.data.records import RankedRecord, RecordError, as_compared
from clha_fast.rewards.joined import Text, join_texts
from clha_fast.rewards.rows import pad_rows, reward_collator, token_rows


class PairedPrompt(NamedTuple):
    """A prompt's rows and pairs.

    Attributes:
        rows: token ids of each response, best rank first. better, worse: positions in `rows` of each pair.
        response_lengths: tokens of each response alone.
    """

    rows: list[list[int]]
    better: list[int]
    worse: list[int]
    response_lengths: list[int]

    @property
    def texts(self) -> list[Text]:
        """(prompt, response) of each row."""
        return [(row[:-length], row[-length:]) for row, length in zip(self.rows, self.response_lengths, strict=True)]


class PairedDataset(torch.utils.data.Dataset[PairedPrompt]):
    """The prompts that have a pair, tokenised once.

    All (i, j) with i ranked better are pairs, but for equal rewards and for responses whose tokens are the same.

    Args:
        records: ranked records or rows in a known format. tokenizer, max_length: as `reward_collator`.
        num_proc, skipped: as `RankedDataset`.
        name: of the data, for the error.

    Attributes:
        lengths: tokens of every prompt's longest row. responses: in all. pairs: of the prompts that are left.
        sizes: (fewest, most) responses of a prompt.
        equal_rewards, equal_responses: pairs left out, equal rewards first. unpaired: prompts left out with them.
        reversed_pairs: kept ones whose worse response has the higher reward.
        skipped, cut_prompts, cut_completions: as `RankedDataset`; what is cut is counted before prompts are left out.
        blank: as `data.prompts.begin_with_blank` says of the records.

    Raises:
        ValueError: no pair is left. RecordError: as `RankedDataset`.
    """

    def __init__(
        self,
        records: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        num_proc: int | None = None,
        skipped: list[RecordError] | None = None,
        name: str = "train_dataset",
    ) -> None:
        if not is_table(records):
            records = list(table_rows(records))
        tokenised = RankedDataset(records, reward_collator(tokenizer, max_length), num_proc=num_proc, skipped=skipped)
        left_out = {error.source for error in tokenised.skipped}
        self.blank = begin_with_blank(record for record in _good(records) if record.source not in left_out)
        self.skipped = tokenised.skipped
        self.cut_prompts, self.cut_completions = tokenised.cut_prompts, tokenised.cut_completions
        self.equal_rewards = self.equal_responses = self.reversed_pairs = self.unpaired = 0
        self._features: list[CandidateFeature] = []
        self._pairs: list[tuple[array[int], array[int]]] = []
        self.lengths: list[int] = []
        for index in range(len(tokenised)):
            feature = tokenised[index]
            pairs = self._pairs_of(feature)
            if pairs[0]:
                self._features.append(feature)
                self._pairs.append(pairs)
                self.lengths.append(tokenised.lengths[index])
            else:
                self.unpaired += 1
        if not self._features:
            raise ValueError(
                f"{name}: expected a prompt with two different responses, one of them better, got none of "
                f"{len(tokenised):,} (pairs with equal rewards {self.equal_rewards:,}, with equal responses "
                f"{self.equal_responses:,})"
            )
        sizes = [len(feature["completion_ids"]) for feature in self._features]
        self.sizes = (min(sizes), max(sizes))
        self.responses = sum(sizes)
        self.pairs = sum(len(better) for better, _ in self._pairs)

    def _pairs_of(self, feature: CandidateFeature) -> tuple[array[int], array[int]]:
        """Better and worse responses, four bytes each: pairs are many where responses are."""
        completions = [tuple(ids) for ids in feature["completion_ids"]]
        rewards = None if feature["rewards"] is None else as_compared(feature["rewards"])
        better, worse = array("i"), array("i")
        for i, j in itertools.combinations(range(len(completions)), 2):
            if rewards is not None and rewards[i] == rewards[j]:
                self.equal_rewards += 1
            elif completions[i] == completions[j]:
                self.equal_responses += 1
            else:
                self.reversed_pairs += rewards is not None and rewards[i] < rewards[j]
                better.append(i)
                worse.append(j)
        return better, worse

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> PairedPrompt:
        feature, (better, worse) = self._features[index], self._pairs[index]
        lengths = [len(ids) for ids in feature["completion_ids"]]
        return PairedPrompt(token_rows(feature), list(better), list(worse), lengths)

    def count_tokens(self, most: int) -> RowTokens:
        """Tokens that run, prompt by prompt, of the first `most` prompts."""
        prompts = [self[index] for index in range(min(len(self), most))]
        return RowTokens.of((len(prompt.texts[0][0]), prompt.response_lengths) for prompt in prompts)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The tokens of each prompt, in order: a file may repeat one."""
        return [tuple(feature["prompt_ids"]) for feature in self._features]

    def longer_wins(self) -> tuple[list[float], list[int]]:
        """Of each prompt, how many of its pairs the longer response wins (equal lengths: half), and its pairs."""
        prompts = [self[index] for index in range(len(self))]
        wins = [
            sum(
                (prompt.response_lengths[i] > prompt.response_lengths[j])
                + 0.5 * (prompt.response_lengths[i] == prompt.response_lengths[j])
                for i, j in zip(prompt.better, prompt.worse, strict=True)
            )
            for prompt in prompts
        ]
        return wins, [len(prompt.better) for prompt in prompts]


def _good(rows: Iterable[Example]) -> Iterator[RankedRecord]:
    """The rows as records, but for those that are none."""
    for number, row in enumerate(rows):
        with contextlib.suppress(RecordError):
            yield as_record(row, f"record {number}")


class PairCollator:
    """Turns `PairedPrompt`s into a batch: one row a response, however many pairs it is in.

    Args:
        pad: the token that rows are padded with. multiple: rows are padded to a multiple of it.
        layout: `padded`; `packed` and `shared` make one row of all responses.
    """

    def __init__(self, pad: int, multiple: int | None = None, layout: str = "padded") -> None:
        self.pad, self.multiple, self.layout = pad, multiple or 1, layout

    def __call__(self, prompts: Sequence[PairedPrompt]) -> dict[str, Any]:
        """Tensors, all int64: better, worse [pairs], positions among the batch's C responses; pairs_per_prompt [P]; and
        input_ids, attention_mask [C, T], or what `rewards.joined.join_texts` makes of one row of them.
        """
        starts = [0, *itertools.accumulate(len(prompt.rows) for prompt in prompts)]
        if self.layout == "padded":
            input_ids, mask = pad_rows([row for prompt in prompts for row in prompt.rows], self.pad, self.multiple)
            inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        else:
            inputs = join_texts([prompt.texts for prompt in prompts], self.layout, self.pad, self.multiple)

        def rows_of(side: str) -> Tensor:
            return torch.tensor(
                [start + k for start, prompt in zip(starts, prompts, strict=False) for k in getattr(prompt, side)]
            )

        return {
            **inputs,
            "better": rows_of("better"),
            "worse": rows_of("worse"),
            "pairs_per_prompt": torch.tensor([len(prompt.better) for prompt in prompts]),
        }


def first_pairs(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The batch without the pairs of the prompts after the first `count`; the model's rows stay as they are."""
    per_prompt = batch["pairs_per_prompt"][:count]
    pairs = int(per_prompt.sum())
    return {**batch, "better": batch["better"][:pairs], "worse": batch["worse"][:pairs], "pairs_per_prompt": per_prompt}
