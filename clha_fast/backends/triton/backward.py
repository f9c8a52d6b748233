"""The Triton backend's backward: which tokens have a gradient, how the workspace is cut, and the launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clha_fast.backends.triton.head import Head, gather, round_up, scaled, tiles
from clha_fast.types import EntropySlopes, Needs
from csrc_triton import backward

WORKSPACE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Active:
    """Tokens sorted by the row they read, those with a gradient first; `count` and `peak` stay on the device.

    With temperatures of their own, tokens' gradients come divided by them. `slopes`: of entropies, beside `grad`.
    """

    grad: Tensor
    order: Tensor
    count: Tensor
    peak: Tensor
    row_ends: Tensor
    slopes: EntropySlopes | None = None

    @classmethod
    def of(cls, grad_logps: Tensor, head: Head, num_rows: int, slopes: EntropySlopes | None = None) -> Active:
        grad = usable(grad_logps, head.targets, head.temperature, head)
        size = grad.abs()
        if slopes is not None:
            slopes = slopes._replace(grad=usable(slopes.grad, head.targets, head.temperature, head))
            size = torch.maximum(size, slopes.grad.abs())
        # The largest finite one: a single inf must not turn every other token's share into 0. Down to a power of two:
        # any other factor would round what has been rounded to 16 bits once more, on another grid.
        peak = torch.where(torch.isfinite(size), size, 0.0).amax()
        peak = torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1.0)
        row = torch.arange(grad.shape[0], device=grad.device) if head.row_index is None else head.row_index
        key, order = torch.where(size != 0, row.clamp(0, num_rows - 1), num_rows).sort(stable=True)
        row_ends = torch.searchsorted(key, torch.arange(num_rows, device=grad.device), right=True)
        return cls(
            grad=grad,
            order=order,
            count=(size != 0).sum(dtype=torch.int32),
            peak=peak,
            row_ends=row_ends,
            slopes=slopes,
        )


def usable(grad: Tensor, targets: Tensor, temperature: Tensor | None, head: Head) -> Tensor:
    """Gradients [n] in float32 for logits before a temperature of each token: 0 where ignored."""
    grad = grad.to(torch.float32) if temperature is None else grad.to(torch.float32) / temperature
    return torch.where(targets == head.ignore_index, 0.0, grad)


class Chunk(NamedTuple):
    """What is worked on at a time: where it starts, its words, and dlogits [tokens, words] of it in whole tiles."""

    first_token: int
    first_word: int
    words: int
    dlogits: Tensor


class Chunks(NamedTuple):
    """How the workspace is cut: [tokens, words] elements, both whole tiles."""

    tokens: int
    words: int

    @classmethod
    def of(cls, num_tokens: int, vocabulary: int, itemsize: int, budget: int, block_n: int, block_v: int) -> Chunks:
        elements = budget // itemsize
        # Twice as many tokens as words: every vocabulary chunk adds to the float32 rows of all its tokens.
        tokens = min(round_up(num_tokens, block_n), max(block_n, math.isqrt(2 * elements) // block_n * block_n))
        # Offsets within a tile of the workspace are int32.
        words = min(round_up(vocabulary, block_v), max(block_v, elements // tokens // block_v * block_v), 2**22)
        return cls(tokens, words)


def sum_rows(drows: Tensor, active: Active, head: Head, factor: float, dhidden: Tensor) -> None:
    """dhidden [M, H] = peak * factor * sum of drows [padded, H] over the tokens that read each row."""
    config, (num_rows, width) = head.config("row_sum"), dhidden.shape
    backward.row_sum_kernel[(tiles(num_rows, config["BLOCK_N"]) * tiles(width, config["BLOCK_H"]),)](
        drows,
        active.row_ends,
        active.peak,
        dhidden,
        num_rows,
        width,
        factor,
        **config,
    )


class Backward:
    """Buffers of one backward pass and the launches that fill them."""

    # Before the names of the three GEMMs in the table.
    prefix = ""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        active: Active,
        lse: Tensor,
        workspace_bytes: int | None,
        needs: Needs,
    ) -> None:
        self.hidden, self.head, self.active, self.lse = hidden, head, active, lse.contiguous()
        self.vocabulary, self.width = head.weight.shape
        self.num_tokens = head.targets.shape[0]
        # d logit / d raw logit without the softcap's slope; it waits for the float32 end with the largest gradient.
        self.factor = head.pre_scale * head.post_scale
        mixes = active.slopes is not None
        names = ("logit_grad", "hidden_grad", "weight_grad")
        self.config = {name: head.config(self.prefix + name, statistics=mixes) for name in names}
        self.block_n = self.config["logit_grad"]["BLOCK_N"]
        self.chunks = Chunks.of(
            self.num_tokens,
            self.vocabulary,
            hidden.itemsize,
            workspace_bytes or WORKSPACE_BYTES,
            self.block_n,
            self.config["logit_grad"]["BLOCK_V"],
        )
        if self.chunks.words < self.vocabulary:
            self.chunks = self.chunks._replace(words=self._words(self.chunks, needs))
        chunks, padded, device = self.chunks, round_up(self.num_tokens, self.block_n), hidden.device
        self.rows = self.new_rows(padded)
        self.dlogits = hidden.new_empty(chunks.tokens, chunks.words)
        self.drows: Tensor | None = None
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.partial: Tensor | None = None
        self.dbias: Tensor | None = None
        if needs.hidden:
            self.drows = torch.empty(padded, self.width, dtype=torch.float32, device=device)
        if needs.weight:
            self.dweight = head.weight.new_empty(head.weight.shape)
            if chunks.tokens < padded:
                self.partial = torch.empty(chunks.words, self.width, dtype=torch.float32, device=device)
        if needs.bias:
            self.dbias = torch.zeros(self.vocabulary, dtype=torch.float32, device=device)

    def new_rows(self, padded: int) -> Tensor:
        return self.hidden.new_empty(padded, self.width)

    def _words(self, most: Chunks, needs: Needs) -> int:
        """Words of a chunk, of at most `most`, that suits the gradients that are wanted."""
        return most.words

    def run(self) -> None:
        gather(self.hidden, self.head, self.rows, order=self.active.order, count=self.active.count)
        self._walk()
        if self.drows is not None:
            # The memory of the sorted rows becomes that of dhidden.
            del self.rows, self.dlogits, self.partial
            self.dhidden = self.hidden.new_empty(self.hidden.shape)
            sum_rows(self.drows, self.active, self.head, self.factor, self.dhidden)
        if self.dbias is not None:
            self.dbias *= self.active.peak * self.factor

    def _walk(self) -> None:
        for first_word in range(0, self.vocabulary, self.chunks.words):
            for first_token in range(0, self.num_tokens, self.chunks.tokens):
                chunk = self._chunk(first_token, first_word)
                self._logit_grad(chunk)
                if self.drows is not None:
                    self._hidden_grad(chunk)
                if self.dweight is not None:
                    self._weight_grad(chunk)
                if self.dbias is not None:
                    self._bias_grad(chunk)
            if self.dweight is not None and self.partial is not None:
                rows = self.dweight[first_word : first_word + self.chunks.words]
                scaled(self.partial[: rows.shape[0]], self.active.peak * self.factor, rows)

    def _chunk(self, first_token: int, first_word: int) -> Chunk:
        words = min(self.chunks.words, self.vocabulary - first_word)
        padded = round_up(words, self.config["logit_grad"]["BLOCK_V"])
        tokens = min(self.chunks.tokens, self.rows.shape[0] - first_token)
        return Chunk(first_token, first_word, words, self.dlogits.as_strided((tokens, padded), (padded, 1)))

    def _kernel(self, name: str) -> Any:
        return getattr(backward, f"{name}_kernel")

    def _grid(self, most: int) -> tuple[int]:
        return (most,)

    def _operand(self, matrix: Tensor, block_rows: int, block_columns: int) -> Any:
        """How a GEMM takes a matrix that it reads in such blocks."""
        return matrix

    def _by_pointers(self, config: dict[str, int], reads_weight: bool, **more: int) -> dict[str, Any]:
        """What a GEMM's kernel must be told of operands that it addresses itself."""
        arguments = {"EVEN_H": self.width % config["BLOCK_H"] == 0, "PRECISION": self.head.flags["PRECISION"]}
        if reads_weight:
            strides = dict(zip(("stride_weight_v", "stride_weight_h"), self.head.weight.stride(), strict=True))
            arguments |= {**strides, "WIDE": self.head.is_wide}
        return arguments | more

    def _logit_grad(self, chunk: Chunk) -> None:
        config, head, (tokens, padded_words) = self.config["logit_grad"], self.head, chunk.dlogits.shape
        slopes = self.active.slopes
        block_n, block_v, block_h = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_H"]
        self._kernel("logit_grad")[self._grid(tokens // block_n * (padded_words // block_v))](
            self._operand(self.rows, block_n, block_h),
            self._operand(head.weight, block_v, block_h),
            head.bias,
            head.targets,
            self.lse,
            self.active.grad,
            self.active.order,
            self.active.count,
            self.active.peak,
            head.temperature,
            None if slopes is None else slopes.grad,
            None if slopes is None else slopes.entropy,
            chunk.dlogits,
            chunk.first_token,
            chunk.first_word,
            tokens,
            padded_words,
            self.vocabulary,
            self.width,
            pre_scale=head.pre_scale,
            post_scale=head.post_scale,
            HAS_BIAS=head.flags["HAS_BIAS"],
            HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
            POSITIVE=head.flags["POSITIVE"],
            PTX=head.flags["PTX"],
            HAS_TEMPERATURE=head.temperature is not None,
            HAS_ENTROPY=slopes is not None,
            **self._by_pointers(config, reads_weight=True),
            **config,
        )

    def _bias_grad(self, chunk: Chunk) -> None:
        config = self.head.config("bias_grad")
        backward.bias_grad_kernel[(tiles(chunk.words, config["BLOCK_V"]),)](
            chunk.dlogits,
            self.dbias,
            self.active.count,
            chunk.first_token,
            chunk.first_word,
            chunk.words,
            *chunk.dlogits.shape,
            **config,
        )

    def _hidden_grad(self, chunk: Chunk) -> None:
        config, (tokens, padded_words) = self.config["hidden_grad"], chunk.dlogits.shape
        block_n, block_v, block_h = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_H"]
        self._kernel("hidden_grad")[self._grid(tokens // block_n * tiles(self.width, block_h))](
            self._operand(chunk.dlogits, block_n, block_v),
            self._operand(self.head.weight, block_v, block_h),
            self.drows,
            self.active.count,
            chunk.first_token,
            chunk.first_word,
            tokens,
            padded_words,
            H=self.width,
            **self._by_pointers(config, reads_weight=True, num_words=chunk.words),
            **config,
        )

    def _weight_grad(self, chunk: Chunk) -> None:
        config, (tokens, padded_words) = self.config["weight_grad"], chunk.dlogits.shape
        block_n, block_v, block_h = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_H"]
        self._kernel("weight_grad")[self._grid(padded_words // block_v * tiles(self.width, block_h))](
            self._operand(chunk.dlogits, block_n, block_v),
            self._operand(self.rows, block_n, block_h),
            self.partial,
            self.dweight,
            self.active.count,
            self.active.peak,
            chunk.first_token,
            chunk.first_word,
            chunk.words,
            tokens,
            padded_words,
            self.width,
            self.factor,
            HAS_PARTIAL=self.partial is not None,
            **self._by_pointers(config, reads_weight=False),
            **config,
        )
