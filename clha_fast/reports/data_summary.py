"""Records for training and evaluation, counted under the options of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clha_fast.batching.batch import inert_mask
from clha_fast.data.chains import chain_count
from clha_fast.data.records import RankedRecord
from clha_fast.layout import Layout
from clha_fast.objectives import CLHAOptions, Objective
from clha_fast.objectives.pairs import QUARTILES, leads, pair_blocks, quantiles
from clha_fast.types import RankingInputs


@dataclass(frozen=True)
class DataSummary:
    """Counts over a list of records, under the options of a loss.

    Attributes:
        pairs: all i < j. noise_pairs: those that the objective does not keep. inert: candidates that training does not
            run.
        reversed_pairs: kept ones in which the worse-ranked response has the higher reward. equal_pairs: kept ones of
            equal rewards.
        closed_gates: prompts whose SFT target's reward is not above the floor.
        gaps: quartiles of |r_i - r_j| over all pairs, () without rewards or pairs.
        chains: what training runs in the place of `candidates`, of an objective with markers; else None. unchained:
            responses in none of them.
    """

    prompts: int
    candidates: int
    fewest: int
    most: int
    rewarded: bool
    pairs: int
    noise_pairs: int
    inert: int
    closed_gates: int
    reversed_pairs: int = 0
    equal_pairs: int = 0
    gaps: tuple[float, ...] = ()
    chains: int | None = None
    unchained: int = 0

    @property
    def kept_pairs(self) -> int:
        return self.pairs - self.noise_pairs


def summarise(records: Sequence[RankedRecord], objective: Objective) -> DataSummary:
    """Counts of what the loss will see; records with and without rewards must not be mixed."""
    sizes = torch.tensor([len(record.completions) for record in records])
    targets = torch.tensor([record.sft_index for record in records])
    rewards = None
    if records[0].rewards is not None:
        rewards = torch.tensor([reward for record in records for reward in record.rewards or ()], dtype=torch.float32)
    pairs = noise = closed = backwards = equal = start = first = 0
    # All pairs of a block of prompts exist at a time, not those of the whole file.
    for block in pair_blocks(sizes.tolist(), int):
        layout = Layout.whole(torch.tensor(block))
        here = None if rewards is None else rewards[start : start + layout.num_candidates]
        ones = torch.ones(layout.num_candidates, dtype=torch.long)
        given = RankingInputs(ones, torch.tensor(block), here, targets[first : first + len(block)])
        start, first = start + layout.num_candidates, first + len(block)
        # Not the objective's own plan, which may read signals: sizes, rewards and targets are all that is counted.
        plan = Objective.plan(objective, layout, given, torch.float32)
        pairs += plan.kept.numel()
        noise += int((~plan.kept).sum())
        closed += int((~plan.gate).sum())
        backwards += int((plan.kept & (plan.pairs.order < 0)).sum())
        equal += int((plan.kept & (plan.pairs.order == 0)).sum())
    chained = {}
    if objective.markers is not None:
        chained = {"chains": sum(map(chain_count, sizes.tolist())), "unchained": int((sizes - 2).clamp(min=0).sum())}
    return DataSummary(
        prompts=len(records),
        candidates=int(sizes.sum()),
        fewest=int(sizes.min()),
        most=int(sizes.max()),
        rewarded=rewards is not None,
        pairs=pairs,
        noise_pairs=noise,
        inert=int(inert_mask(rewards, sizes, targets, objective).sum()),
        closed_gates=closed,
        reversed_pairs=backwards,
        equal_pairs=equal,
        gaps=() if rewards is None else quantiles(lambda: leads(sizes.tolist(), rewards), QUARTILES),
        **chained,
    )


def share_text(part: int, whole: int) -> str:
    """A count with its percentage."""
    return f"{part:,} ({100 * part / whole:.0f}%)" if whole else str(part)


def template_text(texts: int, prompts: int, templated: bool) -> str:
    """What is to be said of `texts` prompts that are texts and others that are messages; "" where it goes without it.

    Args:
        templated: whether the tokenizer has a chat template, which texts miss and messages need.
    """
    if not templated:
        if texts == prompts:
            return ""
        which = "prompts are" if not texts else f"{prompts - texts:,} of {prompts:,} prompts are"
        return (
            f'{which} messages and the tokenizer has no chat template: they are written as "User: ...", "Assistant: "; '
            "where the model has one, set tokenizer.chat_template and save it with the model"
        )
    if not texts:
        return ""
    which = "prompts are texts and go" if texts == prompts else f"{texts:,} of {prompts:,} prompts are texts and go"
    return f"{which} without the tokenizer's chat template, as for a model that completes; messages go through it"


def data_text(summary: DataSummary, options: Objective) -> str:
    """The counts in a line, with what an objective makes of them."""
    span = str(summary.most) if summary.fewest == summary.most else f"{summary.fewest} to {summary.most}"
    text = f"{summary.prompts:,} prompts, {summary.candidates:,} responses ({span} a prompt)"
    if summary.chains is not None:
        unchained = share_text(summary.unchained, summary.candidates)
        return f"{text}, made into {summary.chains:,} chains; responses between best and worst, in no chain {unchained}"
    clha = isinstance(options, CLHAOptions)
    if not summary.rewarded and clha:
        return f"{text}, no rewards: all {summary.pairs:,} pairs count, all SFT gates are open"
    parts = []
    if clha:
        parts.append(f"pairs dropped as noise {share_text(summary.noise_pairs, summary.pairs)}")
    elif summary.noise_pairs and options.ranks:  # whatever the objective's own rule is
        parts.append(f"pairs left out {share_text(summary.noise_pairs, summary.pairs)}")
    if not summary.rewarded:
        parts.append("no rewards")
    elif clha or (options.ranks and options.by_rank):
        parts.append(f"kept pairs reversed {share_text(summary.reversed_pairs, summary.kept_pairs)}")
        if summary.equal_pairs:
            parts.append(f"of equal rewards, ranked by place {share_text(summary.equal_pairs, summary.kept_pairs)}")
    parts.append(f"inert responses {share_text(summary.inert, summary.candidates)}")
    if clha:
        parts.append(f"SFT gates closed {share_text(summary.closed_gates, summary.prompts)}")
    return f"{text}; {', '.join(parts)}"
