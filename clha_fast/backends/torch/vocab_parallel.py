"""Token log-probabilities when the output embedding's rows are spread over a process group.

Every process holds some rows of the vocabulary and the same hidden states. The log-sum-exp is reduced over the group
(the maximum, then the rescaled sum together with the target's logit, and what statistics are made of): two collectives
over [N] numbers for any N * V.
The logits of a process exist one block of words at a time and are recomputed for the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clha_fast.backends.torch.head import TorchHead
from clha_fast.backends.torch.moments import LEAST, finished, mixed
from clha_fast.options import HeadOptions
from clha_fast.types import EntropySlopes, HeadInputs, Needs, VocabShard


class _ShardedHead(TorchHead):
    """This process's words, with a softmax whose normaliser comes from outside."""

    def __init__(self, shard: VocabShard, inputs: HeadInputs, head: HeadOptions, wanted: tuple[str, ...] = ()) -> None:
        super().__init__(inputs, head, first_word=shard.start)
        self.wanted = wanted
        self.batch = max(128, inputs.weight.shape[1])

    def local_softmax(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(peak [N], sum of exp(z - peak) [N], (target's logit or 0, whether it is here) [2, N]) of this shard.

        And the moments of its scan, by name.
        """
        count = self.targets.numel()
        peaks = torch.empty(count, dtype=self.dtype, device=self.device)
        sums = torch.empty(3, count, dtype=self.dtype, device=self.device)
        moments = {name: torch.empty(count, dtype=torch.float64, device=self.device) for name in self.wanted}
        for tokens in torch.arange(count, device=self.device).split(self.batch):
            scan = self.scan(tokens)
            peaks[tokens] = scan.peak
            empty = scan.peak == -torch.inf  # a shard of -inf alone adds nothing, where its exponentials are NaN
            sums[0, tokens] = torch.where(empty, 0.0, scan.total).to(self.dtype)
            sums[1, tokens], sums[2, tokens] = scan.chosen, self.columns(tokens)[1].to(self.dtype)
            for name, moment in scan.moments.items():
                exponential = name in ("entropy", "sum_sq_probs")
                moments[name][tokens] = torch.where(empty, 0.0, moment) if exponential else moment
        return peaks, sums[0], sums[1:], moments

    def accumulate_gradients(
        self, grad_logps: Tensor, slopes: EntropySlopes | None, peak: Tensor, log_total: Tensor
    ) -> None:
        """Adds the gradients of sum_t grad_logps_t * logp_t, tokens with a zero gradient left out on the CPU."""
        is_ignored = self.targets == self.head.ignore_index
        if slopes is not None:
            slopes = slopes._replace(grad=torch.where(is_ignored, 0, slopes.grad.to(self.dtype)))
        grad, mix = mixed(torch.where(is_ignored, 0, grad_logps.to(self.dtype)), slopes)
        order = grad.nonzero().squeeze(1) if self.device.type == "cpu" else torch.arange(len(grad), device=self.device)
        for tokens in order.split(self.batch):
            own = None if mix is None else mix.at(tokens)
            self.add_gradients([self.recomputed(tokens, peak[tokens], log_total[tokens], grad[tokens], own)])


def _towards(peak: Tensor, local_peak: Tensor, total: Tensor, name: str, moment: Tensor) -> Tensor:
    """A moment of this shard about the peak of all [N]; total is the sum of exp(z - local_peak)."""
    if name == "mean_logit":
        return moment
    if name == "is_top1":
        return torch.where(local_peak == peak, moment, 0.0)
    lead = local_peak.double() - peak.double()
    if name == "entropy":
        # A shard of -inf alone has no exponentials, and 0 * -inf would be NaN.
        return (moment + total * lead.clamp(min=LEAST)) * lead.exp()
    return moment * lead.exp() ** 2


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: VocabShard, head: HeadOptions, names: tuple[str, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """logps, and the statistics called `names`."""
        inputs = HeadInputs(*tensors)  # type: ignore[arg-type]
        sweep = _ShardedHead(shard, inputs, head, names)
        local_peak, total, chosen, moments = sweep.local_softmax()
        peak = local_peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=shard.group)
        # exp before the sum: a NaN, which a maximum may lose, stays in the product and reaches every process.
        sums = torch.cat([(total * torch.exp(local_peak - peak)).unsqueeze(0), chosen])
        if names:
            own = [_towards(peak, local_peak, total, name, moments[name]) for name in names]
            sums = torch.cat([sums.double(), torch.stack(own)])
        dist.all_reduce(sums, group=shard.group)
        whole = dict(zip(names, sums[3:], strict=True))
        statistics = finished(whole, sums[0].double(), shard.size)
        sums = sums[:3].to(total.dtype)
        # The log-sum-exp in two parts: beside a peak of 1e4 float32 keeps three digits of log(total).
        log_total = sums[0].log()
        # A target that no shard holds is out of the vocabulary: NaN, as in the kernels.
        logps = torch.where(sums[2] == 1, (sums[1] - peak) - log_total, torch.nan)

        def usable(value: Tensor) -> Tensor:
            value = torch.where(sums[2] == 1, value.to(logps.dtype), torch.nan)
            return torch.where(inputs.targets == head.ignore_index, 0.0, value)

        values = [usable(statistics[name]) for name in names]
        entropy = dict(zip(names, values, strict=True)).get("entropy")
        ctx.save_for_backward(*inputs, peak, log_total, entropy)
        ctx.mark_non_differentiable(*(v for name, v in zip(names, values, strict=True) if name != "entropy"))
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.head, ctx.names = shard, head, names
        return usable(logps), *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, peak, log_total, entropy = ctx.saved_tensors
        inputs = HeadInputs(*tensors)
        sweep = _ShardedHead(ctx.shard, inputs, ctx.head)
        sweep.allocate(Needs(*ctx.needs_input_grad[3:6]))
        grad_entropy = dict(zip(ctx.names, grads[1:], strict=True)).get("entropy")
        slopes = None if grad_entropy is None else EntropySlopes(grad_entropy, entropy)
        sweep.accumulate_gradients(torch.zeros_like(peak) if grads[0] is None else grads[0], slopes, peak, log_total)
        if sweep.dhidden is not None and ctx.shard.reduce_hidden:
            dist.all_reduce(sweep.dhidden, group=ctx.shard.group)  # before it is rounded to the input's dtype
        return (None, None, None, *sweep.gradients(inputs.hidden.dtype), None, None, None)


def token_logps(
    inputs: HeadInputs, shard: VocabShard, head: HeadOptions, names: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """`functional.token_logps` with this process's rows of the output embedding; inputs, shard and names checked.

    Replaces, on every process of the group::

        logits = all_gather(F.linear(hidden[row_index], weight, bias), dim=-1).float()     # [N, V] on each
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    Returns:
        [N] nats, float32 (float64 for float64), the same on every process; a target outside the vocabulary gives NaN
        on a GPU. Collectives run in the forward (two) and, for `reduce_hidden`, in the backward (one): all processes
        of the group must make both. With them the statistics called `names`.
    """
    logps, *values = _TokenLogps.apply(shard, head, names, *inputs)
    return logps, dict(zip(names, values, strict=True))
