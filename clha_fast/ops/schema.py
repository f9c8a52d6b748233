"""Flat schemas of custom operators, made from the tuples that the backends take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clha_fast.types import HeadInputs, RankingInputs


def _tensors(kind: type[NamedTuple]) -> list[str]:
    optional = {name for name, hint in kind.__annotations__.items() if "None" in str(hint)}
    return [f"Tensor{'?' if name in optional else ''} {name}" for name in kind.__annotations__]


HEAD = _tensors(HeadInputs)
RANKING = _tensors(RankingInputs)
NEEDS = ["bool need_hidden", "bool need_weight", "bool need_bias"]


def schema(arguments: Sequence[str], results: int) -> str:
    """The signature of an operator that returns `results` tensors."""
    return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})"
