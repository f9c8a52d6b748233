"""What a pass over logits leaves, and how passes walk them: by blocks of words, by runs of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clha_fast.options import ROUTE_WORDS

# exp(x) is taken as exp2(x * log2(e)): torch hands exp to MKL, which took 2.6 to 4.5 times as long on an AMD EPYC.
_LOG2_E = math.log2(math.e)


@dataclass
class Scan:
    """What one pass over the logits of n tokens leaves: numbers per token, and per token and block of words.

    `chosen` is the target's logit (0 where the target is not among the head's words), `slope` the softcap's derivative
    there. `total` = sum(exp(z - peak)) is float64; `block_peaks` and `block_sums` are [ceil(V / ROUTE_WORDS), n].
    `moments`: of the `STATISTICS` that were wanted the float64 sums [n] over all words, by name: of
    exp(z - peak) (z - peak), exp(z - peak)^2, and z; and whether the target's logit is `peak`.
    """

    tokens: Tensor
    peak: Tensor
    total: Tensor
    chosen: Tensor
    slope: Tensor | None
    block_peaks: Tensor
    block_sums: Tensor
    moments: dict[str, Tensor]

    def at(self, columns: slice | Tensor) -> Scan:
        """Of some of its tokens, by their positions in it."""
        return Scan(
            tokens=self.tokens[columns],
            peak=self.peak[columns],
            total=self.total[columns],
            chosen=self.chosen[columns],
            slope=None if self.slope is None else self.slope[columns],
            block_peaks=self.block_peaks[:, columns],
            block_sums=self.block_sums[:, columns],
            moments={name: moment[columns] for name, moment in self.moments.items()},
        )

    @property
    def log_total(self) -> Tensor:
        """lse - peak: the two stay apart, for beside a peak of 1e4 float32 keeps three digits of this."""
        return self.total.log().to(self.peak.dtype)

    @property
    def logps(self) -> Tensor:
        return (self.chosen - self.peak) - self.log_total

    @property
    def lse(self) -> Tensor:
        return (self.peak + self.total.log()).to(self.peak.dtype)


def by_block(part: Tensor) -> list[tuple[int, Tensor]]:
    """A part [words, n] as (first block, [blocks, words a block, n]): the whole blocks, then a shorter last one."""
    whole = part.shape[0] // ROUTE_WORDS
    pieces = [(0, part[: whole * ROUTE_WORDS].unflatten(0, (whole, ROUTE_WORDS)))] if whole else []
    if part.shape[0] % ROUTE_WORDS:
        pieces.append((whole, part[whole * ROUTE_WORDS :].unsqueeze(0)))
    return pieces


def keep(stores: Sequence[Tensor], first: int, values: Tensor) -> None:
    """Writes values [words, >= n_0 + n_1 + ...] into rows [first, first + words) of the stores [V, n_i]."""
    at = 0
    for store in stores:
        store[first : first + values.shape[0]].copy_(values[:, at : at + store.shape[1]])
        at += store.shape[1]


def runs_of(positions: Tensor) -> list[slice]:
    """Ascending positions as ranges of neighbours; reads them on the host."""
    last = (positions.diff() != 1).nonzero().squeeze(1).tolist()
    firsts, lasts = [0, *(at + 1 for at in last)], [*last, positions.numel() - 1]
    found = positions.tolist()
    return [slice(found[a], found[b] + 1) for a, b in zip(firsts, lasts, strict=True)] if found else []


def exp_(x: Tensor) -> Tensor:
    """exp(x) in place."""
    return x.mul_(_LOG2_E).exp2_()


def scale_by_(rows: Tensor, factors: Tensor) -> Tensor:
    """rows [n, H] times factors [n], in place; on a GPU a factor of 0 gives 0 whatever the row, be it NaN.

    On a CPU rows without a factor have been left out.
    """
    rows *= factors.unsqueeze(1)
    return rows if rows.device.type == "cpu" else rows.masked_fill_((factors == 0).unsqueeze(1), 0)


def pick_target(z: Tensor, at: Tensor, own: Tensor, otherwise: Tensor) -> Tensor:
    """z[at_t, t] of targets within z [words, n], else `otherwise` [n]."""
    here = own & (at >= 0) & (at < z.shape[0])
    return torch.where(here, z.gather(0, at.clamp(0, z.shape[0] - 1).unsqueeze(0)).squeeze(0), otherwise)


def subtract_target(p: Tensor, at: Tensor, own: Tensor, value: Tensor) -> None:
    """p[at_t, t] -= value_t for targets within p [words, n]: p - 1 in float32, as autograd forms it."""
    here = own & (at >= 0) & (at < p.shape[0])
    p.scatter_add_(0, at.clamp(0, p.shape[0] - 1).unsqueeze(0), -torch.where(here, value, 0.0).unsqueeze(0))
