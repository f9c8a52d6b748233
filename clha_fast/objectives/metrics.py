"""What a loss call reports besides its value: sums, so that batches and processes add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clha_fast.objectives.base import WATCHED, Group, Objective, Terms
from clha_fast.objectives.pairs import wins

# The order of the metrics vector that every backend fills (float32 [19], and behind them what the objective names);
# every entry is a sum. The last three stay 0 where gradients are exact: (token, vocabulary block) pairs that a routed
# backward keeps, all such pairs of the scored tokens, and the softmax mass that it leaves out, summed over the scored
# tokens.
METRIC_NAMES = (
    "rank_loss",
    "sft_loss",
    "kept_pairs",
    "total_pairs",
    "correct_pairs",
    "margin_sum",
    "chosen_sum",
    "rejected_sum",
    "active_pairs",
    "ordered_pairs",
    "concordant_pairs",
    "discordant_pairs",
    "open_gates",
    "prompts",
    "scored_tokens",
    "scored_candidates",
    "kept_blocks",
    "routable_blocks",
    "dropped_mass",
)
_INDEX = {name: index for index, name in enumerate(METRIC_NAMES)}


def as_logged() -> list[str]:
    """The names under which the common metrics are logged."""
    ones = CLHAMetrics(torch.ones(len(METRIC_NAMES), dtype=torch.float32), torch.zeros(0, dtype=torch.float32))
    return list(ones.as_dict())


def metric_names(objective: Objective) -> tuple[str, ...]:
    """The entries of the metrics vector of a loss: the common ones, then the objective's own."""
    return (*METRIC_NAMES, *objective.metric_names)


def metric_sums(objective: Objective, group: Group, terms: Terms) -> Tensor:
    """The metrics vector, float32, of a group that is the whole batch; a routed backward fills its three itself."""
    plan, kept, lengths = group.plan, group.kept, group.lengths
    better, worse = group.scores[group.i], group.scores[group.j]
    order = plan.pairs.order
    if not objective.by_rank:
        reversed_ = order < 0
        better, worse = torch.where(reversed_, worse, better), torch.where(reversed_, better, worse)
        order = order.abs()
    gap = worse - better
    # Selected in place: an index by a mask has a shape that a GPU would have to tell.
    ordered = plan.pairs.present & (order != 0)
    agreement = torch.where(ordered, -(order * gap), 0.0)
    common = [
        terms.rank,
        terms.sft,
        kept.sum(),
        kept.numel(),
        torch.where(kept, wins(-gap), 0.0).sum(),
        -torch.where(kept, gap, 0.0).sum(),
        torch.where(kept, better, 0.0).sum(),
        torch.where(kept, worse, 0.0).sum(),
        (objective.active(group) & kept).sum(),
        ordered.sum(),
        (agreement > 0).sum(),
        (agreement < 0).sum(),
        plan.gate.sum(),
        plan.gate.numel(),
        lengths.sum(),
        (lengths > 0).sum(),
    ]
    routed = [0.0] * (len(METRIC_NAMES) - len(common))
    own = dict(objective.plain.report(group))
    if objective.is_watched:
        own |= {name: group.statistic(of).sum() for name, of in WATCHED.items()}
    sums: list[Any] = [*common, *routed, *(own[name] for name in objective.metric_names)]
    # Not by way of torch's default dtype: in bfloat16 a Python float keeps three digits.
    zero = torch.zeros((), dtype=torch.float32, device=gap.device)
    return torch.stack(
        [value.to(zero) if isinstance(value, Tensor) else torch.full_like(zero, value) for value in sums]
    )


class CLHAMetrics:
    """Metrics of one or several loss calls, on the loss's device; reading a number synchronises, nothing else does.

    A mean over nothing (no kept pair) is NaN, never 0.

    Attributes:
        values: float32 [19 or more], sums in the order of `METRIC_NAMES`, then of `names`, the objective's own.
        names: of each of these, the entry of `METRIC_NAMES` by which it is divided when logged.
        scores: [C] length-normalised log-probability s_i of every candidate (Eq. 3); 0 for one without tokens.
    """

    def __init__(
        self, values: Tensor, scores: Tensor, calls: float = 1, names: Sequence[str] | Mapping[str, str] = ()
    ) -> None:
        self.values = values
        self.scores = scores
        self.names = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, "prompts")
        self._calls = calls

    def sum_of(self, name: str) -> Tensor:
        """The raw sum called `name` in `METRIC_NAMES` or by the objective, a scalar tensor."""
        return self.values[_INDEX[name] if name in _INDEX else len(METRIC_NAMES) + list(self.names).index(name)]

    def _per_kept_pair(self, name: str) -> Tensor:
        return self.sum_of(name) / self.sum_of("kept_pairs")

    @property
    def rank_loss(self) -> Tensor:
        """Ranking term of the loss, mean over the merged calls."""
        return self.sum_of("rank_loss") / self._calls

    @property
    def sft_loss(self) -> Tensor:
        """SFT term of the loss, mean over the merged calls."""
        return self.sum_of("sft_loss") / self._calls

    @property
    def kept_pair_share(self) -> Tensor:
        """Kept pairs over all pairs i < j."""
        return self.sum_of("kept_pairs") / self.sum_of("total_pairs")

    @property
    def ranking_accuracy(self) -> Tensor:
        """Share of the kept pairs in which the better candidate has the higher score; equal scores count half.

        The better one is ranked before the other; of an objective not `by_rank`, it has the higher reward.
        """
        return self._per_kept_pair("correct_pairs")

    @property
    def margin(self) -> Tensor:
        """Mean of the better candidate's score less the worse one's over the kept pairs, nats per token."""
        return self._per_kept_pair("margin_sum")

    @property
    def chosen_logp(self) -> Tensor:
        """Mean score of the better side over the kept pairs."""
        return self._per_kept_pair("chosen_sum")

    @property
    def rejected_logp(self) -> Tensor:
        """Mean score of the worse side over the kept pairs."""
        return self._per_kept_pair("rejected_sum")

    @property
    def kendall_tau(self) -> Tensor:
        """(concordant - discordant) / pairs with an order, pooled over prompts; the noise rule plays no part."""
        return (self.sum_of("concordant_pairs") - self.sum_of("discordant_pairs")) / self.sum_of("ordered_pairs")

    @property
    def num_tokens(self) -> Tensor:
        """Scored tokens."""
        return self.sum_of("scored_tokens")

    @property
    def kept_block_share(self) -> Tensor:
        """Share of the (token, vocabulary block) pairs that a routed backward computes; NaN for exact gradients."""
        return self.sum_of("kept_blocks") / self.sum_of("routable_blocks")

    @property
    def dropped_mass(self) -> Tensor:
        """Softmax mass that a routed backward leaves out, mean a scored token; 0 for exact gradients."""
        return self.sum_of("dropped_mass") / self.sum_of("scored_tokens")

    @classmethod
    def merge(cls, parts: Iterable[CLHAMetrics]) -> CLHAMetrics:
        """Metrics over several calls: pair metrics weigh every pair alike, the two losses every call alike.

        Raises:
            ValueError: there is none, or objectives' own metrics differ in names, order or what they are divided by.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one CLHAMetrics, got none")
        first = list(parts[0].names.items())
        for part in parts:
            if list(part.names.items()) != first:
                expected, got = (", ".join(names) or "none" for names in (parts[0].names, part.names))
                raise ValueError(
                    f"parts: expected metrics of one objective, got own metrics {expected} and {got}, each by its own "
                    "divisor; merge those of each objective apart"
                )
        values = torch.stack([part.values for part in parts]).sum(0)
        calls = sum(part._calls for part in parts)
        return cls(values, torch.cat([part.scores for part in parts]), calls, parts[0].names)

    def as_dict(self) -> dict[str, float]:
        """All metrics as Python floats under their usual names (one synchronisation)."""
        sums = dict(zip((*METRIC_NAMES, *self.names), self.values.tolist(), strict=True))

        def ratio(top: float, bottom: float) -> float:
            return top / bottom if bottom else float("nan")

        kept, blocks = sums["kept_pairs"], sums["routable_blocks"]
        routed = {
            "kept_block_share": ratio(sums["kept_blocks"], blocks),
            "dropped_mass": ratio(sums["dropped_mass"], sums["scored_tokens"]),
        }
        return {
            "rank_loss": sums["rank_loss"] / self._calls,
            "sft_loss": sums["sft_loss"] / self._calls,
            "rewards/accuracies": ratio(sums["correct_pairs"], kept),
            "rewards/margins": ratio(sums["margin_sum"], kept),
            "logps/chosen": ratio(sums["chosen_sum"], kept),
            "logps/rejected": ratio(sums["rejected_sum"], kept),
            "kept_pair_share": ratio(kept, sums["total_pairs"]),
            "active_pair_share": ratio(sums["active_pairs"], kept),
            "open_gate_share": ratio(sums["open_gates"], sums["prompts"]),
            "kendall_tau": ratio(sums["concordant_pairs"] - sums["discordant_pairs"], sums["ordered_pairs"]),
            "num_tokens": sums["scored_tokens"],
            **{name: ratio(sums[name], sums[count]) for name, count in self.names.items()},
            **(routed if blocks else {}),
        }

    def __repr__(self) -> str:
        return f"CLHAMetrics({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"


_Context = tuple[float, tuple[tuple[str, str], ...]]


def _flatten(metrics: CLHAMetrics) -> tuple[list[Tensor], _Context]:
    return [metrics.values, metrics.scores], (metrics._calls, tuple(metrics.names.items()))


def _unflatten(tensors: Iterable[Any], context: _Context) -> CLHAMetrics:
    values, scores = tensors
    calls, names = context
    return CLHAMetrics(values, scores, calls, dict(names))


# What torch.export and torch.func take a result apart with.
pytree.register_pytree_node(
    CLHAMetrics,
    _flatten,
    _unflatten,
    serialized_type_name="clha_fast.CLHAMetrics",
    to_dumpable_context=lambda context: [context[0], list(context[1])],
    from_dumpable_context=lambda context: (context[0], tuple((name, count) for name, count in context[1])),
)
