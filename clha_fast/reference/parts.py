"""What the equations of objectives have in common: candidates, targets and pairs of packed tokens, and metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.options import HeadOptions
from clha_fast.types import RankingInputs


def candidates(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions
) -> tuple[list[int], Tensor, Tensor, Tensor, Tensor | None]:
    """(n_p, |y_i|, S_i, s_i, rewards) of packed tokens."""
    spans: list[int] = given.candidate_lengths.tolist()
    parts = zip(logps.split(spans), (targets != head.ignore_index).split(spans), strict=True)
    lengths, sums = zip(*((scored.sum().to(logps.dtype), part[scored].sum()) for part, scored in parts), strict=True)
    length, total = torch.stack(lengths), torch.stack(sums)
    reward = None if given.rewards is None else given.rewards.to(device=logps.device, dtype=logps.dtype)
    return given.candidates_per_prompt.tolist(), length, total, total / length.clamp(min=1), reward


def targets(sizes: list[int], given: RankingInputs) -> list[int]:
    """The candidate that is each prompt's SFT target."""
    places = [0] * len(sizes) if given.sft_index is None else given.sft_index.tolist()
    return [sum(sizes[:p]) + place for p, place in enumerate(places)]


def pairs(sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Every pair i < j of a prompt, i the better one."""
    pairs: list[tuple[int, int]] = []
    start = 0
    for size in sizes:
        pairs += [(start + i, start + j) for i in range(size) for j in range(i + 1, size)]
        start += size
    i, j = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    return i, j


def target_nll(
    form: str, chosen: list[int], lengths: Tensor, sums: Tensor, scores: Tensor, given: RankingInputs
) -> tuple[Tensor, Tensor]:
    """The NLL of the SFT targets `chosen`, mean over prompts or over their tokens, and bool [P], which have a token."""
    gate = lengths[chosen] > 0
    here = torch.tensor(chosen)[gate]
    if form == "prompt_mean":
        return -scores[here].sum() / count(given.prompt_count, len(chosen), scores), gate
    tokens = count(given.target_token_count, max(1.0, float(lengths[here].sum())), scores)
    return -sums[here].sum() / tokens, gate


def per_candidate(
    values: Tensor | None, logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions
) -> Tensor:
    """[C] a signal that is given a candidate; one given a token, the rule where N = C, is summed over scored tokens."""
    assert values is not None
    spans: list[int] = given.candidate_lengths.tolist()
    values = values.to(logps)
    if len(values) == len(spans) != len(logps):
        return values
    scored = (targets != head.ignore_index).split(spans)
    return torch.stack([part[on].sum() for part, on in zip(values.split(spans), scored, strict=True)])


def count(given: Tensor | None, own: float, like: Tensor) -> Tensor:
    """A denominator: the count given, else `own`; 1 where that is 0, which is a count of nothing."""
    total = torch.tensor(float(own), dtype=like.dtype, device=like.device) if given is None else given.to(like)
    return torch.where(total == 0, 1.0, total)


def metrics(
    rank_loss: Tensor,
    sft_loss: Tensor,
    scores: Tensor,
    lengths: Tensor,
    sizes: list[int],
    reward: Tensor | None,
    kept: Tensor,
    active: Tensor,
    gate: Tensor,
    own: tuple[Tensor, ...] = (),
    by_rank: bool = True,
) -> Tensor:
    """The sums called `metrics.METRIC_NAMES`, then the objective's own, float32; kept and active are of all pairs.

    by_rank: the first of a pair is the better one; else the one with the higher reward, where rewards are given.
    Rewards are compared in float32.
    """
    with torch.no_grad():
        i, j = pairs(sizes, scores.device)
        order = torch.ones_like(scores[i]) if reward is None else torch.sign(reward[i].float() - reward[j].float())
        if not by_rank:
            i, j = torch.where(order < 0, j, i), torch.where(order < 0, i, j)
            order = order.abs()
        lead = scores[i] - scores[j]
        ordered = (lengths[i] > 0) & (lengths[j] > 0) & (order != 0)
        agreement = (order * lead)[ordered]
        sums = [
            rank_loss,
            sft_loss,
            kept.sum(),
            kept.numel(),
            (lead[kept] > 0).sum() + 0.5 * (lead[kept] == 0).sum(),
            lead[kept].sum(),
            scores[i][kept].sum(),
            scores[j][kept].sum(),
            active[kept].sum(),
            ordered.sum(),
            (agreement > 0).sum(),
            (agreement < 0).sum(),
            gate.sum(),
            len(sizes),
            lengths.sum(),
            (lengths > 0).sum(),
            *(0, 0, 0),  # every gradient is whole here
            *own,
        ]
        return torch.stack([torch.as_tensor(value, dtype=torch.float32, device=scores.device) for value in sums])
