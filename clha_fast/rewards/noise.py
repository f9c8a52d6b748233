"""How far a ranking and the rewards of a reward model disagree: what the rescoring strategy will find."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.objectives.pairs import keeps


@dataclass(frozen=True)
class NoiseCounts:
    """Counts over the prompts with `size` responses, or over all of them (`size` None).

    Attributes:
        prompts, pairs: prompts, and their pairs i < j (i is ranked better).
        reversed: pairs with r_j > r_i, the worse-ranked response has the higher reward.
        inside_margin: pairs with |r_i - r_j| <= reward_margin; the noise rule "abs" drops these and no others.
        reversed_outside: pairs with r_j - r_i > reward_margin; "abs" keeps them, "signed" drops them.
        closed_gates: prompts whose SFT target has a reward not above reward_floor.
    """

    size: int | None
    prompts: int
    pairs: int
    reversed: int
    inside_margin: int
    reversed_outside: int
    closed_gates: int


@dataclass(frozen=True)
class NoiseReport:
    """What `measure_noise` found.

    Attributes:
        by_size: one entry for each number of responses that occurs, ascending. total: their sums.
        gaps: r_i - r_j of all pairs, float32 [pairs], on the CPU.
    """

    reward_margin: float
    reward_floor: float
    by_size: tuple[NoiseCounts, ...]
    total: NoiseCounts
    gaps: Tensor


def measure_noise(
    records: Sequence[RankedRecord], reward_margin: float = 3.0, reward_floor: float = 0.0
) -> NoiseReport:
    """Compare the order of every record's responses with its rewards.

    Rewards, their differences and both thresholds are compared in float32, as the loss compares them.

    Args:
        records: with rewards; position is rank.
        reward_margin, reward_floor: as in `CLHAOptions`.

    Raises:
        RecordError: no record, or one without rewards.
        ValueError: a threshold that `CLHAOptions` refuses.
    """
    options = CLHAOptions(reward_margin=reward_margin, reward_floor=reward_floor)
    if not records:
        raise RecordError("records: expected at least one, got none")
    groups: dict[int, list[RankedRecord]] = defaultdict(list)
    for record in records:
        if record.rewards is None:
            raise RecordError.of(record.source, "rewards", "rewards to compare the ranking with", None)
        groups[len(record.completions)].append(record)
    counts, gaps = [], []
    for size, group in sorted(groups.items()):
        rewards = torch.tensor([record.rewards for record in group], dtype=torch.float32)
        better, worse = torch.triu_indices(size, size, 1)
        gap = (rewards[:, better] - rewards[:, worse]).flatten()
        targets = torch.tensor([record.sft_index for record in group])
        target_rewards = rewards.gather(1, targets[:, None])
        outside, ahead = (keeps(gap, rule, options.reward_margin) for rule in ("abs", "signed"))
        counts.append(
            NoiseCounts(
                size=size,
                prompts=len(group),
                pairs=gap.numel(),
                reversed=int((gap < 0).sum()),
                inside_margin=int((~outside).sum()),
                reversed_outside=int((outside & ~ahead).sum()),
                closed_gates=int((~torch.as_tensor(options.gates(target_rewards))).sum()),
            )
        )
        gaps.append(gap)
    names = ("prompts", "pairs", "reversed", "inside_margin", "reversed_outside", "closed_gates")
    total = NoiseCounts(size=None, **{name: sum(getattr(part, name) for part in counts) for name in names})
    return NoiseReport(reward_margin, reward_floor, tuple(counts), total, torch.cat(gaps))
