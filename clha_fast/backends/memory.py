"""What the workspace backend holds, in bytes: its chunks are made by it, and `auto` and a plan go by it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

# A product that stands beside what it is added to or rounded into, at a time.
PART_BYTES = 64 * 2**20
_LEAST_BYTES = 64 * 2**20
# Without a weight's gradient a chunk costs one more read of the weight, which a product of some hundred tokens hides.
_FROZEN_BYTES = 256 * 2**20


def padded_width(vocabulary: int) -> int:
    """Elements from one row of the workspace to the next: rows start on 128 bytes for any vocabulary."""
    return -(-vocabulary // 64) * 64


@dataclass(frozen=True)
class Workspace:
    """The workspace of a head's weight [vocabulary, width].

    Attributes:
        itemsize: bytes of an element of hidden states and weight. given: `HeadOptions.workspace_bytes`. trains: the
            weight's gradient is wanted.
    """

    vocabulary: int
    width: int
    itemsize: int
    given: int | None = None
    trains: bool = True

    @property
    def most(self) -> int:
        """Tokens that it may hold at a time: the logits given, else as many as a [V, H] weight has in float32."""
        return self._tokens(self.given or max(_LEAST_BYTES, 4 * self.vocabulary * self.width))

    @property
    def tokens(self) -> int:
        """Tokens of a chunk, but of one that is a larger prompt's; 256 MiB of logits where the weight is frozen."""
        if self.given or self.trains:
            return self.most
        return min(self.most, self._tokens(_FROZEN_BYTES))

    def tokens_for(self, largest: int) -> int:
        """Tokens of the largest chunk, where the largest prompt has so many.

        A prompt that does not fit is formed twice: a chunk grows for one that does then, and not for one that cannot.
        """
        return max(self.tokens, largest if largest <= self.most else 0)

    def _tokens(self, budget: int) -> int:
        return max(1, budget // (padded_width(self.vocabulary) * self.itemsize))

    def keeps_factors(self, tokens: int) -> bool:
        """Whether the weight's gradient waits as a product, which is rounded as it is formed: 16 bits, one chunk.

        Later chunks would have to be added to what is rounded already: they take sums in float32.
        """
        return self.trains and self.itemsize == 2 and 0 < tokens <= self.tokens

    def peak(self, tokens: int, rows: int | None = None, largest: int = 0) -> int:
        """Bytes above the inputs at the most, gradients among them, of a loss and its backward.

        But for about 100 bytes a token of what is numbered by tokens. rows: of hidden states, read by an index; None
        where each token has its own. largest: tokens of the largest prompt.
        """
        every = tokens if rows is None else rows
        return self._peak(tokens, every * self.width, rows is not None, largest)

    def beyond(self, tokens: int) -> int:
        """`peak` of so many tokens >= 1, but for the gradients of hidden states, which the other paths hold, too.

        Of any prompts, which may be one alone, and of hidden states that are read by an index, as in training.
        """
        return self._peak(tokens, 0, True, min(tokens, self.most))

    @property
    def worst(self) -> int:
        """`beyond` of any number of tokens."""
        return max(self.beyond(self.most), self.beyond(self.most + 1))

    def fitting(self, budget: int) -> int | None:
        """The most tokens for which `beyond` is within `budget` bytes; None where it is for any number of them."""
        if self.worst <= budget:
            return None
        return bisect_right(range(1, self.most + 1), budget, key=self.beyond)

    def _peak(self, tokens: int, hidden: int, indexed: bool, largest: int) -> int:
        chunk, weight, size = min(tokens, self.tokens_for(largest)), self.vocabulary * self.width, self.itemsize
        logits = size * chunk * padded_width(self.vocabulary)
        # Rows that an index reads are copied, and their gradients added in their places.
        copied = (size + 4) * chunk * self.width if indexed else 0
        sums, rounded = 4 * hidden, size * hidden if size < 4 else 0
        if not self.trains:
            return sums + max(logits + copied, rounded)
        rows = size * chunk * self.width  # without those that have no gradient
        if self.keeps_factors(tokens):
            part = min(PART_BYTES, 4 * weight)
            return sums + logits + rows + max(copied, size * weight + max(part, rounded))
        ends = rounded + (size * weight if size < 4 else 0)
        return sums + 4 * weight + max(logits + copied + rows * 3 // 2, ends)
