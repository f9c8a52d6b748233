"""The dense backward where operands can come by tensor descriptors (TMA): the same walk, its three GEMMs persistent."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clha_fast.backends.triton.backward import Backward, Chunk, Chunks
from clha_fast.backends.triton.head import architecture, has_descriptor, programs, round_up, tiles
from clha_fast.types import Factors, Needs
from csrc_triton import configs, persistent_backward
from csrc_triton.configs import Config

# Where the kernel's product was measured to be faster than the library's: 11.5 ms for 11.1, and 2.5 more to multiply
# and round what that leaves in float32 (NVIDIA H200, 8192 x 4096 x 128256, benchmarks/results/gpu-tiles.json).
PRODUCTS = ("sm_90",)


def even_parts(blocks: int, tiles_of_rows: int, programs: int, most: int) -> int:
    """Into how many equal parts of whole blocks of words a product is cut, of at most `most`, to end soonest.

    It takes ceil(tiles * parts / programs) turns of 1 / parts each; of equals the fewest parts.
    """
    found = [parts for parts in range(1, min(most, blocks) + 1) if blocks % parts == 0] or [1]
    return min(found, key=lambda parts: (Fraction(tiles(tiles_of_rows * parts, programs), parts), parts))


def even_words(tokens: int, most: int, width: int, programs: int, logits: Config, weight: Config | None) -> int:
    """Words of a chunk: those of `most` and three quarters of it with which logits and dweight take least time a word.

    `weight` is None where nobody wants dweight, which then takes no time.

    Programs that find a tile left keep the others waiting to its end. At H 2304 dweight has 288 tiles for 4096 words,
    2.2 turns of 132 programs, and takes three; 252 for 3584, and takes two. (dhidden's turns do not depend on words.)
    Each chunk more adds to all of dhidden's sums once more: for less than a fiftieth of the time it is not made.
    """
    block = logits["BLOCK_V"] if weight is None else math.lcm(logits["BLOCK_V"], weight["BLOCK_V"])

    def a_word(words: int) -> Fraction:
        """Turns, each in products of one element of a tile."""
        found = tiles(tokens, logits["BLOCK_N"]) * tiles(words, logits["BLOCK_V"])
        turns = tiles(found, programs) * logits["BLOCK_N"] * logits["BLOCK_V"] * width
        if weight is not None:
            found = tiles(words, weight["BLOCK_V"]) * tiles(width, weight["BLOCK_H"])
            turns += tiles(found, programs) * weight["BLOCK_V"] * weight["BLOCK_H"] * tokens
        return Fraction(turns, words)

    found = min(range(most // block * block, max(block, most * 3 // 4) - 1, -block), key=a_word, default=most)
    return found if found and 50 * a_word(found) <= 49 * a_word(most) else most


def multiplies(factors: Factors) -> bool:
    """Whether `product` is the way to such factors' product: on a device of `PRODUCTS`, rows of whole vectors."""
    left, right, _ = factors
    # The width is `Head.is_persistent_backward`'s.
    known = right.shape[0] > 0 and right.shape[1] % 16 == 0 and architecture(left.device) in PRODUCTS
    return known and has_descriptor(left) and has_descriptor(right)


def product(factors: Factors, factor: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """factor * left[:, :V]^T . right, [V, H] in `dtype`: summed in float32, rounded once as it is stored; factor []."""
    left, right, _ = factors
    count, width = right.shape
    config = configs.select("persistent_weight_grad", architecture(right.device), "16-bit")
    block_n, block_v, block_h = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_H"]
    out = right.new_empty(vocabulary, width, dtype=dtype)
    grid = min(programs(right.device), tiles(vocabulary, block_v) * tiles(width, block_h))
    persistent_backward.persistent_weight_grad_kernel[(grid,)](
        _operand(left, block_n, block_v),
        _operand(right, block_n, block_h),
        None,
        out,
        torch.full((), count, dtype=torch.int32, device=right.device),
        factor,
        0,
        0,
        vocabulary,
        round_up(count, block_n),
        round_up(vocabulary, block_v),
        width,
        1.0,
        HAS_PARTIAL=False,
        **config,
    )
    return out


def _operand(matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])


class PersistentBackward(Backward):
    """`Backward` for a head that `Head.is_persistent` says yes to."""

    prefix = "persistent_"
    # In how many parts of the words a chunk's dhidden may be summed: as many have rows of their own.
    parts = 1

    def __init__(self, hidden: Tensor, *arguments: Any) -> None:
        super().__init__(hidden, *arguments)
        self.programs = programs(hidden.device)
        if self.drows is not None and self.num_tokens:
            first = self._chunk(0, 0)
            self.parts = max(1, 2 * self.programs // max(1, self._tiles_of_rows(first)))
            self.parts = self._parts(first)
            if self.parts > 1:
                padded, width = self.drows.shape
                self.drows = self.drows.new_empty(self.parts * padded, width)
            self.drows.zero_()

    def _words(self, most: Chunks, needs: Needs) -> int:
        rows, count = self.config["hidden_grad"], programs(self.hidden.device)
        # Few tokens' dhidden is cut into equal parts of a chunk, which a number of words has or has not.
        if needs.hidden and tiles(most.tokens, rows["BLOCK_N"]) * tiles(self.width, rows["BLOCK_H"]) <= count:
            return most.words
        weight: Config | None = None
        if needs.weight:
            summed = most.tokens < round_up(self.num_tokens, self.block_n)
            weight = self.head.config("persistent_weight_grad_partial") if summed else self.config["weight_grad"]
        return even_words(most.tokens, most.words, self.width, count, self.config["logit_grad"], weight)

    def _tiles_of_rows(self, chunk: Chunk) -> int:
        config = self.config["hidden_grad"]
        return chunk.dlogits.shape[0] // config["BLOCK_N"] * tiles(self.width, config["BLOCK_H"])

    def _parts(self, chunk: Chunk) -> int:
        """Equal parts of a chunk's words, so that few tokens keep the device busy: at most `parts`."""
        blocks = chunk.dlogits.shape[1] // self.config["hidden_grad"]["BLOCK_V"]
        return even_parts(blocks, self._tiles_of_rows(chunk), self.programs, self.parts)

    def new_rows(self, padded: int) -> Tensor:
        # TMA wants rows that start on 16 bytes.
        return self.hidden.new_empty(padded, round_up(self.width, 8))[:, : self.width]

    def run(self) -> None:
        if self.partial is not None:
            self.config["weight_grad"] = self.head.config("persistent_weight_grad_partial")
        super().run()

    def _walk(self) -> None:
        super()._walk()
        if self.drows is not None and self.parts > 1:
            first, *others = self.drows.chunk(self.parts)
            for other in others:  # in order: the same bits every time
                first += other
            self.drows = first

    def _hidden_grad(self, chunk: Chunk) -> None:
        config, (tokens, padded_words) = self.config["hidden_grad"], chunk.dlogits.shape
        block_n, block_v, block_h = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_H"]
        assert self.drows is not None
        parts = self._parts(chunk)
        persistent_backward.persistent_hidden_grad_kernel[
            self._grid(tokens // block_n * tiles(self.width, block_h) * parts)
        ](
            self._operand(chunk.dlogits, block_n, block_v),
            self._operand(self.head.weight, block_v, block_h),
            self.drows,
            self.active.count,
            chunk.first_token,
            chunk.first_word,
            tokens,
            padded_words,
            padded_words // parts,
            self.drows.shape[0] // self.parts,
            H=self.width,
            **config,
        )

    def _kernel(self, name: str) -> Any:
        return getattr(persistent_backward, f"persistent_{name}_kernel")

    def _grid(self, most: int) -> tuple[int]:
        return (min(self.programs, most),)

    def _operand(self, matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
        return _operand(matrix, block_rows, block_columns)

    def _by_pointers(self, config: dict[str, int], reads_weight: bool, **more: int) -> dict[str, Any]:
        return {}
