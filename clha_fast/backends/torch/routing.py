"""The torch backend's routed gradients: tokens go to the vocabulary blocks in which their softmax has mass.

A token leaves out its lightest blocks of `ROUTE_WORDS` words, its target's aside, as long as their masses sum to at
most d. With c the gradient of its log-probability and w_v the rows of the weight, the exact gradient is
-c * sum_v (p_v - [v = target]) * w_v. Of a block b that is left out, dhidden gets the block's exact mass
m_b = sum_{v in b} p_v times the mean of its rows, wbar_b, instead of sum_{v in b} p_v * w_v; dweight and dbias get
nothing. So

    |error of dhidden_t| <= |c_t| * sum_{b left out} m_tb * max_{v in b} |w_v - wbar_b|
    |error of dweight_v| <= sum_{t without v} |c_t| * p_tv * |x_t|

(scale / temperature times that). The first is at most |c_t| * d times the largest distance of a row from the mean of
its block: what the rows of a block have in common, as those of neighbours in a vocabulary sorted by frequency do, costs
nothing. What is kept is exact: nothing is renormalised. dweight has no such term: a mean word's share of m_tb says
little of p_tv, and it took less than 4% off the error of dweight on all workloads simulated.

With a softcap the slope of a logit, s_v <= 1, stands before w_v. The mean is multiplied by s_b, the slope at the logit
whose exponential is the block's mean one, lse_t + log(m_tb / |b|): exact where the logits of a block are equal, and
near its heavy words where they are not. |s_v * w_v - s_b * wbar_b| takes the place of the distance above.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clha_fast.backends.torch.head import TorchHead, block_bytes
from clha_fast.backends.torch.scans import Scan
from clha_fast.layout import accumulate
from clha_fast.options import ROUTE_WORDS

# Blocks whose tokens are listed at a time.
_LISTED_BLOCKS = 32


def kept_blocks(masses: Tensor, max_dropped_mass: float) -> Tensor:
    """Which blocks of masses [blocks, n] stay: one threshold a token, the lightest below it sum to at most d.

    A token whose masses are NaN keeps everything.
    """
    lightest = masses.t().sort(dim=1).values
    fits = _running_sums(lightest) <= max_dropped_mass
    dropped = fits.sum(1, keepdim=True).clamp(max=masses.shape[0] - 1)
    threshold = lightest.gather(1, dropped).squeeze(1)
    return ~(masses < threshold)


def _running_sums(values: Tensor) -> Tensor:
    """float64 [n, blocks], `values.cumsum(1)`.

    On a GPU by doubling: torch promises no order there for a running sum of floating numbers, and refuses it under
    `torch.use_deterministic_algorithms(True)`.
    """
    if values.device.type == "cpu":
        return values.cumsum(1, dtype=torch.float64)
    sums, reach = values.double(), 1
    while reach < sums.shape[1]:
        sums = torch.cat([sums[:, :reach], sums[:, reach:] + sums[:, :-reach]], dim=1)
        reach *= 2
    return sums


def block_means(head: TorchHead) -> Tensor:
    """Means of the weight's rows, [blocks, H] in the head's float32 or float64: a few blocks at a time are widened."""
    vocabulary, width = head.weight.shape
    whole = vocabulary // ROUTE_WORDS
    means = torch.empty(-(-vocabulary // ROUTE_WORDS), width, dtype=head.dtype, device=head.device)
    step = max(1, block_bytes(head.device) // (ROUTE_WORDS * max(1, width) * head.dtype.itemsize))
    for first in range(0, whole, step):
        last = min(first + step, whole)
        rows = head.weight[first * ROUTE_WORDS : last * ROUTE_WORDS].to(head.dtype)
        torch.mean(rows.unflatten(0, (last - first, ROUTE_WORDS)), 1, out=means[first:last])
    if whole < means.shape[0]:
        torch.mean(head.weight[whole * ROUTE_WORDS :].to(head.dtype), 0, out=means[whole])
    return means


def _tokens_by_block(kept: Tensor) -> Iterator[Tensor]:
    """The positions that each row of kept [blocks, n] holds; some rows at a time, for one found takes 16 bytes."""
    counts = kept.sum(1).tolist()
    for first in range(0, len(counts), _LISTED_BLOCKS):
        rows = slice(first, first + _LISTED_BLOCKS)
        yield from kept[rows].nonzero()[:, 1].split(counts[rows])


class Route:
    """Which tokens go to which vocabulary blocks: filled scan by scan, then walked block by block.

    Without `gradients` it counts what would be left out, for the metrics, and remembers nothing of the tokens.
    """

    def __init__(self, head: TorchHead, max_dropped_mass: float, gradients: bool = True) -> None:
        self.head, self.max_dropped_mass, self.gradients = head, max_dropped_mass, gradients
        self.num_blocks = -(-head.weight.shape[0] // ROUTE_WORDS)
        self._tokens: list[Tensor] = []
        # [blocks, n] a scan: the masses of pairs that are kept, positive or NaN, and minus those of pairs left out.
        self._masses: list[Tensor] = []
        self._sums = torch.zeros(3, dtype=torch.float64, device=head.device)

    def add(self, scan: Scan) -> None:
        """Routes a scan's tokens by the masses of its blocks."""
        masses = scan.block_sums * torch.exp(scan.block_peaks - scan.peak) / scan.total.to(scan.peak.dtype)
        word, own = self.head.columns(scan.tokens)
        own_block = own & (torch.arange(self.num_blocks, device=word.device).unsqueeze(1) == word // ROUTE_WORDS)
        # The target's block always stays, so its mass takes nothing of what the others may leave out.
        kept = kept_blocks(masses.masked_fill(own_block, torch.inf), self.max_dropped_mass)
        scored = self.head.targets[scan.tokens] != self.head.head.ignore_index
        left_out = torch.where(kept, 0.0, masses).sum(0, dtype=torch.float64)
        self._sums[0] += (kept & scored).sum()
        self._sums[1] += scored.sum() * self.num_blocks
        self._sums[2] += torch.where(scored, left_out, 0.0).sum()
        if not self.gradients:
            return
        self._tokens.append(scan.tokens)
        # The target's block may have a mass of 0 and is kept.
        self._masses.append(torch.where(kept, masses.clamp(min=torch.finfo(masses.dtype).tiny), -masses))

    def metrics(self) -> Tensor:
        """(kept_blocks, routable_blocks, dropped_mass) of the scored tokens."""
        return self._sums.to(torch.float32)

    def backward(self, grad: Tensor, peak: Tensor, log_total: Tensor) -> None:
        """Adds the gradients of sum_t grad_t * logp_t over the routed tokens; `grad` is in their order.

        Reads on the host how many tokens every block keeps. `peak` and `log_total` are of all tokens [N].
        """
        head = self.head
        active = grad.nonzero().squeeze(1)
        if active.numel() == 0:
            return
        tokens = torch.cat(self._tokens)[active]
        factor = -grad[active].to(head.dtype) * (head.head.scale / head.head.temperature)
        peak, log_total = peak[tokens], log_total[tokens]
        word, own = head.columns(tokens)
        source = tokens if head.row_index is None else head.row_index[tokens]
        target = tokens if head.by_token else source
        kept = self._add_means(grad, factor, target, peak + log_total)
        for block, t in enumerate(_tokens_by_block(kept)):
            a, b = block * ROUTE_WORDS, min((block + 1) * ROUTE_WORDS, head.weight.shape[0])
            if t.numel() == 0:
                if head.dweight is not None:
                    head.dweight[a:b].zero_()
                continue
            # As many columns as the scan's product had, or both would not round alike.
            rows, words = head.token_rows(tokens[t]).to(head.dtype), head.weight[a:b].to(head.dtype)
            # With `out=`, which autocast leaves alone.
            p = torch.mm(words, rows.t(), out=words.new_empty(b - a, len(rows)))
            p[:, t.numel() :].zero_()
            wide, p = p, p[:, : t.numel()]
            if head.bias is not None:
                p += head.bias[a:b].unsqueeze(1)
            head.softmax_minus_target(p, word[t] - a, own[t], peak[t], log_total[t])
            p *= factor[t]  # 128 words a token: cheaper than on the rows of H
            if head.dbias is not None:
                head.dbias[a:b] += p.sum(1, dtype=head.dbias.dtype)
            if head.dweight is not None:
                torch.mm(wide, rows, out=head.dweight[a:b])
            if head.dhidden is not None:
                accumulate(head.dhidden, target[t], torch.mm(wide.t(), words, out=rows)[: t.numel()])
        head.weight_is_fresh = False

    def _add_means(self, grad: Tensor, factor: Tensor, target: Tensor, lse: Tensor) -> Tensor:
        """Adds what the left-out blocks' means give to dhidden, scan by scan; returns the pairs kept [blocks, active].

        `grad` is of all tokens, the others of those whose gradient is not zero. Forgets the masses.
        """
        head, kept, start = self.head, [], 0
        wanted = head.dhidden is not None and self.max_dropped_mass > 0
        means = block_means(head) if wanted else None
        for part in grad.split([masses.shape[1] for masses in self._masses]):
            masses = self._masses.pop(0)[:, part.nonzero().squeeze(1)]
            kept.append(~(masses <= 0))
            here = slice(start, start + masses.shape[1])
            start = here.stop
            if head.dhidden is not None and means is not None:
                share = self._left_out(masses, lse[here])
                rows = torch.mm(share.t(), means, out=means.new_empty(share.shape[1], means.shape[1]))
                accumulate(head.dhidden, target[here], rows.mul_(factor[here].unsqueeze(1)))
        return torch.cat(kept, dim=1)

    def _left_out(self, masses: Tensor, lse: Tensor) -> Tensor:
        """The masses [blocks, n] of pairs left out, 0 for the others, times the softcap's slope at their mean logit."""
        share = torch.where(masses < 0, -masses, 0.0)
        head = self.head.head
        if head.softcap is None:
            return share
        words = torch.full((self.num_blocks, 1), float(ROUTE_WORDS), dtype=share.dtype, device=share.device)
        words[-1] = self.head.weight.shape[0] - (self.num_blocks - 1) * ROUTE_WORDS
        z = lse + (share / words).log()
        return share * (1 - (z * (head.temperature / head.softcap)).clamp(-1, 1).square())
