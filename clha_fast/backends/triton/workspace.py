"""The workspace backend: matrix products by the vendor's library, two Triton passes over their logits in place.

    for every chunk of whole prompts:                              per logit, 16 bits: bytes
        z = X[chunk] . W^T                          GEMM 1                 2
        logps, lse = statistics(z)                  Triton                 2
        scores, coefficients = ranking(logps)       Triton, small
        z = coefficient * (onehot - softmax(z))     Triton, in place       4
        dhidden[chunk] = z . W                      GEMM 2, float32 out
        dweight += z^T . X[chunk]                   GEMM 3, float32 sum

Decisions, and what they were made on (emulation in bfloat16 and float16 against float64; times by the cost model of
`benchmarks.roofline`, none of them measured):

* A coefficient is folded into z before z is rounded. Multiplied into X, as the CPU path does in float32, it is one
  more rounding to 16 bits: dweight's error came to 1.43 times eager's, with float32 logits too. Folded, it is 1.00.
  float16 takes the coefficient's mantissa into z and its power of two into X and dhidden, exactly: 1.01. The chunks'
  largest powers differ and no product takes a factor from the device: a later chunk is added to dweight some rows at
  a time, 16 * V * H bytes instead of 8.
* Hence two passes over z with the ranking between them: 6 bytes a logit in all instead of 4, 1.5% of the step at
  H = 4096.
* Adding a chunk to the float32 dweight moves 8 * V * H bytes, about 245 / tokens of the three GEMMs' time: chunks must
  be long. The workspace is as large as dweight itself unless `workspace_bytes` says otherwise: 2 * H tokens.
* A batch of 16 bits that fits one chunk has no float32 dweight: z stays, and GEMM 3 runs in the backward, some words at
  a time, each multiplied by the upstream gradient and rounded once. Between forward and backward z stands for dweight.
  Where `persistent.PRODUCTS` says so it is the fused path's kernel, which does both as it stores.

16-bit products with a float32 result need torch's `mm(out_dtype=...)`: where it is missing (`backends.products`), the
backend is refused by name and `auto` does not take it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clha_fast.backends.memory import PART_BYTES, Workspace, padded_width
from clha_fast.backends.products import lift, why_not_wide
from clha_fast.backends.sweep import sweep_prompts
from clha_fast.backends.triton import persistent
from clha_fast.backends.triton.backward import usable
from clha_fast.backends.triton.clha import CLHARanking
from clha_fast.backends.triton.head import Head, on, scaled
from clha_fast.backends.triton.launchers import launcher
from clha_fast.backends.triton.softmax import gradient, statistics
from clha_fast.layout import Chunk, accumulate, even_capacity, even_share, prompt_chunks, prompt_edges
from clha_fast.objectives import Objective
from clha_fast.options import HeadOptions
from clha_fast.types import (
    EntropySlopes,
    Factors,
    Gradients,
    HeadInputs,
    HeadResult,
    LossResult,
    Needs,
    RankingInputs,
    StatisticsResult,
    SweptGradients,
)

# Before torch 2.10 `addmm` with a wide result refuses a wide matrix to add to.
_ADDS_WIDE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
_NOTHING = Needs(False, False, False)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False, unit: Tensor | None = None) -> None:
    """out = a . b, or out += unit * a . b, summed in out's dtype."""
    if add and (unit is not None or (out.dtype != a.dtype and not _ADDS_WIDE)):
        _add_in_parts(a, b, out, unit)
    else:
        _library_product(a, b, out, add)


def _library_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a . b by the vendor's library. With `out=`, which autocast leaves alone."""
    # In the interpreter; on a GPU only where the device's switches have changed since the backend was chosen.
    if out.dtype != a.dtype and why_not_wide(out.device, a.dtype) is not None:
        a, b = a.to(out.dtype), b.to(out.dtype)
    kind: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **kind)
    else:
        torch.mm(a, b, out=out, **kind)


def _add_in_parts(a: Tensor, b: Tensor, out: Tensor, unit: Tensor | None) -> None:
    """out += unit * a . b, some rows of `out` at a time, for the product stands beside it in memory."""
    for rows, part in _parts(a, b, out):
        if unit is None:
            rows += part
        else:
            rows.addcmul_(part, unit)


def _parts(a: Tensor, b: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of `out` at a time, and the same rows of a . b in float32, in memory that the next ones take over."""
    # Whole vectors of 16-bit elements: the library's fast kernels want its operands aligned.
    step = max(64, PART_BYTES // max(1, out.shape[1] * 4) // 64 * 64)
    memory = torch.empty(min(step, out.shape[0]), out.shape[1], dtype=torch.float32, device=out.device)
    for first in range(0, out.shape[0], step):
        rows = out[first : first + step]
        part = memory[: rows.shape[0]]
        _library_product(a[first : first + step], b, part, add=False)
        yield rows, part


def weight_gradient(factors: Factors, scale: Tensor | None, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """scale * unit * left[:, :V]^T . right, [V, H] in `dtype`: summed in float32, rounded once. scale [] float32."""
    left, right, unit = factors
    factor = unit if scale is None else unit * scale
    if persistent.multiplies(factors):
        with on(right.device):
            return persistent.product(factors, factor, vocabulary, dtype)
    out = right.new_empty(vocabulary, right.shape[1], dtype=dtype)
    for rows, part in _parts(left[:, :vocabulary].t(), right, out):
        scaled(part, factor, rows)
    return out


class _Sweep:
    """The workspace, the tokens that stand in it, and the gradients that have been summed so far."""

    def __init__(self, inputs: HeadInputs, head: HeadOptions, needs: Needs) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.row_index, self.temperature = inputs
        self.wanted: tuple[str, ...] = ()
        self.ready = Head.of(inputs, head)
        self.vocabulary, self.width = self.weight.shape
        self.factor = self.ready.pre_scale * self.ready.post_scale
        self.size = Workspace(
            self.vocabulary, self.width, self.hidden.itemsize, head.workspace_bytes, trains=needs.weight
        )
        self.padded, self.capacity = padded_width(self.vocabulary), self.size.tokens
        self.workspace = self.hidden.new_empty(0, self.padded)
        # Instead of `dweight`, where all tokens are loaded once.
        self.keeps_factors = self.size.keeps_factors(self.targets.shape[0])
        self.factors: Factors | None = None
        device = self.hidden.device
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        if needs.hidden:
            empty = torch.empty if self.row_index is None and self.targets.shape[0] else torch.zeros
            self.dhidden = empty(self.hidden.shape, dtype=torch.float32, device=device)
        if needs.weight and not self.keeps_factors:
            self.dweight = torch.empty(self.weight.shape, dtype=torch.float32, device=device)
        if needs.bias and self.bias is not None:
            self.dbias = torch.zeros(self.vocabulary, dtype=torch.float64, device=device)
        self.weight_is_fresh = True

    def gradients(self, dtype: torch.dtype) -> Gradients:
        """All gradients in `dtype`."""
        hidden, weight, bias = self.swept()
        if isinstance(weight, Factors):  # first, while what is rounded from the others is not there yet
            weight = weight_gradient(weight, None, self.vocabulary, dtype)
        return Gradients(*(None if g is None else g.to(dtype) for g in (hidden, weight, bias)))

    def swept(self) -> SweptGradients:
        """All gradients before they are rounded, the weight's as `factors` where those are kept."""
        if self.dweight is not None and self.weight_is_fresh:
            self.dweight.zero_()
        return SweptGradients(self.dhidden, self.factors if self.keeps_factors else self.dweight, self.dbias)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` tokens at a time, or for as many as the budget allows."""
        self.workspace = self.hidden.new_empty(min(tokens, self.capacity), self.padded)

    def load(self, start: int, stop: int) -> Loaded:
        """Raw logits of tokens [start, stop) into the workspace."""
        # Copied: a view in the middle of a tensor would make Triton compile for its alignment.
        targets, index = self.targets[start:stop].clone(), None
        if self.row_index is None:
            rows = self.hidden[start:stop]
        else:
            index = self.row_index[start:stop]
            has_row = (index >= 0) & (index < self.hidden.shape[0])
            index = torch.where(has_row, index, 0)
            rows = self.hidden.index_select(0, index)
            # Outside the vocabulary: NaN, as a wrong target is.
            wrong = ~has_row & (targets != self.ready.ignore_index)
            targets.masked_fill_(wrong, self.vocabulary)
        z = self.workspace[: stop - start]
        logits = z[:, : self.vocabulary]
        if self.bias is None:
            torch.mm(rows, self.weight.t(), out=logits)
        else:
            # One rounding of product and bias together, as `F.linear` does.
            torch.addmm(self.bias, rows, self.weight.t(), out=logits)
        return Loaded(self, start, stop, rows, index, targets, z)


class Loaded:
    """Tokens [start, stop), whose logits the workspace holds."""

    def __init__(
        self, sweep: _Sweep, start: int, stop: int, rows: Tensor, index: Tensor | None, targets: Tensor, z: Tensor
    ) -> None:
        self.sweep, self.start, self.stop = sweep, start, stop
        self.rows, self.index, self.targets, self.z = rows, index, targets, z

    @property
    def temperature(self) -> Tensor | None:
        """[n], copied as `targets` are."""
        whole = self.sweep.temperature
        return None if whole is None else whole[self.start : self.stop].clone()

    def statistics(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(logps [n] float32, lse [n] float64, what the sweep wants beside them)."""
        return statistics(self.z, self.targets, self.sweep.ready, self.temperature, self.sweep.wanted)

    def backward(self, grad_logps: Tensor, lse: Tensor, slopes: EntropySlopes | None = None) -> None:
        """Adds the gradients of sum_t grad_logps_t * logp_t + slopes.grad_t * entropy_t; the logits are gone then."""
        sweep, temperature = self.sweep, self.temperature
        grad = usable(grad_logps, self.targets, temperature, sweep.ready) * sweep.factor
        size = grad
        if slopes is not None:
            bonus = usable(slopes.grad, self.targets, temperature, sweep.ready) * sweep.factor
            slopes = EntropySlopes(bonus, slopes.entropy.clone())
            size = torch.maximum(grad.abs(), bonus.abs())
        power = unit = share = None
        if self.rows.dtype == torch.float16:
            # z keeps a mantissa, for float16 has no exponents to spare; the power of two goes where it costs no bit.
            exponent = torch.frexp(size).exponent
            grad = torch.ldexp(grad, -exponent)
            if slopes is not None:
                slopes = slopes._replace(grad=torch.ldexp(slopes.grad, -exponent))
            # A gradient of 0 has exponent 0: its power would be the largest beside small ones, and they underflow.
            power = torch.ldexp((size != 0).to(grad.dtype), exponent).unsqueeze(1)
            # In sums over tokens the largest power is 1 for the product, and comes back in float32. On the device.
            unit = power.amax().clamp(min=torch.finfo(torch.float32).tiny)
            share = (power / unit).to(self.rows.dtype)
        gradient(self.z, self.targets, lse.clone(), grad, sweep.ready, temperature, slopes)  # cloned, as targets are
        z = self.z[:, : sweep.vocabulary]
        if sweep.dhidden is not None:
            self._add_hidden(sweep.dhidden, z, power)
        if sweep.keeps_factors or sweep.dweight is not None:
            # What has no gradient is not multiplied by 0: its hidden state may be NaN.
            rows, whole = torch.where((size == 0).unsqueeze(1), 0, self.rows), unit
            if share is not None and unit is not None:
                up = lift(rows)
                rows, whole = rows.mul_(up).mul_(share), unit / up
            if sweep.dweight is None:
                sweep.factors = Factors(self.z, rows.contiguous(), grad.new_ones(()) if whole is None else whole)
            else:
                self._add_weight(sweep.dweight, z, rows, whole)
        if sweep.dbias is not None:
            self._add_bias(sweep.dbias, z, share, unit)

    def _add_hidden(self, dhidden: Tensor, z: Tensor, power: Tensor | None) -> None:
        own = self.index is None
        drows = dhidden[self.start : self.stop] if own else dhidden.new_empty(z.shape[0], dhidden.shape[1])
        _product(z, self.sweep.weight, drows)
        if power is not None:
            drows *= power
        if self.index is not None:
            accumulate(dhidden, self.index, drows)

    def _add_weight(self, dweight: Tensor, z: Tensor, rows: Tensor, unit: Tensor | None) -> None:
        fresh = self.sweep.weight_is_fresh
        self.sweep.weight_is_fresh = False
        _product(z.t(), rows, dweight, not fresh, unit)
        if fresh and unit is not None:
            dweight *= unit

    def _add_bias(self, dbias: Tensor, z: Tensor, share: Tensor | None, unit: Tensor | None) -> None:
        if z.dtype == torch.float32:
            # Some words at a time: a sum in float64 first copies what it adds up.
            step = max(1, PART_BYTES // (8 * z.shape[0]))
            for words, total in zip(z.split(step, 1), dbias.split(step), strict=True):
                total += words.sum(0, dtype=torch.float64)
            return
        # A product, exact but for its sums: z in float64, or times powers of two, would be a copy of the workspace.
        column = torch.empty(z.shape[1], 1, dtype=torch.float32, device=z.device)
        _product(z.t(), z.new_ones(z.shape[0], 1) if share is None else share, column)
        dbias += column.squeeze(1).double() if unit is None else column.squeeze(1).double() * unit


def _no_route(inputs: HeadInputs) -> Tensor:
    return inputs.hidden.new_empty(0, dtype=torch.float32)


def _pieces(start: int, stop: int, capacity: int) -> list[tuple[int, int]]:
    step = max(1, even_share(stop - start, capacity))
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


def token_logps_forward(inputs: HeadInputs, head: HeadOptions) -> HeadResult:
    """logps float32 and lse float64 of `reference.token_logps`, one workspace of logits at a time.

    A target outside [0, V) that is not `head.ignore_index`, or a row outside [0, M), gives NaN: no synchronisation.

    Raises:
        ValueError: float64 input. BackendError: neither a GPU that the kernels know nor the interpreter.
    """
    with on(inputs.hidden.device):
        sweep = _Sweep(inputs, head, _NOTHING)
        sweep.reserve(even_share(inputs.targets.shape[0], sweep.capacity))
        logps, lse, _ = _statistics(sweep, 0, inputs.targets.shape[0])
    return HeadResult(logps, lse, _no_route(inputs))


def statistics_forward(inputs: HeadInputs, head: HeadOptions, names: tuple[str, ...]) -> StatisticsResult:
    """`token_logps_forward`, and of the same pass over the workspace what `reference.token_statistics` says."""
    with on(inputs.hidden.device):
        sweep = _Sweep(inputs, head, _NOTHING)
        sweep.wanted = names
        sweep.reserve(even_share(inputs.targets.shape[0], sweep.capacity))
        return StatisticsResult(*_statistics(sweep, 0, inputs.targets.shape[0]))


def _statistics(sweep: _Sweep, start: int, stop: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logps, lse, what is wanted beside them) of tokens [start, stop)."""
    device = sweep.hidden.device
    logps = torch.empty(stop - start, dtype=torch.float32, device=device)
    lse = torch.empty(stop - start, dtype=torch.float64, device=device)
    values = {name: torch.empty_like(logps) for name in sweep.wanted}
    for a, b in _pieces(start, stop, sweep.capacity):
        part = slice(a - start, b - start)
        logps[part], lse[part], found = sweep.load(a, b).statistics()
        for name, value in found.items():
            values[name][part] = value
    return logps, lse, values


def token_logps_backward(
    grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """Gradients of sum_t grad_logps_t * logp_t in the inputs' dtypes, by forming the logits again.

    Sums run in float32 (the bias's over chunks in float64) and in a fixed order: two calls give the same bits.
    """
    return _backward(grad_logps, None, inputs, lse, head, needs)


def statistics_backward(
    grad_logps: Tensor, slopes: EntropySlopes, inputs: HeadInputs, lse: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """`token_logps_backward` of sum_t grad_logps_t * logp_t + slopes.grad_t * entropy_t, in the same passes."""
    return _backward(grad_logps, slopes, inputs, lse, head, needs)


def _backward(
    grad_logps: Tensor,
    slopes: EntropySlopes | None,
    inputs: HeadInputs,
    lse: Tensor,
    head: HeadOptions,
    needs: Needs,
) -> Gradients:
    with on(inputs.hidden.device):
        sweep = _Sweep(inputs, head, needs)
        sweep.reserve(even_share(inputs.targets.shape[0], sweep.capacity))
        for a, b in _pieces(0, inputs.targets.shape[0], sweep.capacity):
            own = None if slopes is None else EntropySlopes(slopes.grad[a:b], slopes.entropy[a:b])
            sweep.load(a, b).backward(grad_logps[a:b], lse[a:b], own)
    return sweep.gradients(inputs.hidden.dtype)


class _Store:
    """`sweep.LogitStore` over a `_Sweep`."""

    def __init__(self, sweep: _Sweep, count: int) -> None:
        self.sweep = sweep
        self.logps = torch.empty(count, dtype=torch.float32, device=sweep.hidden.device)
        self.lse = torch.empty(count, dtype=torch.float64, device=sweep.hidden.device)
        self.statistics = {name: torch.empty_like(self.logps) for name in sweep.wanted}
        self.loaded: Loaded | None = None
        self.held: Chunk | None = None

    def _note(self, start: int, stop: int, found: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
        self.logps[start:stop], self.lse[start:stop], values = found
        for name, value in values.items():
            self.statistics[name][start:stop] = value

    def hold(self, chunk: Chunk) -> None:
        if chunk is self.held:
            return
        self.loaded, self.held = None, chunk
        if chunk.start < chunk.kept:
            self._note(chunk.start, chunk.kept, _statistics(self.sweep, chunk.start, chunk.kept))
        if chunk.kept < chunk.stop:
            self.loaded = self.sweep.load(chunk.kept, chunk.stop)
            self._note(chunk.kept, chunk.stop, self.loaded.statistics())

    def add_gradients(self, chunk: Chunk, slopes: Tensor) -> None:
        if self.loaded is not None:
            self._backward(self.loaded, chunk, slopes)
        for a, b in _pieces(chunk.start, chunk.kept, self.sweep.capacity):
            self._backward(self.sweep.load(a, b), chunk, slopes)

    def _backward(self, loaded: Loaded, chunk: Chunk, slopes: Tensor) -> None:
        tokens = slice(loaded.start, loaded.stop)
        here, bonus = slopes[..., loaded.start - chunk.start : loaded.stop - chunk.start], None
        if slopes.dim() == 2:
            here, bonus = here[0], EntropySlopes(here[1], self.statistics["entropy"][tokens])
        loaded.backward(here, self.lse[tokens], bonus)


def _chunks(given: RankingInputs, num_tokens: int, size: Workspace, gradients: bool) -> list[Chunk]:
    """Chunks of whole prompts; one of all tokens where nobody needs whole prompts' logits, or the host would wait.

    It would for sizes that are on a GPU.
    """
    sizes = (given.candidate_lengths, given.candidates_per_prompt)
    if not gradients or any(size.device.type != "cpu" for size in sizes):
        held = size.most if gradients else size.tokens
        return [Chunk(0, sizes[1].shape[0], 0, max(0, num_tokens - held), num_tokens)]
    edges = prompt_edges(*sizes)
    largest = max((b - a for a, b in itertools.pairwise(edges)), default=0)
    return prompt_chunks(edges, even_capacity(edges, size.tokens_for(largest)))


def loss_sweep(
    inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective, needs: Needs
) -> tuple[LossResult, SweptGradients]:
    """Loss and the gradients asked for in one sweep; shapes as in `functional.linear_loss`.

    Never waits for the GPU where the objective has a kernel or the sizes are CPU tensors. Chunks end between prompts,
    which the host knows when `candidate_lengths` and `candidates_per_prompt` are CPU tensors: three GEMMs. With both on
    the GPU, all tokens in front of the last workspace's worth are formed twice: three GEMMs where the batch fits the
    workspace, up to four where it does not. The same goes for a single prompt larger than the workspace. Gradients are
    float32, for they are rounded after the upstream gradient has been multiplied in; the weight's is left as `Factors`
    where `Workspace.keeps_factors`.
    """
    with on(inputs.hidden.device):
        sweep = _Sweep(inputs, head, needs)
        sweep.wanted = objective.wanted
        store = _Store(sweep, inputs.targets.shape[0])
        chunks = _chunks(given, inputs.targets.shape[0], sweep.size, any(needs))
        sweep.capacity = max(sweep.capacity, *(chunk.stop - chunk.kept for chunk in chunks))
        sweep.reserve(max(chunk.stop - chunk.start for chunk in chunks))
        store.hold(chunks[0])  # a GPU that waits has its first product before the ranking is prepared
        ranked = launcher(objective, given, sweep.ready)
        if isinstance(ranked, CLHARanking):
            ranked.count()
        slopes = sweep_prompts(store, chunks, ranked, gradients=any(needs))
        loss, metrics, scores = ranked.finish(store.logps, store.statistics)
        slopes = slopes[0] if slopes.dim() == 2 else slopes
        result = LossResult(loss, metrics, scores, slopes.to(torch.float32), store.lse, _no_route(inputs))
        hidden, weight, bias = sweep.swept()
        return result, SweptGradients(hidden, weight, None if bias is None else bias.float())


def loss_forward(inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective) -> LossResult:
    """`loss_sweep` without gradients."""
    return loss_sweep(inputs, given, head, objective, _NOTHING)[0]
