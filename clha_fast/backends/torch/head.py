"""A head's logits one vocabulary block at a time, transposed: [words, tokens], in plain torch.

A block of logits is formed, exponentiated against its own maxima and summed while it is in cache. Where it is kept for
the gradients it stays in a store [V, n]; a token's softmax is then a block's exponentials times one number. What is
multiplied into the [n, V] side is that number alone: coefficients go to the [n, H] side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast.backends.products import lift, why_not_wide
from clha_fast.backends.torch.caches import caches
from clha_fast.backends.torch.moments import LEAST, Mix
from clha_fast.backends.torch.scans import Scan, by_block, exp_, keep, pick_target, runs_of, scale_by_, subtract_target
from clha_fast.layout import accumulate
from clha_fast.options import ROUTE_WORDS, HeadOptions
from clha_fast.types import STATISTICS, Gradients, HeadInputs, Needs

# One block of logits a thread, at most. On a CPU it should stay in cache from its matrix product to the next one, with
# what that reads: a quarter of the thread's share of the last-level cache, or the second level's where that is larger.
_BLOCK_BYTES = 3 * 2**20
_LARGEST_BLOCK_BYTES = 64 * 2**20
# Passes with memory of their own walk a block in pieces of at most this size a thread: half of the second-level cache.
_PIECE_BYTES = 2**19

# Products take multiples of so many tokens, 64 bytes of float32, zeros among them: on an AMD EPYC with AVX-512 MKL's
# product of 1126 tokens ran at 176 GFLOP/s, of 1136 at 192, of 1011 at 159, of 1024 at 185 (by hand).
ALIGNED = 16
# For fewer a product has kernels of its own, whose sums are half as far off: calls of so few tokens stay as they are.
_FEWEST_ALIGNED = 4

# Stored columns are multiplied run by run; where there are more runs, copied together first.
_MOST_RUNS = 8

# (first word, last word, the words' rows, out [words, aligned(n)]): writes softmax - target, or what `Mix` says, and
# leaves zeros in what n does not fill
Fill = Callable[[int, int, Tensor, Tensor], None]


def block_bytes(device: torch.device) -> int:
    """Memory of one block of logits."""
    if device.type != "cpu":
        return _LARGEST_BLOCK_BYTES
    threads, here = torch.get_num_threads(), caches()
    share = here.last // min(threads, here.sharing)
    return min(_LARGEST_BLOCK_BYTES, min(_BLOCK_BYTES, max(here.second, share // 4)) * threads)


def piece_bytes() -> int:
    """Memory of what a pass with memory of its own walks at a time on a CPU."""
    return min(_PIECE_BYTES, caches().second // 2) * torch.get_num_threads()


@dataclass
class Part:
    """Tokens [n] of a backward, the gradients of their log-probabilities [n], and how their softmax is come by."""

    tokens: Tensor
    grad: Tensor
    fill: Fill


class TorchHead:
    """Passes over the logits of some tokens, and the gradients they lead to.

    `first_word` is the place of the weight's first row in the vocabulary that the targets count in.
    """

    def __init__(self, inputs: HeadInputs, head: HeadOptions, first_word: int = 0) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.row_index, self.temperature = inputs
        self.head, self.first_word = head, first_word
        # Which of `STATISTICS` a scan sums up beside the exponentials.
        self.wanted: tuple[str, ...] = ()
        # Whether gradients of entropies are made of what a scan stores.
        self.mixes = False
        self.dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        self.device = self.hidden.device
        # On a GPU 16-bit GEMMs run on tensor cores with a float32 result; without those, as on CPUs, blocks widen.
        self.narrow = self.weight.dtype != self.dtype and why_not_wide(self.device, self.weight.dtype) is None
        # A route forms logits anew for as many tokens as a block has: only aligned ones come out as they did before.
        few = self.targets.numel() < _FEWEST_ALIGNED and head.max_dropped_mass is None
        self._multiple = 1 if few else ALIGNED
        # True where the gradient of `hidden` is summed in rows of the tokens' own, and put in its places at the end.
        self.by_token = False
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        # True until the weight's gradient has been written to: its memory is free for logits.
        self.weight_is_fresh = False

    def allocate(self, needs: Needs) -> None:
        """Buffers of the gradients that are wanted; the first tokens write the weight's, so it is not cleared."""
        if needs.hidden:
            count = (self.targets if self.by_token else self.hidden).shape[0]
            self.dhidden = self.hidden.new_zeros(count, self.hidden.shape[1], dtype=self.dtype)
        if needs.weight:
            self.dweight = torch.empty(self.weight.shape, dtype=self.dtype, device=self.device)
            self.weight_is_fresh = True
        if needs.bias:
            self.dbias = torch.zeros(self.weight.shape[0], dtype=torch.float64, device=self.device)

    def gradients(self, dtype: torch.dtype) -> Gradients:
        """The gradients in `dtype`."""
        if self.dweight is not None and self.weight_is_fresh:
            self.dweight.zero_()
        if self.dhidden is not None and self.row_index is not None and self.by_token:
            rows, self.dhidden = self.dhidden, self.hidden.new_zeros(self.hidden.shape, dtype=self.dtype)
            accumulate(self.dhidden, self.row_index, rows)
            self.by_token = False
        return Gradients(*(None if g is None else g.to(dtype) for g in (self.dhidden, self.dweight, self.dbias)))

    def token_rows(self, *parts: Tensor) -> Tensor:
        """Rows of `hidden` that the tokens read, a copy; wide unless products are narrow.

        Each part has `aligned` rows, the last of them zeros.
        """
        counts = [part.numel() for part in parts]
        # Any token's place will do: filled in here, the rows need no second copy.
        tokens = torch.cat([F.pad(part, (0, self.aligned(n) - n)) for part, n in zip(parts, counts, strict=True)])
        rows = self.hidden[tokens] if self.row_index is None else self.hidden[self.row_index[tokens]]
        for own, n in zip(rows.split([self.aligned(n) for n in counts]), counts, strict=True):
            own[n:].zero_()
        return rows if self.narrow else rows.to(self.dtype)

    def word_rows(self, a: int, b: int) -> Tensor:
        """Rows [a, b) of the weight; wide unless products are narrow."""
        return self.weight[a:b] if self.narrow else self.weight[a:b].to(self.dtype)

    def aligned(self, count: int) -> int:
        """Columns of logits that `count` tokens take: the same rule in all passes, whose sums would else differ."""
        return -(-count // self._multiple) * self._multiple

    def blocks(self, count: int) -> list[tuple[int, int]]:
        """Ranges of words, whole blocks of ROUTE_WORDS, whose logits for `count` tokens fill one block of memory.

        Of few tokens fewer: with the words' own rows of the weight they take two at most.
        """
        # Rows of 16 bits are widened, a copy that few tokens pay for: measured once, on one CPU, their loss takes 1.6
        # times as long without the bound, while float32 with 8 tokens and fewer takes a fifth less.
        vocabulary, width = self.weight.shape
        budget = block_bytes(self.device) // (self.dtype.itemsize * ROUTE_WORDS)
        step = max(1, min(budget // max(1, count), 2 * budget // max(1, count + width))) * ROUTE_WORDS
        return [(a, min(a + step, vocabulary)) for a in range(0, vocabulary, step)]

    def scratch(self, count: int) -> Tensor:
        """Memory for one block of `count` tokens."""
        words = max((b - a for a, b in self.blocks(count)), default=0)
        return torch.empty(words, count, dtype=self.dtype, device=self.device)

    def _pieces(self, z: Tensor, bounded: bool = True) -> Iterator[slice]:
        """Ranges of rows, whole blocks of ROUTE_WORDS, for passes over z; all at once unless memory is `bounded`."""
        step = z.shape[0]
        if self.device.type == "cpu" and bounded:
            budget = piece_bytes()
            step = max(1, budget // (max(1, z.shape[1]) * self.dtype.itemsize * ROUTE_WORDS)) * ROUTE_WORDS
        for a in range(0, z.shape[0], max(1, step)):
            yield slice(a, a + step)

    def columns(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(the targets as words of this head [n], which of them lie in it [n]); ignored targets lie nowhere."""
        word = self.targets[tokens] - self.first_word
        own = (word >= 0) & (word < self.weight.shape[0]) & (self.targets[tokens] != self.head.ignore_index)
        return word, own

    def _logits(self, words: Tensor, rows: Tensor, a: int, out: Tensor) -> None:
        """out [b - a, n] = words . rows^T + bias."""
        if self.narrow:
            torch.mm(words, rows.t(), out_dtype=self.dtype, out=out)
        else:
            torch.mm(words, rows.t(), out=out)
        if self.bias is not None:
            out += self.bias[a : a + out.shape[0]].unsqueeze(1)

    def divisor(self, tokens: Tensor) -> Tensor | None:
        """The tokens' own temperatures [n], if they have any."""
        return None if self.temperature is None else self.temperature[tokens].to(self.dtype)

    def _bend(self, z: Tensor) -> None:
        """Scale and tanh of a softcap in place."""
        if self.head.scale != 1.0:
            z *= self.head.scale
        if self.head.softcap is not None:
            z.div_(self.head.softcap).tanh_()

    def _transform(self, z: Tensor, sloped: bool, divisor: Tensor | None = None, bent: bool = False) -> Tensor | None:
        """Scale, softcap and temperature in place, of what may be `bent` already; the softcap's slope if wanted."""
        if not bent:
            self._bend(z)
        slope = None
        if self.head.softcap is not None:
            slope = 1 - z * z if sloped else None
            z *= self.head.softcap
        if divisor is not None:
            z /= divisor
        elif self.head.temperature != 1.0:
            z /= self.head.temperature
        return slope

    def scan(self, tokens: Tensor, stores: Sequence[Tensor] = ()) -> Scan:
        """One pass over the logits of `tokens` [n].

        Args:
            stores: [V, n_i] of the first n_0 tokens, the next n_1, ..., take every block's exponentials exp(z - the
                block's peak), times the softcap's slope; none keep nothing. Where the head `mixes` and has a softcap,
                they take its tanh: slopes would be lost in what exponentials say of the logits.
        """
        count, vocabulary = tokens.numel(), self.weight.shape[0]
        wide = self.aligned(count)
        rows, (word, own) = self.token_rows(tokens), self.columns(tokens)
        num_blocks = -(-vocabulary // ROUTE_WORDS)
        peaks, sums = (torch.empty(num_blocks, wide, dtype=self.dtype, device=self.device) for _ in range(2))
        extra = {name: torch.empty_like(sums) for name in STATISTICS[:3] if name in self.wanted}
        raw = torch.zeros(count, dtype=self.dtype, device=self.device)
        top, divisor = torch.zeros_like(raw), self.divisor(tokens)
        divisors = None if divisor is None else F.pad(divisor, (0, wide - count), value=1.0)
        keeps_bent = bool(stores) and self.mixes and self.head.softcap is not None
        # Sums of products need exponentials beside their logarithms.
        apart = not extra.keys().isdisjoint(("entropy", "sum_sq_probs"))
        # Passes in place need no memory, and of few large ones the calls cost less than the second-level cache saves.
        bounded = apart or self.head.softcap is not None
        # In memory of its own, which stays in cache, and not in the stores: one product for all of them.
        scratch = self.scratch(wide)
        spare = torch.empty_like(scratch[next(self._pieces(scratch), slice(0))]) if apart else scratch
        z = part = made = group = power = scratch
        for a, b in self.blocks(wide):
            z = scratch[: b - a]
            self._logits(self.word_rows(a, b), rows, a, z)
            raw = pick_target(z, word - a, own, raw)
            for piece in self._pieces(z, bounded):
                part = z[piece]
                self._bend(part)
                if keeps_bent:
                    keep(stores, a + piece.start, part)
                slope = self._transform(part, bool(stores) and not keeps_bent, divisors, bent=True)
                if "is_top1" in self.wanted:
                    # As it stands among the others: what is transformed alone may be rounded otherwise.
                    top = pick_target(part, word - (a + piece.start), own, top)
                made = spare[: part.shape[0]] if apart else part
                for (first, group), (_, power) in zip(by_block(part), by_block(made), strict=True):
                    block = (a + piece.start) // ROUTE_WORDS + first
                    blocks = slice(block, block + group.shape[0])
                    peak = peaks[blocks]
                    torch.amax(group, 1, out=peak)
                    if "mean_logit" in extra:
                        torch.sum(group, 1, out=extra["mean_logit"][blocks])
                    # A block of -inf alone adds nothing; (-inf) - (-inf) would be NaN.
                    group.sub_(peak.clamp(min=torch.finfo(self.dtype).min).unsqueeze(1))
                    torch.sum(exp_(power.copy_(group) if apart else power), 1, out=sums[blocks])
                    if "entropy" in extra:
                        # 0 * -inf counts as 0; where a logit is NaN, its exponentials' sum is, too.
                        torch.nansum(group.mul_(power), 1, out=extra["entropy"][blocks])
                    if "sum_sq_probs" in extra:
                        torch.sum(torch.mul(power, power, out=group), 1, out=extra["sum_sq_probs"][blocks])
                if slope is not None:
                    made *= slope
                if not keeps_bent:
                    keep(stores, a + piece.start, made)
        # The sums in float64 have no need of this memory.
        del scratch, spare, rows, z, part, made, group, power
        peaks, sums = peaks[:, :count], sums[:, :count]
        slope = self._transform(raw, bool(stores), divisor)
        peak = peaks.amax(0)
        total = torch.zeros(count, dtype=torch.float64, device=self.device)
        moments = {name: torch.zeros_like(total) for name in extra}
        for piece in self._pieces(peaks):
            lead = peaks[piece].double() - peak.double()
            share = lead.exp()
            total += (sums[piece].double() * share).sum(0)
            for name, part in extra.items():
                sized = part[piece, :count].double()
                if name == "entropy":
                    # A block of -inf alone has no exponentials, and 0 * -inf would be NaN.
                    sized = (sized + sums[piece] * lead.clamp(min=LEAST)) * share
                elif name == "sum_sq_probs":
                    sized = sized * share**2
                moments[name] += sized.sum(0)
        if "is_top1" in self.wanted:
            moments["is_top1"] = (own & (top >= peak)).to(torch.float64)
        return Scan(tokens, peak, total, raw, slope, peaks, sums, moments)

    def stored(self, scan: Scan, store: Tensor, grad: Tensor, mix: Mix | None = None) -> Part:
        """Tokens whose exponentials `scan` left in a store, for `add_gradients`; grad [n].

        On a CPU tokens with a zero gradient are left out. The store may be the memory of the weight's gradient.
        """
        count = grad.numel()
        parts: list[slice | Tensor] = [slice(0, count)]
        if self.device.type == "cpu":
            keep = grad.nonzero().squeeze(1)
            if keep.numel() < count:
                scan, grad, mix = scan.at(keep), grad[keep], None if mix is None else mix.at(keep)
                runs = runs_of(keep)
                # Whole candidates are left out, as a rule: what stays is not copied together first.
                parts = [*runs] if len(runs) <= _MOST_RUNS else [keep]
        tokens, count = scan.tokens, grad.numel()
        sizes = [part.numel() if isinstance(part, Tensor) else part.stop - part.start for part in parts]
        word, own = self.columns(tokens)
        lse, divisor = scan.peak + scan.total.log(), self.divisor(tokens)
        true_class = own.to(self.dtype) if scan.slope is None else own * scan.slope
        if mix is not None:
            true_class = true_class * mix.main

        def fill(a: int, b: int, _words_: Tensor, wide: Tensor) -> None:
            out = wide[:, :count]
            wide[:, count:].zero_()
            if self.mixes and self.head.softcap is not None:
                for part, here in zip(parts, out.split(sizes, 1), strict=True):
                    here.copy_(store[a:b, part])
                self.softmax_minus_target(out, word - a, own, scan.peak, scan.log_total, divisor, mix, bent=True)
                return
            blocks = slice(a // ROUTE_WORDS, -(-b // ROUTE_WORDS))
            share = torch.exp(scan.block_peaks[blocks].double() - lse).to(self.dtype)
            for part, here, times in zip(parts, out.split(sizes, 1), share.split(sizes, 1), strict=True):
                for (first, p), (_, source) in zip(by_block(here), by_block(store[a:b, part]), strict=True):
                    torch.mul(source, times[first : first + p.shape[0]].unsqueeze(1), out=p)
            if mix is not None:
                for piece in self._pieces(out):
                    out[piece] *= mix.weights(out[piece].log())
            subtract_target(out, word - a, own, true_class)

        return Part(tokens, grad, fill)

    def recomputed(self, tokens: Tensor, peak: Tensor, log_total: Tensor, grad: Tensor, mix: Mix | None = None) -> Part:
        """Tokens whose logits `add_gradients` forms anew, for known log-sum-exps; all [n]."""
        word, own = self.columns(tokens)
        rows, divisor = self.token_rows(tokens), self.divisor(tokens)

        def fill(a: int, _b: int, words: Tensor, wide: Tensor) -> None:
            self._logits(words, rows, a, wide)
            wide[:, tokens.numel() :].zero_()
            out = wide[:, : tokens.numel()]
            self.softmax_minus_target(out, word - a, own, peak, log_total, divisor, mix)

        return Part(tokens, grad, fill)

    def softmax_minus_target(
        self,
        z: Tensor,
        at: Tensor,
        own: Tensor,
        peak: Tensor,
        log_total: Tensor,
        divisor: Tensor | None = None,
        mix: Mix | None = None,
        bent: bool = False,
    ) -> None:
        """Raw (or `bent`) logits [words, n] become d(-logp) / d(raw logits) times temperature / scale; or a mix."""
        slope = self._transform(pick_target(z, at, own, torch.zeros_like(peak)), True, divisor, bent)
        true_class = own.to(self.dtype) if slope is None else own * slope
        if mix is not None:
            true_class = true_class * mix.main
        for piece in self._pieces(z, mix is not None or self.head.softcap is not None):
            part = z[piece]
            slope = self._transform(part, True, divisor, bent)
            part.sub_(peak).sub_(log_total)
            weights = None if mix is None else mix.weights(part)
            exp_(part)
            if weights is not None:
                part *= weights
            if slope is not None:
                part *= slope
        subtract_target(z, at, own, true_class)

    def add_gradients(self, parts: list[Part]) -> None:
        """Adds the gradients of sum_t grad_t * logp_t over all parts, in one pass over the weight and its gradient."""
        parts = [part for part in parts if part.tokens.numel()]
        if not parts:
            return
        columns = [self.aligned(part.tokens.numel()) for part in parts]
        wide, width = sum(columns), self.weight.shape[1]
        factors = torch.cat([self._factor(part) for part in parts])
        # Softmaxes of tokens without a gradient may be NaN. On a CPU those have been left out.
        inert, digits = None if self.device.type == "cpu" else factors == 0, None
        if self.narrow:
            # What is rounded to 16 bits takes the digits, the rows powers of two, which are exact: one rounding.
            digits, exponents = torch.frexp(factors)
            factors = torch.ldexp((factors != 0).to(self.dtype), exponents)
        scaled, unit = self._scaled_rows(parts, factors)
        dhidden = None if self.dhidden is None else torch.zeros(wide, width, dtype=self.dtype, device=self.device)
        scratch = self.scratch(wide)
        for a, b in self.blocks(wide):
            words, p = self.word_rows(a, b), scratch[: b - a]
            # Every part is out of the store before its memory becomes the weight's gradient.
            for part, out in zip(parts, p.split(columns, dim=1), strict=True):
                part.fill(a, b, words, out)
            if digits is not None:
                p *= digits
            if inert is not None:
                p.masked_fill_(inert, 0)
            if self.dbias is not None:
                # Products in pieces, sums in float64: a GEMV is twice as far off as the eager loss's own sum.
                for piece in self._pieces(p):
                    self.dbias[a:b][piece] += (p[piece] * factors).sum(1, dtype=self.dbias.dtype)
            low = p.to(self.weight.dtype) if self.narrow else p
            if dhidden is not None:
                if self.narrow:
                    dhidden += torch.mm(low.t(), words, out_dtype=self.dtype)
                else:
                    dhidden.addmm_(low.t(), words)
            if self.dweight is not None and scaled is not None:
                self._add_weight(self.dweight[a:b], low, scaled, unit)
        if self.dweight is not None:
            self.weight_is_fresh = False
        if dhidden is not None:
            for part, rows in zip(parts, scale_by_(dhidden, factors).split(columns), strict=True):
                self.add_hidden(part.tokens, rows[: part.tokens.numel()])

    def _factor(self, part: Part) -> Tensor:
        """What d(-logp) / d(raw logits) of a part's tokens is multiplied by, with zeros up to `aligned`."""
        factor = -part.grad.to(self.dtype) * (self.head.scale / self.head.temperature)
        if (divisor := self.divisor(part.tokens)) is not None:
            factor = factor / divisor
        return F.pad(factor, (0, self.aligned(factor.numel()) - factor.numel()))

    def _scaled_rows(self, parts: list[Part], factors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The tokens' rows times their factors; for narrow products these over the largest, a power of two, and it."""
        if self.dweight is None:
            return None, None
        rows, unit = self.token_rows(*(p.tokens for p in parts)), None
        if self.narrow:
            unit = factors.amax().clamp(min=torch.finfo(self.dtype).tiny)
            up = lift(rows.masked_fill_((factors == 0).unsqueeze(1), 0))
            rows, factors, unit = rows.mul_(up), (factors / unit).to(rows.dtype), unit / up
        return scale_by_(rows, factors), unit

    def _add_weight(self, out: Tensor, p: Tensor, scaled: Tensor, unit: Tensor | None) -> None:
        if unit is not None:
            chunk = torch.mm(p, scaled, out_dtype=self.dtype).mul_(unit)
            if self.weight_is_fresh:
                out.copy_(chunk)
            else:
                out += chunk
        elif self.weight_is_fresh:
            torch.mm(p, scaled, out=out)
        else:
            out.addmm_(p, scaled)

    def add_hidden(self, tokens: Tensor, rows: Tensor) -> None:
        """Adds the tokens' rows [n, H] to `dhidden`; a token that has a row of its own there comes once."""
        assert self.dhidden is not None
        if self.row_index is None or self.by_token:
            self.dhidden[tokens] = rows
        else:
            accumulate(self.dhidden, self.row_index[tokens], rows)
