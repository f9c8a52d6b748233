"""The Triton backend's backward: which tokens have a gradient, how the workspace is cut, and the launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clha_fast.inputs import Needs
from clha_fast.triton_head import Head, gather, round_up, tiles
from csrc_triton import backward

WORKSPACE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Active:
    """Tokens sorted by the row they read, those with a gradient first; `count` and `peak` stay on the device."""

    grad: Tensor
    order: Tensor
    count: Tensor
    peak: Tensor
    row_ends: Tensor

    @classmethod
    def of(cls, grad_logps: Tensor, head: Head, num_rows: int) -> Active:
        grad = torch.where(head.targets == head.ignore_index, 0.0, grad_logps.to(torch.float32))
        size = grad.abs()
        # The largest finite one: a single inf must not turn every other token's share into 0.
        peak = torch.where(torch.isfinite(size), size, 0.0).amax()
        row = torch.arange(grad.shape[0], device=grad.device) if head.row_index is None else head.row_index
        key, order = torch.where(grad != 0, row.clamp(0, num_rows - 1), num_rows).sort(stable=True)
        row_ends = torch.searchsorted(key, torch.arange(num_rows, device=grad.device), right=True)
        return cls(
            grad=grad,
            order=order,
            count=(grad != 0).sum(dtype=torch.int32),
            peak=torch.where(peak > 0, peak, 1.0),
            row_ends=row_ends,
        )


@dataclass(frozen=True)
class Chunks:
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
        self.config = {name: head.config(self.prefix + name) for name in ("logit_grad", "hidden_grad", "weight_grad")}
        self.block_n = self.config["logit_grad"]["BLOCK_N"]
        self.chunks = Chunks.of(
            self.num_tokens,
            self.vocabulary,
            hidden.itemsize,
            workspace_bytes or WORKSPACE_BYTES,
            self.block_n,
            self.config["logit_grad"]["BLOCK_V"],
        )
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
            self.dhidden = hidden.new_empty(hidden.shape)
        if needs.weight:
            self.dweight = head.weight.new_empty(head.weight.shape)
            if chunks.tokens < padded:
                self.partial = torch.empty(chunks.words, self.width, dtype=torch.float32, device=device)
        if needs.bias:
            self.dbias = torch.zeros(self.vocabulary, dtype=torch.float32, device=device)

    def new_rows(self, padded: int) -> Tensor:
        return self.hidden.new_empty(padded, self.width)

    def run(self) -> None:
        gather(self.hidden, self.head, self.rows, order=self.active.order, count=self.active.count)
        for first_word in range(0, self.vocabulary, self.chunks.words):
            for first_token in range(0, self.num_tokens, self.chunks.tokens):
                self._logit_grad(first_token, first_word)
                if self.dhidden is not None:
                    self._hidden_grad(first_token, first_word)
                if self.dweight is not None:
                    self._weight_grad(first_token, first_word)
                if self.dbias is not None:
                    self._bias_grad(first_token, first_word)
            if self.dweight is not None and self.partial is not None:
                rows = self.dweight[first_word : first_word + self.chunks.words]
                torch.mul(self.partial[: rows.shape[0]], self.active.peak * self.factor, out=rows)
        if self.dhidden is not None and self.drows is not None:
            sum_rows(self.drows, self.active, self.head, self.factor, self.dhidden)
        if self.dbias is not None:
            self.dbias *= self.active.peak * self.factor

    def _tokens_from(self, first_token: int) -> int:
        """Tokens of the chunk that starts there, in whole tiles."""
        return min(self.chunks.tokens, self.rows.shape[0] - first_token)

    def _words_from(self, first_word: int) -> tuple[int, int]:
        """Words of the chunk that starts there, and the same in whole tiles."""
        words = min(self.chunks.words, self.vocabulary - first_word)
        return words, round_up(words, self.config["logit_grad"]["BLOCK_V"])

    def _logit_grad(self, first_token: int, first_word: int) -> None:
        config, head = self.config["logit_grad"], self.head
        tokens, padded_words = self._tokens_from(first_token), self._words_from(first_word)[1]
        backward.logit_grad_kernel[(tokens // config["BLOCK_N"] * (padded_words // config["BLOCK_V"]),)](
            self.rows,
            head.weight,
            head.bias,
            head.targets,
            self.lse,
            self.active.grad,
            self.active.order,
            self.active.count,
            self.active.peak,
            self.dlogits,
            first_token,
            first_word,
            tokens,
            padded_words,
            self.vocabulary,
            self.width,
            *head.weight.stride(),
            head.pre_scale,
            head.post_scale,
            **head.flags,
            EVEN_H=self.width % config["BLOCK_H"] == 0,
            WIDE=head.is_wide,
            **config,
        )

    def _bias_grad(self, first_token: int, first_word: int) -> None:
        config = self.head.config("bias_grad")
        tokens, (words, padded_words) = self._tokens_from(first_token), self._words_from(first_word)
        backward.bias_grad_kernel[(tiles(words, config["BLOCK_V"]),)](
            self.dlogits,
            self.dbias,
            self.active.count,
            first_token,
            first_word,
            words,
            tokens,
            padded_words,
            **config,
        )

    def _hidden_grad(self, first_token: int, first_word: int) -> None:
        config = self.config["hidden_grad"]
        tokens, (words, padded_words) = self._tokens_from(first_token), self._words_from(first_word)
        programs = tokens // config["BLOCK_N"] * tiles(self.width, config["BLOCK_H"])
        backward.hidden_grad_kernel[(programs,)](
            self.dlogits,
            self.head.weight,
            self.drows,
            self.active.count,
            first_token,
            first_word,
            tokens,
            padded_words,
            words,
            self.width,
            *self.head.weight.stride(),
            EVEN_H=self.width % config["BLOCK_H"] == 0,
            WIDE=self.head.is_wide,
            PRECISION=self.head.flags["PRECISION"],
            **config,
        )

    def _weight_grad(self, first_token: int, first_word: int) -> None:
        config = self.config["weight_grad"]
        tokens, (words, padded_words) = self._tokens_from(first_token), self._words_from(first_word)
        programs = padded_words // config["BLOCK_V"] * tiles(self.width, config["BLOCK_H"])
        backward.weight_grad_kernel[(programs,)](
            self.dlogits,
            self.rows,
            self.partial,
            self.dweight,
            self.active.count,
            self.active.peak,
            first_token,
            first_word,
            words,
            tokens,
            padded_words,
            self.width,
            self.factor,
            HAS_PARTIAL=self.partial is not None,
            EVEN_H=self.width % config["BLOCK_H"] == 0,
            PRECISION=self.head.flags["PRECISION"],
            **config,
        )
