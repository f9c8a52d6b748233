"""The torch backend: chunks of whole prompts, loss and both gradients in one sweep over a bounded workspace.

A prompt's coefficients dL/dS_i need that prompt's scores only, so a chunk of whole prompts goes from logits to
gradients while its logits are in the workspace: three GEMMs, no recompute. Only a prompt larger than the workspace is
swept twice. Logits are formed, exponentiated and corrected in place; a token's 1 / sum(exp) and its coefficient are
multiplied into the [chunk, H] side, never into the [chunk, V] side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.inputs import Gradients, HeadInputs, HeadResult, LossResult, Needs, RankingInputs
from clha_fast.options import CLHAOptions, HeadOptions
from clha_fast.torch_ranking import Plan, Ranking, accumulate, make_plan

_MIN_WORKSPACE = 64 * 2**20
# Elementwise passes walk the workspace in row blocks of this size, so that their intermediate passes stay in cache.
_BLOCK_BYTES = 2**20
# Vocabulary rows of a 16-bit weight that are widened to float32 at a time on the CPU.
_WIDEN_BYTES = 16 * 2**20


class _Head:
    """Logits of a range of tokens in a bounded workspace, and the gradients they lead to."""

    def __init__(self, inputs: HeadInputs, head: HeadOptions) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.row_index = inputs
        self.head = head
        hidden, weight = inputs.hidden, inputs.weight
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.device = hidden.device
        # On a GPU 16-bit GEMMs run on tensor cores with a float32 result; CPUs widen, for BLAS has no such GEMM.
        self.narrow = weight.dtype != self.dtype and hidden.is_cuda
        self.widen = weight.dtype != self.dtype and not hidden.is_cuda
        vocabulary = weight.shape[0]
        budget = head.workspace_bytes or max(_MIN_WORKSPACE, vocabulary * weight.shape[1])
        row_bytes = vocabulary * self.dtype.itemsize
        if self.narrow:
            row_bytes += vocabulary * weight.dtype.itemsize
        self.capacity = max(1, budget // row_bytes)
        self._workspace = torch.empty(0, vocabulary, dtype=self.dtype, device=self.device)
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        self._weight_is_fresh = False

    def allocate(self, needs: Needs) -> None:
        """Buffers of the gradients that are wanted; the first chunk writes the weight's, so it is not cleared."""
        if needs.hidden:
            self.dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=self.dtype)
        if needs.weight:
            self.dweight = torch.empty(self.weight.shape, dtype=self.dtype, device=self.device)
            self._weight_is_fresh = True
        if needs.bias:
            self.dbias = torch.zeros(self.weight.shape[0], dtype=torch.float64, device=self.device)

    def gradients(self, dtype: torch.dtype) -> Gradients:
        """The gradients in `dtype`."""
        if self.dweight is not None and self._weight_is_fresh:
            self.dweight.zero_()
        return Gradients(*(None if g is None else g.to(dtype) for g in (self.dhidden, self.dweight, self.dbias)))

    def _rows(self, tokens: slice | Tensor) -> Tensor:
        return self.hidden[tokens] if self.row_index is None else self.hidden[self.row_index[tokens]]

    def _weight_blocks(self) -> list[tuple[int, int]]:
        vocabulary, width = self.weight.shape
        step = max(1, _WIDEN_BYTES // max(1, width * self.dtype.itemsize)) if self.widen else vocabulary
        return [(v, min(v + step, vocabulary)) for v in range(0, vocabulary, step)]

    def _raw_logits(self, rows: Tensor) -> Tensor:
        """The workspace's first rows, filled with rows . weight^T + bias."""
        count, vocabulary = rows.shape[0], self.weight.shape[0]
        if self._workspace.shape[0] < count:
            self._workspace = rows.new_empty(0)  # released before the larger one is taken
            self._workspace = torch.empty(count, vocabulary, dtype=self.dtype, device=self.device)
        z = self._workspace[:count]
        if self.widen:
            wide = rows.to(self.dtype)
            for a, b in self._weight_blocks():
                torch.mm(wide, self.weight[a:b].to(self.dtype).t(), out=z[:, a:b])
        elif self.narrow:
            torch.mm(rows, self.weight.t(), out_dtype=self.dtype, out=z)
        else:
            torch.mm(rows, self.weight.t(), out=z)
        if self.bias is not None:
            z += self.bias
        return z

    def _row_blocks(self, z: Tensor) -> list[slice]:
        count, vocabulary = z.shape
        step = max(1, _BLOCK_BYTES // (vocabulary * self.dtype.itemsize))
        return [slice(a, min(a + step, count)) for a in range(0, count, step)]

    def softmax(self, tokens: slice | Tensor, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token log-probabilities and, in the workspace, the matrix their gradient is made of.

        Returns (logps [n], lse [n], g [n, V], row_factor [n]) with dlogp_t / d(raw logits) = -row_factor_t * g_t.
        Without `want_gradient`, g holds nothing of use.
        """
        g = self._raw_logits(self._rows(tokens))
        targets = self.targets[tokens]
        count = g.shape[0]
        logps, lse, total = (torch.empty(count, dtype=self.dtype, device=self.device) for _ in range(3))
        scored = targets != self.head.ignore_index
        # Checked before on a CPU; on a GPU such a target makes its token NaN, as in the kernels, without a wait.
        valid = (targets >= 0) & (targets < self.weight.shape[0])
        columns = torch.where(valid, targets, 0).unsqueeze(1)
        for block in self._row_blocks(g):
            self._softmax_block(g[block], columns[block], logps[block], lse[block], total[block], want_gradient)
        logps = torch.where(scored, torch.where(valid, logps, torch.nan), 0.0)
        if self.narrow and want_gradient:
            g /= total.unsqueeze(1)  # a sum over a large vocabulary is more than float16 holds
            total = torch.ones_like(total)
        row_factor = self.head.scale / self.head.temperature / total
        return logps, lse, g, torch.where(scored & ~valid, torch.nan, row_factor)

    def _softmax_block(
        self, z: Tensor, column: Tensor, logps: Tensor, lse: Tensor, total: Tensor, want_gradient: bool
    ) -> None:
        slope = None
        if self.head.scale != 1.0:
            z *= self.head.scale
        if self.head.softcap is not None:
            z.div_(self.head.softcap).tanh_()
            if want_gradient:
                slope = 1 - z * z
            z *= self.head.softcap
        if self.head.temperature != 1.0:
            z /= self.head.temperature
        peak = z.amax(dim=1, keepdim=True)
        # A row of -inf alone must come out as log_softmax has it, not as (-inf) - (-inf) of our own making.
        peak = torch.where(peak == -torch.inf, 0.0, peak)
        z.sub_(peak)
        chosen = z.gather(1, column).squeeze(1)
        torch.sum(z.exp_(), dim=1, out=total)
        rest = total.log()
        torch.add(rest, peak.squeeze(1), out=lse)
        # Not chosen - lse: beside a peak of 1e4 float32 keeps three digits of log(total).
        torch.sub(chosen, rest, out=logps)
        if want_gradient:
            # p - 1 at the target, before the division by the sum that is left to the [n, H] side.
            z.scatter_add_(1, column, -total.unsqueeze(1))
            if slope is not None:
                z *= slope

    def backward(self, tokens: slice | Tensor, g: Tensor, factor: Tensor) -> None:
        """Accumulates the gradients of sum_t -factor_t * (g_t . raw logits_t): `factor` is -dL/dlogp * row_factor."""
        if self.dhidden is not None:
            self._accumulate_hidden(tokens, self._grad_rows(g) * factor.unsqueeze(1))
        if self.dweight is not None:
            # A new tensor of [n, H]: the coefficient never touches the [n, V] side.
            rows = self._rows(tokens).to(self.dtype) * factor.unsqueeze(1)
            if self.narrow:
                # Rounded to 16 bits with the largest row at 1, so that float16 does not underflow.
                peak = rows.abs().amax().clamp(min=torch.finfo(self.dtype).tiny)
                low = self.weight.dtype
                chunk = torch.mm(g.to(low).t(), (rows / peak).to(low), out_dtype=self.dtype).mul_(peak)
                self.dweight = chunk if self._weight_is_fresh else self.dweight.add_(chunk)
            elif self._weight_is_fresh:
                torch.mm(g.t(), rows, out=self.dweight)
            else:
                self.dweight.addmm_(g.t(), rows)
            self._weight_is_fresh = False
        if self.dbias is not None:
            # Short sums into float64: a GEMV over all tokens is twice as far off as the eager loss's own sum.
            for block in self._row_blocks(g):
                self.dbias += (g[block] * factor[block].unsqueeze(1)).sum(0, dtype=self.dbias.dtype)

    def _grad_rows(self, g: Tensor) -> Tensor:
        if self.widen:
            out = torch.zeros(g.shape[0], self.weight.shape[1], dtype=self.dtype, device=self.device)
            for a, b in self._weight_blocks():
                out.addmm_(g[:, a:b], self.weight[a:b].to(self.dtype))
            return out
        if self.narrow:
            return torch.mm(g.to(self.weight.dtype), self.weight, out_dtype=self.dtype)
        return torch.mm(g, self.weight)

    def _accumulate_hidden(self, tokens: slice | Tensor, rows: Tensor) -> None:
        assert self.dhidden is not None
        if self.row_index is not None:
            accumulate(self.dhidden, self.row_index[tokens], rows)
        else:
            self.dhidden[tokens] = rows


def token_logps_forward(inputs: HeadInputs, head: HeadOptions) -> HeadResult:
    """logps and lse of `reference.token_logps`, one workspace of logits at a time."""
    sweep = _Head(inputs, head)
    return HeadResult(*_forward(sweep, 0, int(inputs.targets.numel())), _no_route(sweep))


def _no_route(sweep: _Head) -> Tensor:
    """Nothing: a backward of this backend has the logits again before it decides what to leave out."""
    return torch.empty(0, dtype=torch.float32, device=sweep.device)


def _forward(sweep: _Head, start: int, stop: int) -> tuple[Tensor, Tensor]:
    logps, lse = (torch.empty(stop - start, dtype=sweep.dtype, device=sweep.device) for _ in range(2))
    for a in range(start, stop, sweep.capacity):
        b = min(a + sweep.capacity, stop)
        logps[a - start : b - start], lse[a - start : b - start], _, _ = sweep.softmax(slice(a, b), False)
    return logps, lse


def token_logps_backward(
    grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """Gradients of sum_t grad_logps_t * logp_t by recomputing the logits; tokens with a zero gradient are skipped."""
    sweep = _Head(inputs, head)
    sweep.allocate(needs)
    _backward(sweep, 0, int(inputs.targets.numel()), grad_logps)
    return sweep.gradients(inputs.hidden.dtype)


def _backward(sweep: _Head, start: int, stop: int, grad_logps: Tensor) -> None:
    """Recomputes tokens [start, stop) and accumulates their gradients; `grad_logps` is [stop - start]."""
    grad = torch.where(sweep.targets[start:stop] == sweep.head.ignore_index, 0, grad_logps.to(sweep.dtype))
    if sweep.device.type == "cpu":
        tokens = grad.nonzero().squeeze(1)
        grad = grad[tokens]
        tokens = tokens + start
    else:  # how many are not zero is known to the device alone
        tokens = torch.arange(start, stop, device=sweep.device)
    for a in range(0, tokens.numel(), sweep.capacity):
        chunk = tokens[a : a + sweep.capacity]
        _, _, g, row_factor = sweep.softmax(chunk, True)
        sweep.backward(chunk, g, -grad[a : a + sweep.capacity] * row_factor)


def _prompt_chunks(plan: Plan, capacity: int) -> list[tuple[int, int]]:
    """Ranges of whole prompts of at most `capacity` tokens; a larger prompt stands alone."""
    chunks, first = [], 0
    edges = [plan.token_offsets[c] for c in plan.candidate_offsets]
    for last in range(1, len(edges)):
        if edges[last] - edges[first] > capacity and last - 1 > first:
            chunks.append((first, last - 1))
            first = last - 1
    chunks.append((first, len(edges) - 1))
    return chunks


def _backward_in_place(sweep: _Head, start: int, g: Tensor, row_factor: Tensor, grad_logps: Tensor) -> None:
    """Accumulates the gradients of the tokens that the workspace holds, from `start` on, skipping zero gradients."""
    scored = sweep.targets[start : start + grad_logps.numel()] != sweep.head.ignore_index
    grad = torch.where(scored, grad_logps, 0.0)
    factor = -grad * row_factor
    tokens: slice | Tensor = slice(start, start + grad_logps.numel())
    if sweep.device.type == "cpu":
        active = grad.nonzero().squeeze(1)
        if active.numel() < grad_logps.numel():
            # Rows move to the front one by one: a gathered copy would double the workspace.
            for row, source in enumerate(active.tolist()):
                if row != source:
                    g[row].copy_(g[source])
            g, factor, tokens = g[: active.numel()], factor[active], active + start
    if factor.numel():
        sweep.backward(tokens, g, factor)


def clha_sweep(
    inputs: HeadInputs, ranking: RankingInputs, head: HeadOptions, options: CLHAOptions, needs: Needs
) -> tuple[LossResult, Gradients]:
    """Loss and the gradients asked for in one sweep; shapes as in `functional.linear_clha_loss`.

    Reads `candidate_lengths` and `candidates_per_prompt` on the host: with CPU tensors that costs a GPU nothing.
    The gradients of 16-bit inputs are float32, for they are rounded after the upstream gradient has been multiplied in.
    """
    sweep = _Head(inputs, head)
    plan = make_plan(inputs.targets, ranking, head, options, sweep.dtype)
    ranked = Ranking(plan, options)
    want_gradient = any(needs)
    sweep.allocate(needs)
    lse = torch.empty(inputs.targets.shape, dtype=sweep.dtype, device=sweep.device)
    for first, last in _prompt_chunks(plan, sweep.capacity):
        a, b = (plan.token_offsets[plan.candidate_offsets[p]] for p in (first, last))
        # Of a prompt larger than the workspace only the end stays in it; the rest is scored now, recomputed below.
        edge = max(a, b - sweep.capacity)
        early_logps, lse[a:edge] = _forward(sweep, a, edge)
        late_logps, lse[edge:b], g, row_factor = sweep.softmax(slice(edge, b), want_gradient)
        ranked.rank(first, last, torch.cat([early_logps, late_logps]))
        if want_gradient:
            coefficients = ranked.token_coefficients(first, last).to(sweep.dtype)
            _backward_in_place(sweep, edge, g, row_factor, coefficients[edge - a :])
            _backward(sweep, a, edge, coefficients[: edge - a])
    loss, metrics, scores = ranked.finish(sweep.dtype)
    result = LossResult(loss, metrics, scores, ranked.coefficients.to(sweep.dtype), lse, _no_route(sweep))
    return result, sweep.gradients(sweep.dtype)


def clha_forward(inputs: HeadInputs, ranking: RankingInputs, head: HeadOptions, options: CLHAOptions) -> LossResult:
    """`clha_sweep` without gradients."""
    return clha_sweep(inputs, ranking, head, options, Needs(False, False, False))[0]
