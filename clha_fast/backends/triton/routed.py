"""The Triton backend's routed backward: lists of tokens for every vocabulary block, and the three grouped GEMMs.

Cost, in GEMMs of 2 N H V operations: 3 rho for a kept share rho of the (token, block) pairs, beside the forward's 1,
and 1/128 for the means of blocks that are left out, a product of the vendor's library.
Every grid and every buffer is that of the worst case, all pairs kept: the host never learns how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from clha_fast.backends.triton.backward import WORKSPACE_BYTES, Active, sum_rows
from clha_fast.backends.triton.head import Head, gather, programs, round_up, tiles
from clha_fast.options import ROUTE_WORDS, HeadOptions
from clha_fast.types import Gradients, Needs
from csrc_triton import routed, routing

# Of dropped masses, which are below 1: float16 has no digits left below 1e-7, and ends at 65504.
_MASS_SCALE = 2.0**15
# How many times as many blocks as all tokens' pairs leave room for a chunk may have: grids are made for so many.
_MOST_BLOCKS = 8


def segments_together(segments: int, tiles_h: int, at_once: int) -> int:
    """How many segments of tokens one program of dhidden takes, for its tile of H: all run `at_once`, if so.

    The longer, the more pairs share a load of the weight.
    """
    return max(1, tiles(segments, max(1, at_once // tiles_h)))


def routed_backward(
    hidden: Tensor,
    head: Head,
    active: Active,
    lse: Tensor,
    route: Tensor,
    options: HeadOptions,
    needs: Needs,
) -> Gradients:
    """Gradients of sum_t grad_t * logp_t over the pairs that route [cdiv(V, ROUTE_WORDS), N] keeps.

    Of a pair that is left out, with a mass of -route, dhidden gets the mass times the mean of the block's rows.
    `workspace_bytes` (64 MiB) bounds dL/dlogits of the blocks that are worked on at a time, at least one block of all
    tokens. A block that no token with a gradient keeps gets zeros. Sums run in float32 and in a fixed order.
    """
    sweep = _Routed.of(hidden, head, active, lse, route, options.workspace_bytes)
    vocabulary, width = head.weight.shape
    drows = None
    if needs.hidden:
        empty = torch.empty if options.max_dropped_mass else torch.zeros
        drows = empty(sweep.capacity, width, dtype=torch.float32, device=hidden.device)
        if options.max_dropped_mass:
            sweep.start_from_means(drows)
    dweight = head.weight.new_empty(head.weight.shape) if needs.weight else None
    dbias = torch.empty(vocabulary, dtype=torch.float32, device=hidden.device) if needs.bias else None
    for chunk in range(sweep.chunks):
        sweep.list_pairs(chunk)
        sweep.logit_grad(chunk)
        if drows is not None:
            sweep.hidden_grad(chunk, drows)
        if dweight is not None:
            sweep.weight_grad(chunk, dweight)
        if dbias is not None:
            sweep.bias_grad(chunk, dbias)
    dhidden = None
    if drows is not None:
        factor = sweep.factor
        # The memory of the sorted rows becomes that of dhidden.
        del sweep
        dhidden = hidden.new_empty(hidden.shape)
        sum_rows(drows, active, head, factor, dhidden)
    return Gradients(dhidden, dweight, None if dbias is None else dbias.to(head.weight.dtype))


class _Chunks(NamedTuple):
    """Which blocks are worked on together, as `route_chunks_kernel` has it: known to the device alone."""

    firsts: Tensor
    used: Tensor
    first_row: Tensor


@dataclass(frozen=True)
class _Routed:
    """Buffers of one routed backward: a chunk's pairs, one a row, and all pairs' prefix sums and places in chunks.

    `capacity` tokens may all keep a block, and every chunk has room for the pairs of at least one such block; where few
    tokens keep each, it has those of up to `most_blocks`. owner: whose a tile of rows is, by the list of the chunk.
    """

    head: Head
    active: Active
    lse: Tensor
    route: Tensor
    rows: Tensor
    ends: Tensor
    places: _Chunks
    most_blocks: int
    pairs: Tensor
    owner: Tensor
    dlogits: Tensor

    @classmethod
    def of(
        cls, hidden: Tensor, head: Head, active: Active, lse: Tensor, route: Tensor, workspace_bytes: int | None
    ) -> _Routed:
        block_n, blocks, device = head.config("routed_logit_grad")["BLOCK_N"], route.shape[0], hidden.device
        capacity = round_up(head.targets.shape[0], block_n)
        room = (workspace_bytes or WORKSPACE_BYTES) // (ROUTE_WORDS * hidden.itemsize)
        # What all blocks need is enough, and rows are numbered in int32.
        size = max(capacity, min(room, capacity * blocks, 2**31 - 1) // block_n * block_n)
        full = size // capacity
        rows = hidden.new_empty(capacity, hidden.shape[1])
        gather(hidden, head, rows, order=active.order, count=active.count)
        ends = _count_pairs(route.contiguous(), head, active)
        most_blocks = min(blocks, _MOST_BLOCKS * full)
        return cls(
            head=head,
            active=active,
            lse=lse.contiguous(),
            route=route.contiguous(),
            rows=rows,
            ends=ends,
            places=_cut(ends, tiles(blocks, full), size, most_blocks, block_n, **head.config("route_chunks")),
            most_blocks=most_blocks,
            pairs=torch.empty(size, dtype=torch.int32, device=device),
            owner=torch.empty(size // block_n, dtype=torch.int32, device=device),
            dlogits=hidden.new_empty(size, ROUTE_WORDS),
        )

    @property
    def capacity(self) -> int:
        return self.rows.shape[0]

    @property
    def chunks(self) -> int:
        """How many there may be; those that the pairs do not need are empty."""
        return self.places.used.shape[0]

    @property
    def factor(self) -> float:
        return self.head.pre_scale * self.head.post_scale

    def start_from_means(self, drows: Tensor) -> None:
        """drows = -grad / peak * the left-out masses [N, blocks] . the blocks' mean rows [blocks, H].

        Both operands are in the inputs' dtype. Masses and product stand in the memory of dlogits, which is free yet;
        some tokens at a time where it is not long enough.
        """
        head, config = self.head, self.head.config("dropped_mass")
        num_tokens, (vocabulary, width) = self.route.shape[1], head.weight.shape
        means, unit = _block_means(head.weight)
        columns = means.shape[0]
        room = self.dlogits.view(-1)
        if room.numel() < columns + width:
            room = room.new_empty(columns + width)
        grad = self.active.grad[self.active.order] / self.active.peak * (unit / -_MASS_SCALE)
        step = room.numel() // (columns + width)
        for first in range(0, num_tokens, step):
            rows = min(step, num_tokens - first)
            masses = room[: rows * columns].view(rows, columns)
            product = room[rows * columns : rows * (columns + width)].view(rows, width)
            routing.dropped_mass_kernel[(tiles(rows, config["BLOCK_N"]) * tiles(columns, config["BLOCK_B"]),)](
                self.route,
                self.active.order,
                self.active.count,
                self.lse,
                masses,
                first,
                rows,
                num_tokens,
                vocabulary,
                self.route.shape[0],
                columns,
                head.post_scale,
                _MASS_SCALE,
                HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
                ROUTE_WORDS=ROUTE_WORDS,
                **config,
            )
            torch.mm(masses, means, out=product)
            torch.mul(product, grad[first : first + rows].unsqueeze(1), out=drows[first : first + rows])

    def list_pairs(self, chunk: int) -> None:
        segments = self.ends.shape[1]
        routing.route_list_kernel[(self.most_blocks * segments,)](
            self.route,
            self.active.order,
            self.active.count,
            self.ends,
            self.places.firsts,
            self.places.first_row,
            self.pairs,
            self.owner,
            chunk,
            self.route.shape[1],
            segments,
            TILE=self.head.config("routed_logit_grad")["BLOCK_N"],
            **self.head.config("route_list"),
        )

    def logit_grad(self, chunk: int) -> None:
        head, config = self.head, self.head.config("routed_logit_grad")
        vocabulary, width = head.weight.shape
        grid = (self.owner.shape[0] * (ROUTE_WORDS // config["BLOCK_V"]),)
        routed.routed_logit_grad_kernel[grid](
            self.rows,
            head.weight,
            head.bias,
            head.targets,
            self.lse,
            self.active.grad,
            self.active.order,
            self.active.peak,
            self.pairs,
            self.owner,
            self.places.used,
            self.places.first_row,
            self.ends,
            self.dlogits,
            chunk,
            self.ends.shape[1],
            vocabulary,
            width,
            *head.weight.stride(),
            head.pre_scale,
            head.post_scale,
            **head.flags,
            EVEN_H=width % config["BLOCK_H"] == 0,
            WIDE=head.is_wide,
            ROUTE_WORDS=ROUTE_WORDS,
            **config,
        )

    def weight_grad(self, chunk: int, dweight: Tensor) -> None:
        head, config = self.head, self.head.config("routed_weight_grad")
        vocabulary, width = head.weight.shape
        grid = (self.most_blocks * (ROUTE_WORDS // config["BLOCK_V"]) * tiles(width, config["BLOCK_H"]),)
        routed.routed_weight_grad_kernel[grid](
            self.dlogits,
            self.rows,
            dweight,
            self.active.peak,
            self.pairs,
            self.places.firsts,
            self.places.first_row,
            self.ends,
            chunk,
            self.ends.shape[1],
            vocabulary,
            width,
            self.factor,
            EVEN_H=width % config["BLOCK_H"] == 0,
            PRECISION=head.flags["PRECISION"],
            ROUTE_WORDS=ROUTE_WORDS,
            **config,
        )

    def hidden_grad(self, chunk: int, drows: Tensor) -> None:
        head, config = self.head, self.head.config("routed_hidden_grad")
        vocabulary, width = head.weight.shape
        del config["GROUP"]
        segments, tiles_h = self.ends.shape[1], tiles(width, config["BLOCK_H"])
        span = segments_together(segments, tiles_h, config.pop("RESIDENT") * programs(drows.device))
        routed.routed_hidden_grad_kernel[(tiles(segments, span) * tiles_h,)](
            self.dlogits,
            head.weight,
            drows,
            self.pairs,
            self.places.firsts,
            self.places.first_row,
            self.ends,
            chunk,
            segments,
            span,
            vocabulary,
            width,
            *head.weight.stride(),
            EVEN_H=width % config["BLOCK_H"] == 0,
            WIDE=head.is_wide,
            PRECISION=head.flags["PRECISION"],
            AMD=head.arch.startswith("gfx"),
            ROUTE_WORDS=ROUTE_WORDS,
            **config,
        )

    def bias_grad(self, chunk: int, dbias: Tensor) -> None:
        config = self.head.config("routed_bias_grad")
        routed.routed_bias_grad_kernel[(self.most_blocks * (ROUTE_WORDS // config["BLOCK_V"]),)](
            self.dlogits,
            dbias,
            self.active.peak,
            self.places.firsts,
            self.places.first_row,
            self.ends,
            chunk,
            self.ends.shape[1],
            dbias.shape[0],
            self.factor,
            ROUTE_WORDS=ROUTE_WORDS,
            **config,
        )


def _cut(ends: Tensor, chunks: int, rows: int, most_blocks: int, tile: int, **config: int) -> _Chunks:
    """The places in at most `chunks` chunks of `rows` rows of the pairs that `ends` counts."""
    blocks, segments = ends.shape
    found = _Chunks(*(ends.new_empty(size) for size in (chunks + 1, chunks, blocks)))
    routing.route_chunks_kernel[(1,)](
        ends,
        *found,
        blocks,
        segments,
        chunks,
        rows,
        most_blocks,
        TILE=tile,
        BLOCK_B=triton.next_power_of_2(blocks),
        **config,
    )
    return found


def _count_pairs(route: Tensor, head: Head, active: Active) -> Tensor:
    """ends [blocks, segments] int32: each block's pairs up to the end of every segment of the sorted tokens."""
    blocks, num_tokens = route.shape
    config = head.config("route_count")
    segments = tiles(num_tokens, config["SEGMENT"])
    counts = torch.empty(blocks, segments, dtype=torch.int32, device=route.device)
    routing.route_count_kernel[(tiles(blocks, config["BLOCK_B"]) * segments,)](
        route, active.order, active.count, counts, num_tokens, blocks, segments, **config
    )
    return counts.cumsum(1, dtype=torch.int32)


def _block_means(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(means of the weight's rows by block, in its dtype and in units of a power of two; that power of two []).

    [blocks, H], with rows of zeros up to a multiple of 8 blocks, as 16-bit products want their strides. In that unit
    the largest number is at most 1: with masses below `_MASS_SCALE` no float16 product overflows.
    """
    vocabulary, width = weight.shape
    whole, blocks = vocabulary // ROUTE_WORDS, tiles(vocabulary, ROUTE_WORDS)
    means = torch.zeros(round_up(blocks, 8), width, dtype=torch.float32, device=weight.device)
    if whole:
        rows = weight[: whole * ROUTE_WORDS].unflatten(0, (whole, ROUTE_WORDS))
        torch.mean(rows, 1, dtype=torch.float32, out=means[:whole])
    if whole < blocks:
        torch.mean(weight[whole * ROUTE_WORDS :], 0, dtype=torch.float32, out=means[whole])
    largest = torch.linalg.vector_norm(means, torch.inf)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return means.div_(unit).to(weight.dtype), unit
