"""The torch backend's routed gradients: tokens go to the vocabulary blocks in which their softmax has mass.

A token leaves out its lightest blocks of `ROUTE_WORDS` words, as long as their masses sum to at most d. With c the
gradient of its log-probability, m <= d the mass left out (outside the target's block) and w_v the rows of the weight,
the exact gradient is -c * sum_v (p_v - [v = target]) * w_v and the error |c| * |sum_{v left out} p_v * w_v|, so

    |error of dhidden_t| <= |c_t| * d * max_v |w_v|,    |error of dweight_v| <= sum_{t without v} |c_t| * p_tv * |x_t|

(scale / temperature times that, softcap's slope is at most 1). What is kept is exact: nothing is renormalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.options import ROUTE_WORDS
from clha_fast.torch_head import Scan, TorchHead
from clha_fast.torch_ranking import accumulate


def kept_blocks(masses: Tensor, max_dropped_mass: float) -> Tensor:
    """Which blocks of masses [blocks, n] stay: one threshold a token, the lightest below it sum to at most d.

    A token whose masses are NaN keeps everything.
    """
    lightest = masses.t().sort(dim=1).values
    fits = lightest.cumsum(1, dtype=torch.float64) <= max_dropped_mass
    dropped = fits.sum(1, keepdim=True).clamp(max=masses.shape[0] - 1)
    threshold = lightest.gather(1, dropped).squeeze(1)
    return ~(masses < threshold)


class Route:
    """Which tokens go to which vocabulary blocks: filled scan by scan, then walked block by block."""

    def __init__(self, head: TorchHead, max_dropped_mass: float) -> None:
        self.head, self.max_dropped_mass = head, max_dropped_mass
        self.num_blocks = -(-head.weight.shape[0] // ROUTE_WORDS)
        self._tokens: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._sums = torch.zeros(3, dtype=torch.float64, device=head.device)

    def add(self, scan: Scan) -> None:
        """Routes a scan's tokens by the masses of its blocks."""
        masses = scan.block_sums * torch.exp(scan.block_peaks - scan.peak) / scan.total.to(scan.peak.dtype)
        # A block of -inf alone beside a finite peak.
        kept = kept_blocks(masses, self.max_dropped_mass)
        word, own = self.head.columns(scan.tokens)
        kept |= own & (torch.arange(self.num_blocks, device=word.device).unsqueeze(1) == word // ROUTE_WORDS)
        scored = self.head.targets[scan.tokens] != self.head.head.ignore_index
        left_out = torch.where(kept, 0.0, masses).sum(0, dtype=torch.float64)
        self._sums[0] += (kept & scored).sum()
        self._sums[1] += scored.sum() * self.num_blocks
        self._sums[2] += torch.where(scored, left_out, 0.0).sum()
        self._tokens.append(scan.tokens)
        self._kept.append(kept)

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
        kept = torch.cat(self._kept, dim=1)[:, active]
        factor = -grad[active].to(head.dtype) * (head.head.scale / head.head.temperature)
        peak, log_total = peak[tokens], log_total[tokens]
        word, own = head.columns(tokens)
        source = tokens if head.row_index is None else head.row_index[tokens]
        target = tokens if head.by_token else source
        ends = kept.sum(1).cumsum(0).tolist()
        chosen = kept.nonzero()[:, 1]
        for block in range(self.num_blocks):
            a, b = block * ROUTE_WORDS, min((block + 1) * ROUTE_WORDS, head.weight.shape[0])
            t = chosen[(ends[block - 1] if block else 0) : ends[block]]
            if t.numel() == 0:
                if head.dweight is not None:
                    head.dweight[a:b].zero_()
                continue
            rows, words = head.hidden[source[t]].to(head.dtype), head.weight[a:b].to(head.dtype)
            # With `out=`, which autocast leaves alone.
            p = torch.mm(words, rows.t(), out=words.new_empty(b - a, t.numel()))
            if head.bias is not None:
                p += head.bias[a:b].unsqueeze(1)
            head.softmax_minus_target(p, word[t] - a, own[t], peak[t], log_total[t])
            p *= factor[t]  # 128 words a token: cheaper than on the rows of H
            if head.dbias is not None:
                head.dbias[a:b] += p.sum(1, dtype=head.dbias.dtype)
            if head.dweight is not None:
                torch.mm(p, rows, out=head.dweight[a:b])
            if head.dhidden is not None:
                accumulate(head.dhidden, target[t], torch.mm(p.t(), words, out=rows))
        head.weight_is_fresh = False
