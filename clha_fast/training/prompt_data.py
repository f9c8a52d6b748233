"""Prompts that a policy answers, as a data set of the Trainer's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from clha_fast.data.prompts import Prompted, PromptRecord, read_prompts
from clha_fast.data.readers import apart
from clha_fast.data.records import SKIPS, RankedRecord, RecordError
from clha_fast.generation.backend import GenerationSettings
from clha_fast.generation.prompts import EncodedPrompts, encode_prompts

logger = logging.get_logger(__name__)


class PromptDataset(torch.utils.data.Dataset[int]):
    """Prompts, tokenised once; an item is its own number. What was cut, or is otherwise than asked, is a warning.

    Args:
        records: prompts, or rows as `data.prompts.read_prompts` takes them; other columns beside a `prompt` are kept as
            the record's `extra`.
        settings: as they were asked for. positions: of the model. name: of the data, for the warning.
        skip_bad_records: leave bad records out, those that a chat template refuses among them, and count them.
        judge: raises a RecordError for a prompt whose answers it cannot read.

    Attributes:
        records, prompts: in order. settings: the lengths in force. cut_prompts: how many have lost tokens.
        said: as `EncodedPrompts.said`. skipped: the errors of records that were left out.

    Raises:
        RecordError: a bad record; none that is good. ValueError: a path; as `generation.prompts.encode_prompts`.
    """

    def __init__(
        self,
        records: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        positions: int | None = None,
        name: str = "prompts",
        skip_bad_records: bool = False,
        judge: Callable[[Prompted], object] | None = None,
    ) -> None:
        if isinstance(records, (str, os.PathLike)):
            raise ValueError(
                "prompts: expected records or rows, such as clha_fast.data.prompts.read_prompts gives for a file, got "
                f"the path {os.fspath(records)!r}"
            )
        records = list(records)
        self.skipped: list[RecordError] = []
        if not all(isinstance(record, (RankedRecord, PromptRecord)) for record in records):
            with _advised(skip_bad_records):
                records = read_prompts(records, errors=self.skipped if skip_bad_records else None, beside=True)
            extra = dict.fromkeys(name for record in records for name in getattr(record, "extra", ()))
            if extra:
                logger.warning_once(
                    f"prompts: the columns {', '.join(extra)} are no part of them; a reward function finds them in "
                    "record.extra"
                )
        if not records:
            raise RecordError("prompts: expected at least one, got none")
        # Responses that stand beside a prompt play no part.
        given: list[Prompted] = list(records)
        alone = [PromptRecord(record.prompt, record.source, record.template) for record in given]

        def encode(numbers: Sequence[int]) -> EncodedPrompts:
            found = encode_prompts([alone[number] for number in numbers], tokenizer, settings, positions)
            if judge is not None:
                for number in numbers:
                    judge(given[number])
            return found

        numbers: Sequence[int] = range(len(given))
        with _advised(skip_bad_records):
            try:
                encoded = encode(numbers)
            except RecordError:
                if not skip_bad_records:
                    raise
                numbers, bad = apart(numbers, lambda number: encode([number]))
                if not numbers:
                    raise
                self.skipped += bad
                encoded = encode(numbers)
        if self.skipped:
            logger.warning(f"{name}: {len(self.skipped)} bad records left out, the first: {self.skipped[0]}")
        self.records, self.prompts = [given[number] for number in numbers], encoded.prompts
        self.settings, self.cut_prompts, self.said = encoded.settings, encoded.cut, encoded.said
        notes = [*self._limits(settings, positions), *([self.said] if self.said else [])]
        if notes:
            logger.warning(f"{name}: {'; '.join(notes)}")

    def _limits(self, asked: GenerationSettings, positions: int | None) -> Iterator[str]:
        """What became of the limits, under the names that `RolloutConfig` has for them."""
        most = self.settings.max_prompt_length
        if self.cut_prompts:
            yield f"{self.cut_prompts:,} of {len(self):,} prompts were cut on the left to {most} tokens"
        for name, given, taken in (
            ("max_prompt_length", asked.max_prompt_length, most),
            ("max_completion_length", asked.max_new_tokens, self.settings.max_new_tokens),
        ):
            if given is not None and given != taken:
                yield f"{name} is {taken} and not {given}, for the model has {positions} positions"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> int:
        return index


@contextlib.contextmanager
def _advised(skipping: bool) -> Iterator[None]:
    """Errors of records say how to leave them out, unless they are left out already."""
    try:
        yield
    except RecordError as error:
        raise error if skipping else error.advised(SKIPS) from None


def collate_numbers(numbers: Sequence[int]) -> dict[str, Tensor]:
    """The batch of a `PromptDataset`."""
    return {"prompts": torch.tensor(list(numbers))}
