"""Rows that are longer than the positions of a model, seen before it runs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from clha_fast.batching.collator import RankedDataset
from clha_fast.batching.segments import Segments
from clha_fast.models.adapters import virtual_tokens

logger = logging.get_logger(__name__)

_TABLE = re.compile(r"pos|wpe")
_ANY_PADDING = 64  # to which a collator that nobody has seen may pad
_SPARE_ROWS = 2  # some tables begin behind that many of their own


def positions_of(model: nn.Module) -> int | None:
    """Tokens that a model has positions for beside those of prompt tuning, None without a limit."""
    positions = _positions(model)
    return None if positions is None else positions - virtual_tokens(model)


def _positions(model: nn.Module) -> int | None:
    rows = _named_positions(model)
    return None if rows is None else max(rows - _first_row(model, rows), 1)


def _first_row(model: nn.Module, rows: int) -> int:
    """The row of a table of `rows` positions that a first token has: RoBERTa and its kin begin behind padding's."""
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        named = _TABLE.search(name.rpartition(".")[2]) is not None
        if padding is not None and named and isinstance(table, torch.Tensor) and table.shape[:1] == (rows,):
            return int(padding) + 1
    return 0


def _named_positions(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


class RowLimit:
    """How many tokens a model has positions for, and what happens to longer rows.

    A table of positions ends: a longer row is refused. Computed positions (rotary ones, or none in a recurrent layer)
    go on, past what the model was made for: that is said once.

    Args:
        multiple: rows are padded to a multiple of it, as far as anyone knows.

    Attributes:
        limit: tokens, without those that prompt tuning puts in front; None where the configuration names no limit.
    """

    def __init__(self, model: nn.Module, multiple: int = _ANY_PADDING) -> None:
        positions = _named_positions(model)
        self.limit = positions_of(model)
        self.name = type(model).__name__
        tensors = [] if positions is None else [*model.named_parameters(), *model.named_buffers()]
        self.table = any(
            tensor.dim() == 2
            and 0 <= tensor.shape[0] - (positions or 0) <= _SPARE_ROWS
            and _TABLE.search(name) is not None
            for name, tensor in tensors
        )
        self.multiple = multiple
        self._said = False

    def check_dataset(self, dataset: Any, name: str) -> None:
        """The rows of a `RankedDataset`; those of others are checked as they come.

        Raises:
            ValueError: the model has a table of positions, and a row is longer.
        """
        if self.limit is None or not isinstance(dataset, RankedDataset):
            return
        lengths = dataset.lengths
        longer, longest = sum(length > self.limit for length in lengths), max(lengths)
        most = dataset[lengths.index(longest)]["source"]
        where = f"{name}, in {longer:,} of {len(dataset):,} prompts, most in {most}" if longer else name
        self._check(longest, where)

    def check_rows(self, segments: Segments | None, width: int) -> None:
        """One batch, whose rows are padded to `width`, or whose texts stand at `segments`; as `check_dataset`."""
        if torch.compiler.is_compiling():  # it would make a graph for every width, and does not follow texts' lengths
            return
        longest = width if segments is None else segments.longest
        if self.limit is not None and longest > (self.limit if self.table else self._padded(self.limit)):
            self._check(longest, "a batch")

    def _padded(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def _check(self, longest: int, where: str) -> None:
        limit = self.limit
        assert limit is not None
        if longest > limit:
            text = (
                f"max_length: expected rows of at most the {limit:,} positions of {self.name}, got up to {longest:,} "
                f"tokens ({where}); max_length={limit} cuts them"
            )
            if self.table:
                raise ValueError(text)
            if not self._said:
                self._said = True
                logger.warning(f"{text}, else the model runs past the positions that it was made for")
        elif self.table and self._padded(longest) > limit:
            raise ValueError(
                f"pad_to_multiple_of: expected rows of at most the {limit:,} positions of {self.name}, got "
                f"{self._padded(longest):,} tokens with the padding to a multiple of {self.multiple} ({where}); leave "
                f"it out, or max_length={max(limit // self.multiple * self.multiple, 1)}"
            )
