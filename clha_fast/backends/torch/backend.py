"""The torch backend: loss and both gradients in one sweep, in bounded memory, with torch's own matrix products.

A prompt's coefficients dL/dS_i need that prompt's scores only, so whole prompts go from logits to gradients while their
exponentials are stored: three GEMMs, no recompute. The weight's gradient is memory that nobody uses before the first
prompts have been ranked: it stores the exponentials of as many tokens as a word has numbers. Only of a prompt that
exceeds the store is a part swept twice: its first tokens are scored at the start, and recomputed in the pass over the
weight's gradient that takes the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from clha_fast.backends.torch import routing as torch_routing
from clha_fast.backends.torch.head import Part, Scan, TorchHead, block_bytes
from clha_fast.objectives.clha import Plan, Ranking, make_plan
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.options import CLHAOptions, HeadOptions
from clha_fast.types import Gradients, HeadInputs, HeadResult, LossResult, Needs, RankingInputs
from torch import Tensor

_MIN_WORKSPACE = 16 * 2**20
_ROUTED_METRICS = METRIC_NAMES.index("kept_blocks")


class _Sweep(TorchHead):
    """A head with a store for the exponentials of some tokens."""

    def __init__(self, inputs: HeadInputs, head: HeadOptions, needs: Needs) -> None:
        super().__init__(inputs, head)
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

    def stores(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(tokens, their store), the weight's gradient first while it is fresh; at most `room()` tokens."""
        parts = []
        if self.weight_is_fresh and self.dweight is not None:
            guests = tokens[: self.weight.shape[1]]
            parts.append((guests, self.dweight[:, : guests.numel()]))
            tokens = tokens[guests.numel() :]
        if tokens.numel():
            words, count = self.weight.shape[0], tokens.numel()
            if self._store is None:
                self._store = self.peak.new_empty(words * self.capacity)
            parts.append((tokens, self._store[: words * count].view(words, count)))
        return parts

    def note(self, scan: Scan) -> Scan:
        """Keeps a scan's numbers per token."""
        t = scan.tokens
        valid = torch.where(self.valid[t], scan.logps, torch.nan)
        self.logps[t] = torch.where(self.scored[t], valid, 0.0)
        self.peak[t], self.log_total[t], self.lse[t] = scan.peak, scan.log_total, scan.lse
        return scan

    def usable(self, grad_logps: Tensor, tokens: Tensor) -> Tensor:
        """The gradient of the tokens' log-probabilities: 0 where ignored, NaN where the target is out of range."""
        grad = torch.where(self.scored[tokens], grad_logps.to(self.dtype), 0.0)
        return torch.where(self.scored[tokens] & ~self.valid[tokens], torch.nan, grad)

    def active(self, grad: Tensor) -> Tensor:
        """Positions of the gradients that are not zero; on a GPU all, for how many is known to the device alone."""
        return grad.nonzero().squeeze(1) if grad.device.type == "cpu" else self.tokens(0, grad.numel())


def _score(sweep: _Sweep, tokens: Tensor, route: torch_routing.Route | None = None) -> None:
    """Scores tokens without storing anything of their logits."""
    for part in tokens.split(sweep.batch):
        scan = sweep.note(sweep.scan(part))
        if route is not None:
            route.add(scan)


def _recomputed(sweep: _Sweep, tokens: Tensor, grad: Tensor) -> Iterator[Part]:
    """Scored tokens whose logits have to be formed anew, as many at a time as one pass takes."""
    at = sweep.active(grad)
    for piece in at.split(sweep.batch):
        t = tokens[piece]
        yield sweep.recomputed(t, sweep.peak[t], sweep.log_total[t], grad[piece])


def token_logps_forward(inputs: HeadInputs, head: HeadOptions) -> HeadResult:
    """logps and lse of `reference.token_logps`, one block of logits at a time."""
    sweep = _Sweep(inputs, head, Needs(False, False, False))
    _score(sweep, sweep.tokens(0, inputs.targets.numel()))
    return HeadResult(sweep.logps, sweep.lse, _no_route(sweep))


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
        scans = [(sweep.scan(part, store), store) for part, store in sweep.stores(now)]
        sweep.add_gradients([sweep.stored(scan, store, grad[scan.tokens]) for scan, store in scans])


@dataclass
class _Group:
    """Prompts [first, last) with tokens [start, stop), of which [kept, stop) are stored until they are ranked."""

    first: int
    last: int
    start: int
    kept: int
    stop: int


def _groups(plan: Plan, room: int, capacity: int) -> list[_Group]:
    """Ranges of whole prompts: the first of at most `room` tokens, others of `capacity`; a larger one stands alone."""
    edges = [plan.token_offsets[c] for c in plan.candidate_offsets]
    groups: list[_Group] = []
    first = 0
    for last in range(1, len(edges)):
        limit = capacity if groups else room
        if last == len(edges) - 1 or edges[last + 1] - edges[first] > limit:
            start, stop = edges[first], edges[last]
            groups.append(_Group(first, last, start, max(start, stop - limit), stop))
            first = last
    return groups


def _sweep_groups(sweep: _Sweep, plan: Plan, ranked: Ranking) -> None:
    """Groups of prompts one after another: stored, ranked, and turned into gradients."""
    groups = _groups(plan, sweep.room(), sweep.capacity)
    early = torch.cat([sweep.tokens(g.start, g.kept) for g in groups])
    _score(sweep, early)
    for g in groups:
        scans = [
            (sweep.note(sweep.scan(part, store)), store) for part, store in sweep.stores(sweep.tokens(g.kept, g.stop))
        ]
        ranked.rank(g.first, g.last, sweep.logps[g.start : g.stop])
        grad = sweep.usable(ranked.token_coefficients(g.first, g.last), sweep.tokens(g.start, g.stop))
        parts = [sweep.stored(scan, store, grad[scan.tokens - g.start]) for scan, store in scans]
        again = _recomputed(sweep, sweep.tokens(g.start, g.kept), grad[: g.kept - g.start])
        # One pass over the weight's gradient for what is stored and the first that is not.
        sweep.add_gradients([*parts, *itertools.islice(again, 1)])
        for part in again:
            sweep.add_gradients([part])


def clha_sweep(
    inputs: HeadInputs, ranking: RankingInputs, head: HeadOptions, options: CLHAOptions, needs: Needs
) -> tuple[LossResult, Gradients]:
    """Loss and the gradients asked for in one sweep; shapes as in `functional.linear_clha_loss`.

    Reads `candidate_lengths` and `candidates_per_prompt` on the host: with CPU tensors that costs a GPU nothing.
    The gradients of 16-bit inputs are float32, for they are rounded after the upstream gradient has been multiplied in.
    """
    sweep = _Sweep(inputs, head, needs)
    plan = make_plan(inputs.targets, ranking, head, options, sweep.dtype)
    ranked = Ranking(plan, options)
    num_prompts, num_tokens = len(plan.candidate_offsets) - 1, inputs.targets.numel()
    sweep.allocate(needs)
    route = None
    if head.max_dropped_mass is not None:
        route = torch_routing.Route(sweep, head.max_dropped_mass, gradients=any(needs))
    if any(needs) and route is None:
        _sweep_groups(sweep, plan, ranked)
    else:
        everything = sweep.tokens(0, num_tokens)
        _score(sweep, everything, route)
        ranked.rank(0, num_prompts, sweep.logps)
        if any(needs) and route is not None:
            grad = sweep.usable(ranked.token_coefficients(0, num_prompts), everything)
            route.backward(grad, sweep.peak, sweep.log_total)
    loss, metrics, scores = ranked.finish(sweep.dtype)
    if route is not None:
        metrics[_ROUTED_METRICS : _ROUTED_METRICS + 3] = route.metrics()
    coefficients = ranked.coefficients.to(sweep.dtype)
    result = LossResult(loss, metrics, scores, coefficients, sweep.lse, _no_route(sweep))
    return result, sweep.gradients(sweep.dtype)


def clha_forward(inputs: HeadInputs, ranking: RankingInputs, head: HeadOptions, options: CLHAOptions) -> LossResult:
    """`clha_sweep` without gradients."""
    return clha_sweep(inputs, ranking, head, options, Needs(False, False, False))[0]
