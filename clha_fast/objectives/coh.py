"""Chain of Hindsight (Liu et al. 2023): the likelihood of answers behind words that say how good they are.

L = - sum over the scored tokens of all chains of logp / how many they are

A record's chains are made by whoever tokenises it (`data.chains`): its best and its worst answer, each alone and both
orders, every one behind its marker. Scored are the answers' tokens and what ends a chain, never a marker's. A model
trained so is asked with the good marker (`data.chains.ask`); without, it is mis-measured.

The published code has two more things, left out here: a language-model term on C4 text, weighted 0.01, and twelve other
pairs of markers, drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.base import Group, Objective, Plan, Terms, or_one
from clha_fast.objectives.pairs import Pairs
from clha_fast.options import require
from clha_fast.types import RankingInputs


@dataclass(frozen=True)
class CoHOptions(Objective):
    """Token mean over the chains of each record; a candidate of the batch is a chain, and chains have no order.

    Attributes:
        good_marker, bad_marker: what stands before the better and the worse answer. An answer follows after a blank. A
            prompt that is a text has them directly behind it: for one that ends without a blank ("TL;DR:") let them
            begin with one.
    """

    good_marker: str = "A helpful answer:"
    bad_marker: str = "An unhelpful answer:"

    name: ClassVar[str] = "coh"
    divides_by: ClassVar[tuple[str, ...]] = ("token_count",)
    metric_names: ClassVar[tuple[str, ...]] = ("good_nll",)

    def __post_init__(self) -> None:
        for field in ("good_marker", "bad_marker"):
            text = getattr(self, field)
            ok = isinstance(text, str) and bool(text.strip()) and text == text.rstrip()
            require(field, text, ok, "a text that does not end with a blank (the answer brings it)")
        other = self.bad_marker.strip() != self.good_marker.strip()
        require("bad_marker", self.bad_marker, other, "another text than good_marker")
        super().__post_init__()

    @property
    def markers(self) -> tuple[str, str]:
        return self.good_marker, self.bad_marker

    def plan(self, layout: Layout, given: RankingInputs, dtype: torch.dtype) -> Plan:
        """As any objective's, with equal rewards: metrics of pairs of chains would say nothing."""
        equal = torch.zeros(layout.num_candidates, dtype=dtype, device=layout.device)
        return super().plan(layout, given._replace(rewards=equal), dtype)

    def kept(self, pairs: Pairs) -> Tensor:
        return torch.zeros_like(pairs.present)

    def gates(self, rewards: Tensor | None) -> bool:
        return False

    def terms(self, group: Group) -> Terms:
        # Nothing scored anywhere is 0, not 0 / 0.
        loss = -group.sums.sum() / or_one(group.totals.tokens)
        return Terms(torch.zeros_like(loss), loss)

    def report(self, group: Group) -> Mapping[str, Tensor]:
        """good_nll: -s of each record's first chain, which is its best answer behind the good marker; nats a token."""
        return {"good_nll": -group.scores[group.rank == 0].sum()}

    @property
    def ranks(self) -> bool:
        return False
