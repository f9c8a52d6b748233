"""The dense backward where operands can come by tensor descriptors (TMA): the same walk, its three GEMMs persistent."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clha_fast.triton_backward import Backward
from clha_fast.triton_head import programs, round_up, tiles
from csrc_triton import persistent_backward


class PersistentBackward(Backward):
    """`Backward` for a head that `Head.is_persistent` says yes to."""

    prefix = "persistent_"

    def new_rows(self, padded: int) -> Tensor:
        # TMA wants rows that start on 16 bytes.
        return self.hidden.new_empty(padded, round_up(self.width, 8))[:, : self.width]

    def _grid(self, most: int) -> tuple[int]:
        return (min(programs(self.hidden.device), most),)

    def _dlogits(self, tokens: int, words: int, block: list[int]) -> TensorDescriptor:
        """The workspace as the launch at hand cuts it: [tokens, words], contiguous."""
        return TensorDescriptor(self.dlogits, [tokens, words], [words, 1], block)

    def _logit_grad(self, first_token: int, first_word: int) -> None:
        config, head = self.config["logit_grad"], self.head
        tokens, padded_words = self._tokens_from(first_token), self._words_from(first_word)[1]
        grid = self._grid(tokens // config["BLOCK_N"] * (padded_words // config["BLOCK_V"]))
        persistent_backward.persistent_logit_grad_kernel[grid](
            _descriptor(self.rows, config["BLOCK_N"], config["BLOCK_H"]),
            _descriptor(head.weight, config["BLOCK_V"], config["BLOCK_H"]),
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
            head.pre_scale,
            head.post_scale,
            HAS_BIAS=head.flags["HAS_BIAS"],
            HAS_SOFTCAP=head.flags["HAS_SOFTCAP"],
            **config,
        )

    def _hidden_grad(self, first_token: int, first_word: int) -> None:
        config = self.config["hidden_grad"]
        tokens, padded_words = self._tokens_from(first_token), self._words_from(first_word)[1]
        grid = self._grid(tokens // config["BLOCK_N"] * tiles(self.width, config["BLOCK_H"]))
        persistent_backward.persistent_hidden_grad_kernel[grid](
            self._dlogits(tokens, padded_words, [config["BLOCK_N"], config["BLOCK_V"]]),
            _descriptor(self.head.weight, config["BLOCK_V"], config["BLOCK_H"]),
            self.drows,
            self.active.count,
            first_token,
            first_word,
            tokens,
            padded_words,
            self.width,
            **config,
        )

    def _weight_grad(self, first_token: int, first_word: int) -> None:
        has_partial = self.partial is not None
        config = self.head.config("persistent_weight_grad_partial") if has_partial else self.config["weight_grad"]
        tokens, (words, padded_words) = self._tokens_from(first_token), self._words_from(first_word)
        grid = self._grid(padded_words // config["BLOCK_V"] * tiles(self.width, config["BLOCK_H"]))
        persistent_backward.persistent_weight_grad_kernel[grid](
            self._dlogits(tokens, padded_words, [config["BLOCK_N"], config["BLOCK_V"]]),
            _descriptor(self.rows, config["BLOCK_N"], config["BLOCK_H"]),
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
            HAS_PARTIAL=has_partial,
            **config,
        )


def _descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])
