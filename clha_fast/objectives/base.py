"""What an objective is: a loss of the token log-probabilities of whole prompts, and the data that it reads.

To write one, subclass `Objective` and say what its two terms are for a `Group` of whole prompts. Whatever is divided by
comes from `Group.totals`, never from a `mean()`: the loss of a batch must be the sum over its groups, for a sweep takes
some prompts at a time and a trainer some batches.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from clha_fast.layout import Layout
from clha_fast.objectives.pairs import COMPARED, Pairs
from clha_fast.options import Settings, require
from clha_fast.types import COUNTS, SIGNALS, RankingInputs

_T = TypeVar("_T", bound="Objective")


class Terms(NamedTuple):
    """The two halves of a loss, scalars in nats: what tells candidates apart, and the likelihood of SFT targets."""

    rank: Tensor
    sft: Tensor


class Totals(NamedTuple):
    """Denominators, float64 scalars of the whole step: see `RankingInputs`. They depend on data alone."""

    prompts: Tensor
    candidates: Tensor
    tokens: Tensor
    target_tokens: Tensor


def or_one(total: Tensor) -> Tensor:
    """A denominator: one of `Totals`, and 1 where that is 0, so that nothing over nothing is 0."""
    return torch.where(total == 0, 1.0, total)


@dataclass(frozen=True)
class Plan:
    """All that data decide about a batch, before a model has run; objectives extend it with weights of their own.

    Attributes:
        given: the inputs as they came. rewards: [C] or None, as values; `pairs`, `target` and `gate` go
            by them in float32.
        pairs: all pairs; kept: bool, those that count. target: int64 [P], the candidates that SFT raises; gate: bool
            [P], whose do.
    """

    layout: Layout
    given: RankingInputs
    totals: Totals
    rewards: Tensor | None
    pairs: Pairs
    kept: Tensor
    target: Tensor
    gate: Tensor


class Group:
    """Whole prompts [first, last) of a plan with their tokens' log-probabilities [n]: what `Objective.terms` reads.

    Indices (`owner`, `i`, `j`, `target`) count from the group's first candidate. Floating tensors are float64; on a
    leaf that requires a gradient, `logps`, `sums` and `scores` have one, as has the entropy. A candidate without a
    scored token has sum and score 0, and must have no effect: `present` is False for it, as for its pairs.
    """

    def __init__(
        self, plan: Plan, first: int, last: int, logps: Tensor, statistics: Mapping[str, Tensor] | None = None
    ) -> None:
        layout = plan.layout
        self.statistics = {name: value.to(torch.float64) for name, value in (statistics or {}).items()}
        self.plan, self.first, self.last = plan, first, last
        c0, c1 = layout.candidate_offsets[first], layout.candidate_offsets[last]
        self.prompts, self.candidates, self.tokens = slice(first, last), slice(c0, c1), slice(*layout.span(first, last))
        self.pairs = slice(plan.pairs.offsets[c0], plan.pairs.offsets[c1])
        self.logps = logps.to(torch.float64)
        self.owner = layout.owner[self.tokens] - c0
        self.lengths = layout.lengths[self.candidates]
        self.sums = _segment_sums(self.logps, self.owner, c1 - c0)

    def statistic(self, name: str) -> Tensor:
        """One of `types.STATISTICS` of each token [n], 0 where that is not scored; the entropy has a graph.

        Raises:
            ValueError: it is not there, for the objective does not list it in its `statistics`.
        """
        if name not in self.statistics:
            raise ValueError(f"{name}: expected it among the objective's `statistics`, got {[*self.statistics]}")
        return self.statistics[name]

    @property
    def totals(self) -> Totals:
        return self.plan.totals

    @cached_property
    def scores(self) -> Tensor:
        """[candidates] s_i = S_i / |y_i| (Eq. 3); `sums` are the S_i."""
        return self.sums / self.lengths.clamp(min=1)

    @property
    def present(self) -> Tensor:
        """bool [candidates], those with a scored token."""
        return self.lengths > 0

    @property
    def scored(self) -> Tensor:
        """bool [n], tokens that count; the others' log-probabilities are 0."""
        return self.plan.layout.scored[self.tokens]

    @property
    def sizes(self) -> Tensor:
        """[prompts] n_p, candidates of each prompt, present or not."""
        return self.plan.layout.sizes[self.prompts]

    @property
    def prompt(self) -> Tensor:
        """int64 [candidates], the prompt of each, from the group's first."""
        return self.plan.layout.prompt[self.candidates] - self.first

    @property
    def rank(self) -> Tensor:
        """int64 [candidates], the place in the prompt, 0 the best."""
        return self.plan.layout.rank[self.candidates]

    @property
    def rewards(self) -> Tensor:
        """[candidates]; an objective that reads them without checking says that it `needs` them."""
        if self.plan.rewards is None:
            raise ValueError("rewards: expected values, which the objective reads, got None")
        return self.plan.rewards[self.candidates].to(torch.float64)

    def per_token(self, name: str) -> Tensor:
        """A signal of `RankingInputs` for each token [n], 0 where that is not scored; one a candidate is repeated.

        Raises:
            ValueError: it is not there, or `reference_logps` are sums of candidates, of which no token has a part.
        """
        values, a_candidate = self._signal(name)
        if a_candidate and name == "reference_logps":
            raise ValueError(
                "reference_logps: expected one number a token, [N], which the objective compares with the token's own, "
                f"got one a candidate, [C = {self.plan.layout.num_candidates}]"
            )
        return torch.where(self.scored, values[self.owner] if a_candidate else values, 0.0)

    def per_candidate(self, name: str) -> Tensor:
        """A signal for each candidate [candidates], 0 where absent; one a token is summed over the scored tokens."""
        values, a_candidate = self._signal(name)
        if a_candidate:
            return torch.where(self.present, values, 0.0)
        return _segment_sums(torch.where(self.scored, values, 0.0), self.owner, len(self.lengths))

    def _signal(self, name: str) -> tuple[Tensor, bool]:
        """A signal of this group in float64, and whether it is one number a candidate."""
        given: Tensor | None = getattr(self.plan.given, name)
        if given is None:
            raise ValueError(
                f"{name}: expected values, which the objective reads, got None (an Objective lists what it may read in "
                "`reads`, and what it must have in `needs`)"
            )
        layout = self.plan.layout
        a_candidate = given.shape[0] == layout.num_candidates != layout.owner.shape[0]
        values = given.to(self.logps.device, torch.float64)
        return values[self.candidates if a_candidate else self.tokens], a_candidate

    @property
    def i(self) -> Tensor:
        """int64 [pairs], the better candidate of each pair."""
        return self.plan.pairs.i[self.pairs] - self.candidates.start

    @property
    def j(self) -> Tensor:
        """int64 [pairs], the worse one."""
        return self.plan.pairs.j[self.pairs] - self.candidates.start

    @property
    def kept(self) -> Tensor:
        """bool [pairs], those that count."""
        return self.plan.kept[self.pairs]

    @property
    def order(self) -> Tensor:
        """int64 [pairs], what the rewards say of each: 1 for i above j, -1 for j above i, 0; all 1 without rewards."""
        return self.plan.pairs.order[self.pairs]

    @property
    def target(self) -> Tensor:
        """int64 [prompts], the SFT target of each."""
        return self.plan.target[self.prompts] - self.candidates.start

    @property
    def gate(self) -> Tensor:
        """bool [prompts], SFT targets that count: present, and the objective's gate is open."""
        return self.plan.gate[self.prompts]

    def of_targets(self, values: Tensor) -> Tensor:
        """values [candidates] of the SFT targets [prompts], 0 where the gate is closed, be it NaN."""
        return torch.where(self.gate, values[self.target], 0.0)

    def rectangle(self, values: Tensor, fill: float) -> Tensor:
        """values [candidates] as [prompts, most candidates of a prompt], a row a prompt; `fill` where there is none.

        Absent candidates are filled too.
        """
        offsets = self.plan.layout.candidate_offsets[self.first : self.last + 1]
        most = max((b - a for a, b in itertools.pairwise(offsets)), default=0)
        empty = values.new_full((self.last - self.first, most), fill)
        return empty.index_put((self.prompt, self.rank), torch.where(self.present, values, fill))


def _segment_sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums over the segments [count]; differentiable, and the same bits every time."""
    zeros = values.new_zeros(count)
    if values.is_cuda:
        return zeros.index_put((owner,), values, accumulate=True)  # sorts; index_add there uses float atomics
    return zeros.index_add(0, owner, values)


# Metrics of a watched objective, by the names that TRL logs them under, and the statistics they are means of.
WATCHED = {"entropy": "entropy", "mean_token_accuracy": "is_top1"}
# Before the encoded string of one.
WATCHED_MARK = "+"

# Where a signal that is missing may come from.
_WAYS = {
    "reference_logps": "; attach(frozen_copy).token_logps(batch) says them, clha-fast score --policy writes them to a "
    "file, and CLHATrainer(reference=...) takes care of them",
}


@dataclass(frozen=True)
class Objective(Settings):
    """A loss of token log-probabilities, as frozen settings that encode to one string.

    Class attributes:
        name: in tables, messages and on the command line.
        reads: fields of `SIGNALS` that `terms` may read; one that is given and not read is refused.
        divides_by: fields of `COUNTS`, all that the loss divides by: what a step that is split is given.
        metric_names: sums that `report` gives beside the common ones; logged as means over prompts, or over what a
            mapping says: ``{"ratio": "scored_tokens"}`` divides by that entry of `metrics.METRIC_NAMES`.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    divides_by: ClassVar[tuple[str, ...]] = ("prompt_count",)
    metric_names: ClassVar[tuple[str, ...] | Mapping[str, str]] = ()
    # True of what `watched` returns.
    is_watched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("name", self.name, bool(self.name), "a class attribute that names the objective")
        super().__post_init__()
        object.__setattr__(self, "encoded", f"{self.name} {self.encoded}")

    @classmethod
    def decode(cls: type[_T], encoded: str) -> _T:
        """The objective of this class whose `encoded` string is given."""
        return super().decode(encoded.partition(" ")[2])

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of `RankingInputs` without which the loss is not defined."""
        return ()

    def check(self, given: RankingInputs) -> None:
        """ValueError for a field that is missing, or that nobody would read."""
        for name in self.needs:
            if getattr(given, name) is None:
                raise ValueError(
                    f"{name}: expected values, which the objective {self.name!r} needs, got None{_WAYS.get(name, '')}"
                )
        for name in SIGNALS:
            if getattr(given, name) is not None and name not in (*self.reads, *self.needs):
                raise ValueError(f"{name}: expected None, for the objective {self.name!r} does not read it, got values")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Those of `types.STATISTICS` that `Group.statistic` gives to `terms` and `report`."""
        return ()

    @property
    def reads_entropy(self) -> bool:
        """Whether `terms` depend on the entropy, which has a slope beside the log-probability's then."""
        return False

    @property
    def wanted(self) -> tuple[str, ...]:
        """`statistics`, and what a `watched` objective reports beside them."""
        return tuple(dict.fromkeys((*self.statistics, *(WATCHED.values() if self.is_watched else ()))))

    def watched(self: _T) -> _T:
        """The same objective, whose metrics also have the means over tokens of `WATCHED`."""
        found = copy.copy(self)
        names = self.metric_names
        names = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, "prompts")
        object.__setattr__(found, "is_watched", True)
        object.__setattr__(found, "_plain", self)
        object.__setattr__(found, "metric_names", {**names, **dict.fromkeys(WATCHED, "scored_tokens")})
        object.__setattr__(found, "encoded", f"{WATCHED_MARK}{self.encoded}")
        return found

    @property
    def plain(self: _T) -> _T:
        """The objective that `watched` was asked of, whose `report` goes by its own `metric_names`; else itself."""
        found: _T = getattr(self, "_plain", self)
        return found

    def kept(self, pairs: Pairs) -> Tensor:
        """bool [pairs], those that count, in the loss or where nothing is ranked in the metrics.

        All there are; not `by_rank`, those that rewards tell apart.
        """
        return pairs.present if self.by_rank else pairs.present & (pairs.order != 0)

    def targets(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """int64 [P], each prompt's SFT target: the candidate at `sft_index`, or the first."""
        return layout.starts if sft_index is None else layout.starts + sft_index.to(layout.device)

    def gates(self, rewards: Tensor | None) -> Tensor | bool:
        """bool [P] of the targets' rewards [P], or True: whose log-probability SFT raises."""
        return True

    def count_candidates(self, layout: Layout) -> Tensor:
        """Scalar, the candidates of a batch that a mean over candidates divides by: those with a scored token."""
        return (layout.lengths > 0).sum()

    def plan(self, layout: Layout, given: RankingInputs, dtype: torch.dtype) -> Plan:
        """What data decide; rewards are values in `dtype`, and compared in float32, whatever that is.

        Kernels compare them so, and so do the counts of a step, which know of no model.
        """
        rewards = None if given.rewards is None else given.rewards.to(layout.device, dtype, non_blocking=True)
        compared = None if rewards is None else rewards.to(COMPARED)
        pairs = Pairs.of(layout, compared)
        target = self.targets(layout, compared, given.sft_index)
        gate = (layout.lengths[target] > 0) & self.gates(None if compared is None else compared[target])
        counted = (
            torch.full((), layout.num_prompts, dtype=torch.float64, device=layout.device),
            self.count_candidates(layout),
            layout.lengths.sum(),
            layout.lengths[target].sum(),
        )
        totals = [
            (own if (value := getattr(given, name)) is None else value).to(
                layout.device, torch.float64, non_blocking=True
            )
            for name, own in zip(COUNTS[1:], counted, strict=True)
        ]
        return Plan(layout, given, Totals(*totals), rewards, pairs, self.kept(pairs), target, gate)

    def counts(self, layout: Layout, given: RankingInputs, distances: int) -> dict[str, Tensor]:
        """All of `COUNTS`, float64: they add up over batches and processes, and depend on data alone.

        Args:
            distances: size of `pair_counts`, the most candidates of a prompt anywhere less one.
        """
        bare = RankingInputs(given.candidate_lengths, given.candidates_per_prompt, given.rewards, given.sft_index)
        own = Objective.plan(self, layout, bare, COMPARED)
        pairs = own.pairs.at_distances(own.kept, distances)
        return dict(zip(COUNTS, (pairs, *own.totals), strict=True))

    def inert(self, layout: Layout, rewards: Tensor | None, sft_index: Tensor | None) -> Tensor:
        """bool [C], candidates that neither the loss nor its gradients depend on, whatever the model says: none."""
        return torch.zeros(layout.num_candidates, dtype=torch.bool, device=layout.device)

    def terms(self, group: Group) -> Terms:
        """The loss of whole prompts, with a graph to `group.logps`; it adds up over groups."""
        raise NotImplementedError(f"objective {self.name!r}: expected a method terms(group)")

    def slopes(self, group: Group) -> Tensor | None:
        """float64 [n], d(rank + sft) / d logp of the group's tokens in closed form; None takes autograd's."""
        return None

    def active(self, group: Group) -> Tensor:
        """bool [pairs], those of `group.kept` that push, for `active_pair_share`."""
        return group.kept

    def report(self, group: Group) -> Mapping[str, Tensor]:
        """The sums called `metric_names`, without a graph."""
        return {}

    @property
    def markers(self) -> tuple[str, str] | None:
        """Texts before good and bad answers, of an objective that trains on chains (`data.chains`), not on answers."""
        return None

    @property
    def ranks(self) -> bool:
        """Whether the loss tells candidates apart at all."""
        return True

    @property
    def by_rank(self) -> bool:
        """Whether the places of candidates say which is better; False where their rewards do, whatever the places.

        Metrics of pairs go by the same; without rewards, by place.
        """
        return True

    @property
    def noise_hint(self) -> str:
        """Which settings may have dropped every pair, as a sentence of advice."""
        return ""

    def silence_hint(self, several: bool) -> str:
        """Why the loss may depend on no response at all, and the way out, as a clause.

        Args:
            several: some prompt has more than one response.
        """
        return "give prompts that have several responses" if not several else "see what the objective leaves out"
