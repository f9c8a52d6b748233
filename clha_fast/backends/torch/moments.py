"""Statistics of a token's softmax beside its log-probability, and the gradient of the entropy among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clha_fast.types import EntropySlopes

# Of log p: below it p is 0 in any dtype, and 0 * -inf would be NaN.
LEAST = -1000.0


def finished(moments: dict[str, Tensor], total: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """The statistics [n] that a scan's moments make with its sum of exponentials: H = log S - sum(e^d d) / S."""
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "entropy": lambda a: (total.log() - a / total).clamp(min=0),
        "sum_sq_probs": lambda a: a / total**2,
        "mean_logit": lambda a: a / vocabulary,
        "is_top1": lambda a: torch.where(total.isnan(), torch.nan, a),
    }
    return {name: made[name](moment) for name, moment in moments.items()}


@dataclass
class Mix:
    """A gradient of entropy beside that of log-probability, all [n]: `share` p (log p + H) + `main` (p - onehot).

    The larger of the two coefficients of a token is taken out into `Part.grad`: it goes to the [n, H] side.
    """

    main: Tensor
    share: Tensor
    entropy: Tensor

    def at(self, tokens: Tensor) -> Mix:
        """Of some tokens, by their positions."""
        return Mix(self.main[tokens], self.share[tokens], self.entropy[tokens])

    def weights(self, log_p: Tensor) -> Tensor:
        """What p is multiplied by, of log p [words, n]."""
        return log_p.clamp(min=LEAST).add_(self.entropy).mul_(self.share).add_(self.main)


def mixed(grad: Tensor, slopes: EntropySlopes | None) -> tuple[Tensor, Mix | None]:
    """(coefficients [n] of the gradients, what is mixed before they are multiplied in)."""
    if slopes is None:
        return grad, None
    size = torch.maximum(grad.abs(), slopes.grad.abs())
    whole = torch.where(size == 0, 1.0, size)
    return size, Mix(grad / whole, slopes.grad / whole, slopes.entropy)
