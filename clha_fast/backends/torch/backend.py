"""The torch backend: loss and both gradients in one sweep, in bounded memory, with torch's own matrix products.

Whole prompts go from logits to gradients while their exponentials are stored: three GEMMs, no recompute. The weight's
gradient is memory that nobody uses before the first prompts have been ranked: it stores the exponentials of as many
tokens as a word has numbers. Only of a prompt that exceeds the store is a part swept twice: its first tokens are scored
with the others, and recomputed in the pass over the weight's gradient that takes those.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clha_fast.backends.sweep import sweep_prompts
from clha_fast.backends.torch import routing as torch_routing
from clha_fast.backends.torch.head import Part, TorchHead, block_bytes
from clha_fast.backends.torch.moments import Mix, finished, mixed
from clha_fast.backends.torch.scans import Scan
from clha_fast.layout import Chunk, prompt_chunks
from clha_fast.objectives import Objective
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.objectives.ranked import RankedBatch
from clha_fast.options import HeadOptions
from clha_fast.types import (
    EntropySlopes,
    Gradients,
    HeadInputs,
    HeadResult,
    LossResult,
    Needs,
    RankingInputs,
    StatisticsResult,
    SweptGradients,
)

_MIN_WORKSPACE = 16 * 2**20
_ROUTED_METRICS = METRIC_NAMES.index("kept_blocks")


class _Sweep(TorchHead):
    """A head with a store for the exponentials of some tokens."""

    def __init__(self, inputs: HeadInputs, head: HeadOptions, needs: Needs, wanted: tuple[str, ...] = ()) -> None:
        super().__init__(inputs, head)
        self.wanted = wanted
        vocabulary, width = self.weight.shape
        # Passes without a store take this many tokens at a time: enough for a GEMM's full speed.
        self.batch = max(128, width)
        count = self.targets.numel()
        # Rows of prompts and padding need no memory beside logits. At the end both kinds of rows exist, in the place of
        # the logits' store: where the tokens' are larger than that, nothing is won.
        self.by_token = self.row_index is not None and count < self.hidden.shape[0] and 4 * count <= vocabulary
        budget = head.workspace_bytes or self._default_workspace(needs)
        self.capacity = max(1, budget // (vocabulary * self.dtype.itemsize))
        self.capacity = min(self.capacity, max(1, count))
        self._store: Tensor | None = None
        self.logps, self.peak, self.log_total, self.lse = (
            torch.empty(count, dtype=self.dtype, device=self.device) for _ in range(4)
        )
        self.statistics = {name: torch.empty_like(self.logps) for name in wanted}
        self.scored = self.targets != head.ignore_index
        # Checked before on a CPU; on a GPU such a target makes its token NaN, as in the kernels, without a wait.
        self.valid = (self.targets >= 0) & (self.targets < vocabulary)

    def _default_workspace(self, needs: Needs) -> int:
        """What a quarter of the weight's gradient leaves beside one block and two matrices of the first prompts' rows.

        Rows of `hidden` that no token reads get their zeros when logits are gone: their memory is there for those.
        """
        vocabulary, width = self.weight.shape
        later = self.hidden.shape[0] - self.targets.numel() if self.by_token and needs.hidden else 0
        share = vocabulary * width // 4 - 2 * width**2 + later * width
        return max(_MIN_WORKSPACE, share * self.dtype.itemsize - block_bytes(self.device))

    def gradients(self, dtype: torch.dtype) -> Gradients:
        self._store = None
        return super().gradients(dtype)

    def tokens(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)

    def room(self) -> int:
        """Tokens whose exponentials can be stored now."""
        return self.capacity + (self.weight.shape[1] if self.weight_is_fresh else 0)

    def kept(self, tokens: Tensor, late: Tensor) -> list[tuple[Scan, Tensor]]:
        """Scans of tokens and what stores their exponentials [V, n], for at most `room()` of them.

        The weight's gradient takes them first while it is fresh. `late` tokens are scored in the same product.
        """
        guests = self.dweight[:, : tokens.numel()] if self.weight_is_fresh and self.dweight is not None else None
        stores = [] if guests is None else [guests]
        if more := tokens.numel() - (0 if guests is None else guests.shape[1]):
            words = self.weight.shape[0]
            if self._store is None:
                self._store = self.peak.new_empty(words * self.capacity)
            stores.append(self._store[: words * more].view(words, more))
        scan = self.note(self.scan(torch.cat([tokens, late]), stores))
        edges = itertools.accumulate((store.shape[1] for store in stores), initial=0)
        return [(scan.at(slice(*ends)), store) for ends, store in zip(itertools.pairwise(edges), stores, strict=True)]

    def note(self, scan: Scan) -> Scan:
        """Keeps a scan's numbers per token."""
        t = scan.tokens
        self.logps[t] = self._usable_value(scan.logps, t)
        for name, value in finished(scan.moments, scan.total, self.weight.shape[0]).items():
            self.statistics[name][t] = self._usable_value(value.to(self.dtype), t)
        self.peak[t], self.log_total[t], self.lse[t] = scan.peak, scan.log_total, scan.lse
        return scan

    def _usable_value(self, value: Tensor, tokens: Tensor) -> Tensor:
        """value [n], 0 where ignored, NaN where the target is out of range."""
        return torch.where(self.scored[tokens], torch.where(self.valid[tokens], value, torch.nan), 0.0)

    def usable(self, grad_logps: Tensor, tokens: Tensor) -> Tensor:
        """The gradient of the tokens' log-probabilities: 0 where ignored, NaN where the target is out of range."""
        return self._usable_value(grad_logps.to(self.dtype), tokens)

    def active(self, grad: Tensor) -> Tensor:
        """Positions of the gradients that are not zero; on a GPU all, for how many is known to the device alone."""
        return grad.nonzero().squeeze(1) if grad.device.type == "cpu" else self.tokens(0, grad.numel())


def _score(sweep: _Sweep, tokens: Tensor, route: torch_routing.Route | None = None) -> None:
    """Scores tokens without storing anything of their logits."""
    for part in tokens.split(sweep.batch):
        scan = sweep.note(sweep.scan(part))
        if route is not None:
            route.add(scan)


def _recomputed(sweep: _Sweep, tokens: Tensor, grad: Tensor, mix: Mix | None = None) -> Iterator[Part]:
    """Scored tokens whose logits have to be formed anew, as many at a time as one pass takes."""
    at = sweep.active(grad)
    for piece in at.split(sweep.batch):
        t, own = tokens[piece], None if mix is None else mix.at(piece)
        yield sweep.recomputed(t, sweep.peak[t], sweep.log_total[t], grad[piece], own)


def token_logps_forward(inputs: HeadInputs, head: HeadOptions) -> HeadResult:
    """logps and lse of `reference.token_logps`, one block of logits at a time."""
    sweep = _Sweep(inputs, head, Needs(False, False, False))
    _score(sweep, sweep.tokens(0, inputs.targets.numel()))
    return HeadResult(sweep.logps, sweep.lse, _no_route(sweep))


def statistics_forward(inputs: HeadInputs, head: HeadOptions, names: tuple[str, ...]) -> StatisticsResult:
    """`token_logps_forward` and what `reference.token_statistics` says, in the same pass."""
    sweep = _Sweep(inputs, head, Needs(False, False, False), names)
    _score(sweep, sweep.tokens(0, inputs.targets.numel()))
    # Both parts in one number, which has digits left for log(total) beside a peak of 1e4.
    return StatisticsResult(sweep.logps, sweep.peak.double() + sweep.log_total.double(), sweep.statistics)


def statistics_backward(
    grad_logps: Tensor, slopes: EntropySlopes, inputs: HeadInputs, lse: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """Gradients of sum_t grad_logps_t * logp_t + slopes.grad_t * entropy_t, the logits formed once again."""
    sweep = _Sweep(inputs, head, needs)
    sweep.allocate(needs)
    everything = sweep.tokens(0, inputs.targets.numel())
    sweep.peak = lse.to(sweep.dtype)
    sweep.log_total = (lse - sweep.peak).to(sweep.dtype)
    bonus = EntropySlopes(sweep.usable(slopes.grad, everything), slopes.entropy)
    grad, mix = mixed(sweep.usable(grad_logps, everything), bonus)
    for part in _recomputed(sweep, everything, grad, mix):
        sweep.add_gradients([part])
    return sweep.gradients(inputs.hidden.dtype)


def _no_route(sweep: _Sweep) -> Tensor:
    """Nothing: a backward of this backend has the logits again before it decides what to leave out."""
    return torch.empty(0, dtype=torch.float32, device=sweep.device)


def token_logps_backward(
    grad_logps: Tensor, inputs: HeadInputs, lse: Tensor, route: Tensor, head: HeadOptions, needs: Needs
) -> Gradients:
    """Gradients of sum_t grad_logps_t * logp_t by recomputing the logits; tokens with a zero gradient are skipped."""
    sweep = _Sweep(inputs, head, needs)
    sweep.allocate(needs)
    grad = sweep.usable(grad_logps, sweep.tokens(0, inputs.targets.numel()))
    tokens = sweep.active(grad)
    if head.max_dropped_mass is not None:
        kept = torch_routing.Route(sweep, head.max_dropped_mass)
        _score(sweep, tokens, kept)
        kept.backward(grad[tokens], sweep.peak, sweep.log_total)
        return sweep.gradients(inputs.hidden.dtype)
    _sweep_tokens(sweep, tokens, grad)
    return sweep.gradients(inputs.hidden.dtype)


def _sweep_tokens(sweep: _Sweep, tokens: Tensor, grad: Tensor) -> None:
    """Stored and turned into gradients, as many at a time as there is room for. Nothing here outlives the stores."""
    while tokens.numel():
        now, tokens = tokens[: sweep.room()], tokens[sweep.room() :]
        scans = sweep.kept(now, now[:0])
        sweep.add_gradients([sweep.stored(scan, store, grad[scan.tokens]) for scan, store in scans])


class _Store:
    """`sweep.LogitStore` over a `_Sweep`."""

    def __init__(self, sweep: _Sweep) -> None:
        self.sweep = sweep
        self.held: list[tuple[Scan, Tensor]] = []

    @property
    def logps(self) -> Tensor:
        return self.sweep.logps

    @property
    def statistics(self) -> dict[str, Tensor]:
        return self.sweep.statistics

    def chunks(self, edges: Sequence[int]) -> list[Chunk]:
        return prompt_chunks(edges, self.sweep.capacity, first=self.sweep.room())

    def hold(self, chunk: Chunk) -> None:
        sweep, late = self.sweep, self.sweep.tokens(chunk.start, chunk.kept)
        if alone := late.numel() // sweep.batch * sweep.batch:
            _score(sweep, late[:alone])
        self.held = sweep.kept(sweep.tokens(chunk.kept, chunk.stop), late[alone:])

    def add_gradients(self, chunk: Chunk, slopes: Tensor) -> None:
        sweep, start = self.sweep, chunk.start
        everything, late = sweep.tokens(start, chunk.stop), chunk.kept - start
        bonus = None
        if slopes.dim() == 2:
            bonus = EntropySlopes(sweep.usable(slopes[1], everything), sweep.statistics["entropy"][everything])
            slopes = slopes[0]
        grad, mix = mixed(sweep.usable(slopes, everything), bonus)
        parts = []
        for scan, store in self.held:
            at = scan.tokens - start
            parts.append(sweep.stored(scan, store, grad[at], None if mix is None else mix.at(at)))
        again = _recomputed(sweep, everything[:late], grad[:late], mix)
        # One pass over the weight's gradient for what is stored and the first that is not.
        sweep.add_gradients([*parts, *itertools.islice(again, 1)])
        for part in again:
            sweep.add_gradients([part])
        # Nothing here outlives the stores: their memory is wanted for the gradient of rows that no token reads.
        self.held = []


def loss_sweep(
    inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective, needs: Needs
) -> tuple[LossResult, SweptGradients]:
    """Loss and the gradients asked for in one sweep; shapes as in `functional.linear_loss`.

    Reads the sizes on the host: with CPU tensors that costs a GPU nothing. The gradients of 16-bit inputs are float32,
    for they are rounded after the upstream gradient has been multiplied in.
    """
    sweep = _Sweep(inputs, head, needs, objective.wanted)
    sweep.mixes = objective.reads_entropy
    ranked = RankedBatch(objective, given, sweep.scored, sweep.dtype)
    num_prompts, num_tokens = ranked.layout.num_prompts, inputs.targets.numel()
    sweep.allocate(needs)
    route = None
    if head.max_dropped_mass is not None:
        route = torch_routing.Route(sweep, head.max_dropped_mass, gradients=any(needs))
    if any(needs) and route is None:
        store = _Store(sweep)
        slopes = sweep_prompts(store, store.chunks(ranked.layout.prompt_edges), ranked, gradients=True)
    else:
        everything = sweep.tokens(0, num_tokens)
        _score(sweep, everything, route)
        slopes = ranked.rank(0, num_prompts, sweep.logps, sweep.statistics)
        if any(needs) and route is not None:
            route.backward(sweep.usable(slopes, everything), sweep.peak, sweep.log_total)
    loss, metrics, scores = ranked.finish(sweep.logps, sweep.statistics)
    slopes = slopes[0] if slopes.dim() == 2 else slopes
    if route is not None:
        metrics[_ROUTED_METRICS : _ROUTED_METRICS + 3] = route.metrics()
    result = LossResult(loss, metrics, scores, slopes.to(sweep.dtype), sweep.lse, _no_route(sweep))
    return result, SweptGradients(*sweep.gradients(sweep.dtype))


def loss_forward(inputs: HeadInputs, given: RankingInputs, head: HeadOptions, objective: Objective) -> LossResult:
    """`loss_sweep` without gradients."""
    return loss_sweep(inputs, given, head, objective, Needs(False, False, False))[0]
